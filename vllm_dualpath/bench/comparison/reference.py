"""Plain vLLM on the same agents: the answers every mode must give, and the ``oracle``.

It keeps all KV in its own prefix cache, so nothing is read, copied or transferred: the floor.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.session import engine_args, engine_env
from vllm_dualpath.bench.comparison.settings import ComparisonPlan, Topology
from vllm_dualpath.bench.completion import complete, open_session, served_model
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
        asyncio.run(_warm_up(server.url, plan))
        start_s = time.perf_counter()
        result = asyncio.run(replay(server.url, plan.replay_plan()))
    return Run(Topology(1, 1), "oracle", 0, result, start_s)


async def _warm_up(url: str, plan: ComparisonPlan) -> None:
    async with open_session() as session:
        name = await served_model(session, url)
        for context in plan.contexts():
            await complete(session, url, name, context, 1)
