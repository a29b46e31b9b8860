"""One topology: a testbed, a cluster on it, and runs of one mode after another.

Engines stay up from the first run to the last. What changes between runs is the router, which has
the mode, and before each run the store holds the same blocks: the contexts of all agents.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.comparison.baseline_runs import (
    DEFAULT_BASELINE_DIR,
    BaselineRuns,
    compute_contexts,
    is_baseline,
)
from vllm_dualpath.bench.comparison.cpu import cpu_by_kind
from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.samples import Sampler, Timeline
from vllm_dualpath.bench.comparison.settings import (
    BLOCK_TOKENS,
    CompareMode,
    ComparisonPlan,
    Say,
    Topology,
    engine_args,
    engine_env,
)
from vllm_dualpath.bench.comparison.stored import StoredBlocks
from vllm_dualpath.bench.completion import complete, open_session
from vllm_dualpath.bench.replay import ReplayPlan, ReplayResult, replay
from vllm_dualpath.bench.testbed import lifecycle, network
from vllm_dualpath.bench.testbed.counters import NicCounters
from vllm_dualpath.bench.testbed.layout import TestbedSpec, mount_point
from vllm_dualpath.bench.testbed.namespaces import entered
from vllm_dualpath.bench.testbed.places import places, router_args, store_uri
from vllm_dualpath.bench.testbed.reading import measure_unshaped_read
from vllm_dualpath.config import Mode
from vllm_dualpath.errors import LaunchError

_STORED_S = 120.0
_QUIET_S = 60.0
_POLL_S = 0.1


class Session:
    """Builds everything on entry, takes it down on exit. One thread, for blocking use."""

    def __init__(
        self,
        plan: ComparisonPlan,
        topology: Topology,
        spec: TestbedSpec,
        model: Path,
        log_dir: Path,
        say: Say,
        baseline_dir: Path = DEFAULT_BASELINE_DIR,
    ) -> None:
        self.topology = topology
        self.spec = spec
        self.recompute_ttft_s: list[float] = []
        """Of a context that nobody has seen, on the idle cluster, NICs shaped."""
        self.unshaped_read_bytes_per_s = 0.0
        """What all nodes together read from the store when no NIC is shaped."""
        self._plan = plan
        self._say = say
        self._stack = ExitStack()
        self._stored = StoredBlocks(mount_point(spec.name, "prefill-0"))
        self._model = model
        self._log_dir = log_dir
        self._baselines = BaselineRuns(plan, self.spec, model, log_dir, baseline_dir, say)

    def _cluster_spec(self) -> ClusterSpec:
        env = engine_env(self._plan)
        return ClusterSpec(
            self._model,
            store_uri(self.spec),
            num_prefill=self.topology.num_prefill,
            num_decode=self.topology.num_decode,
            mode="prefill_only",
            engine_args=engine_args(self._plan),
            router_args=router_args(self.spec),
            extra_config={
                "block_tokens": BLOCK_TOKENS,
                "staging_bytes": self._plan.staging_bytes,
            },
            log_dir=self._log_dir / str(self.topology),
            places={name: replace(at, env=env) for name, at in places(self.spec).items()},
        )

    def __enter__(self) -> Session:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        self._say(f"{self.topology}: testbed and engines, some 30 s")
        lifecycle.up(replace(self.spec, storage_rate=None, compute_rate=None))
        self._stack.callback(lifecycle.down, self.spec.name)
        self._counters = NicCounters(self.spec)
        self._stack.callback(self._counters.close)
        # Router and client are on the head's node.
        self._stack.enter_context(entered(self.spec.head.namespace))
        self._cluster = LocalCluster(self._cluster_spec())
        self._stack.enter_context(self._cluster)
        self._say(f"{self.topology}: contexts of {self._plan.agents} agents, not shaped yet")
        self._store_contexts()
        self.unshaped_read_bytes_per_s = measure_unshaped_read(self.spec)
        network.shape(self.spec)

    def _store_contexts(self) -> None:
        """Compute each context once, alone, and wait until it is stored: a mover that has half of
        its slots waiting for the store leaves blocks out.
        """
        contexts = self._plan.contexts()
        for num_before, context in enumerate(contexts):
            asyncio.run(compute_contexts(self._cluster.url, str(self._model), [context]))
            num_blocks = self._plan.context_blocks * (num_before + 1) // len(contexts)
            self._stored.wait_for(num_blocks, _STORED_S)
        self._wait_quiet()
        self._stored.keep()

    def run(self, mode: CompareMode, repeat: int, plan: ReplayPlan | None = None) -> Run:
        """Measure one mode from the same start as every other. Raises ``LaunchError``."""
        if is_baseline(mode):
            self._wait_quiet()
            with self._baselines.started(mode) as url:
                return self._measure(url, mode, repeat, plan)
        self.start_mode(cast(Mode, mode))
        if self._plan.num_alone and not self.recompute_ttft_s:
            self.recompute_ttft_s.append(asyncio.run(self._compute_unseen()))
            self._wait_quiet()
        return self._measure(self._cluster.url, mode, repeat, plan)

    def _measure(self, url: str, mode: CompareMode, repeat: int, plan: ReplayPlan | None) -> Run:
        alone = [self._alone(url) for _ in range(self._plan.num_alone)]
        used_before = cpu_by_kind(self.spec.name)
        with Sampler(self._counters) as sampler:
            start_s = time.perf_counter()
            result = self._replay(url, plan or self._plan.replay_plan())
            # The replay's own clock starts when it knows the model, a request later.
            start_s = max(start_s, time.perf_counter() - result.jct_s)
        used = cpu_by_kind(self.spec.name)
        self._wait_quiet()
        return Run(
            self.topology,
            mode,
            repeat,
            result,
            start_s,
            tuple(alone),
            Timeline(sampler.samples),
            difference(used, used_before),
        )

    def start_mode(self, mode: Mode) -> None:
        """A new router in this mode that knows exactly the kept blocks."""
        # Not before all is stored: what is written now would stay.
        self._wait_quiet()
        self._stored.reset()
        self._cluster.restart_router(mode)
        self._wait(self._knows_store, "the router does not know what is stored")

    def _replay(self, url: str, plan: ReplayPlan) -> ReplayResult:
        return asyncio.run(replay(url, plan, str(self._model)))

    def _alone(self, url: str) -> float:
        """Time to first token of one agent's first turn, nobody else there."""
        result = self._replay(url, replace(self._plan.replay_plan(), agents=1, turns=1))
        if result.num_failed:
            raise LaunchError(f"a request on the idle cluster failed: {result.records[0].error}")
        return result.completions[0].ttft_s

    async def _compute_unseen(self) -> float:
        context, model = self._plan.unseen_context(), str(self._model)
        async with open_session() as session:
            return (await complete(session, self._cluster.url, model, context, 1)).ttft_s

    def _knows_store(self) -> bool:
        index = self._cluster.status()["index"]
        return bool(index["num_blocks"] == self._stored.num_kept and not index["snapshots_pending"])

    def _wait_quiet(self) -> None:
        """Until every slot is free again: all is stored, and nothing leaked."""
        self._wait(self._is_quiet, "staging slots stay in use after the last request")

    def _is_quiet(self) -> bool:
        status = self._cluster.status()
        used = sum(engine["slots"]["used"] for engine in status["engines"])
        return not used and not status["transfers"]

    def _wait(self, condition: Callable[[], bool], message: str) -> None:
        deadline_s = time.monotonic() + _QUIET_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise LaunchError(
                    f"{self.topology}: {message}, waited {_QUIET_S:.0f} s; logs in"
                    f" {self._cluster.log_dir}"
                )
            time.sleep(_POLL_S)


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was used between."""
    return {kind: seconds - before.get(kind, 0.0) for kind, seconds in sorted(after.items())}
