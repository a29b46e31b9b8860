"""The baselines in a session's testbed, each started for its run and stopped after.

Our own engines stay up meanwhile and idle, at one to two per cent of a core each.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

from vllm_dualpath.bench.baselines.cluster import BaselineCluster
from vllm_dualpath.bench.baselines.environments import BASELINES, BaselineName, Environment
from vllm_dualpath.bench.baselines.programs import BaselineSpec
from vllm_dualpath.bench.comparison.settings import (
    CompareMode,
    ComparisonPlan,
    Say,
    engine_args,
    engine_env,
)
from vllm_dualpath.bench.comparison.stored import StoredBlocks
from vllm_dualpath.bench.completion import complete, open_session
from vllm_dualpath.bench.testbed.layout import TestbedSpec
from vllm_dualpath.errors import LaunchError

DEFAULT_BASELINE_DIR = Path("~/.cache/vllm-dualpath/baselines").expanduser()

_LMCACHE_FILES = "**/*.data"
_STORED_S = 240.0
_SETTLED_S = 3.0
"""What is stored in memory is stored when its size has not grown for so long."""
_POLL_S = 0.2
_HTTP_TIMEOUT_S = 5.0
_MEMORY_GAUGE = "master_allocated_bytes "


def is_baseline(mode: CompareMode) -> TypeGuard[BaselineName]:
    """Whether this is another system, and no read mode of ours."""
    return mode in BASELINES


async def compute_contexts(url: str, model: str, contexts: Sequence[Sequence[int]]) -> None:
    """Have each context computed once, alone. Raises ``RequestError``."""
    async with open_session() as session:
        for context in contexts:
            await complete(session, url, model, context, 1)


class BaselineRuns:
    """Starts a baseline from the same state each time: it has stored exactly the contexts."""

    def __init__(
        self,
        plan: ComparisonPlan,
        testbed: TestbedSpec,
        model: Path,
        log_dir: Path,
        root: Path,
        say: Say,
    ) -> None:
        self._plan = plan
        self._testbed = testbed
        self._model = model
        self._log_dir = log_dir
        self._root = root
        self._say = say
        self._files: StoredBlocks | None = None

    @contextmanager
    def started(self, name: BaselineName) -> Iterator[str]:
        """Its router's address. Raises ``LaunchError``, ``RequestError``."""
        spec = self._spec(name)
        spec.environment.ensure(self._say)
        if name == "nixl_lmcache":
            self._prepare_files(spec)
        self._say(f"{name}: starting, some 40 s")
        with BaselineCluster(spec) as cluster:
            self._say(f"{name}: {cluster.num_spinning} spinning threads, now of lowest priority")
            if name == "nixl_mooncake":
                self._compute(cluster)
                _wait_settled(lambda: _memory_used(spec))
            yield cluster.url

    def _spec(self, name: BaselineName) -> BaselineSpec:
        return BaselineSpec(
            Environment(name, self._root),
            self._testbed,
            self._model,
            engine_args(self._plan),
            engine_env(self._plan),
            self._plan.staging_bytes,
            self._plan.pool_bytes // self._testbed.num_prefill,
            self._log_dir / name,
        )

    def _prepare_files(self, spec: BaselineSpec) -> None:
        """Files of the contexts and no others. Made once, by a start of its own: what a server has
        just written it has in memory too.
        """
        if self._files is None:
            self._say(f"{spec.name}: storing the contexts, some minutes")
            files = StoredBlocks(spec.files_seen_here, _LMCACHE_FILES)
            with BaselineCluster(spec) as cluster:
                self._compute(cluster)
                files.wait_for(self._plan.context_blocks, _STORED_S)
            files.keep()
            self._files = files
        self._files.reset()

    def _compute(self, cluster: BaselineCluster) -> None:
        asyncio.run(compute_contexts(cluster.url, str(self._model), self._plan.contexts()))


def _memory_used(spec: BaselineSpec) -> float:
    """Bytes that Mooncake's master has given out."""
    with urllib.request.urlopen(f"{spec.master_url}/metrics", timeout=_HTTP_TIMEOUT_S) as response:
        lines = response.read().decode("utf-8", "replace").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(_MEMORY_GAUGE))


def _wait_settled(read: Callable[[], float]) -> None:
    """Until a value above zero stays. Raises ``LaunchError``."""
    deadline_s = time.monotonic() + _STORED_S
    last, since_s = read(), time.monotonic()
    while not last or time.monotonic() - since_s < _SETTLED_S:
        if time.monotonic() > deadline_s:
            raise LaunchError(f"nothing was stored in {_STORED_S:.0f} s")
        time.sleep(_POLL_S)
        if (value := read()) != last:
            last, since_s = value, time.monotonic()
