"""Plain vLLM on the same agents: the answers every mode must give, and the ``oracle``.

It keeps all KV in its own prefix cache, so nothing is read, copied or transferred: the floor.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from vllm_dualpath.bench.comparison.baseline_runs import compute_contexts
from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.settings import (
    ComparisonPlan,
    Topology,
    engine_args,
    engine_env,
)
from vllm_dualpath.bench.place import Place
from vllm_dualpath.bench.replay import replay
from vllm_dualpath.bench.servers import PlainServer


def run_reference(plan: ComparisonPlan, model: Path, log_dir: Path) -> Run:
    """Replay on one plain server whose prefix cache holds the contexts. Raises ``LaunchError``."""
    server = PlainServer(
        model,
        engine_args=engine_args(replace(plan, prefix_caching=True)),
        log_dir=log_dir / "reference",
        place=Place(env=engine_env(plan)),
    )
    with server:
        asyncio.run(compute_contexts(server.url, str(model), plan.contexts()))
        start_s = time.perf_counter()
        result = asyncio.run(replay(server.url, plan.replay_plan()))
    return Run(Topology(1, 1), "oracle", 0, result, start_s)
