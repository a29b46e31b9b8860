"""Stands between vLLM and our two sides: no exception leaves a hook, no answer trips an assertion.

But one: ``SyncLoadFailed`` says that the alternative is a wrong token, and ends the engine.

vLLM takes an exception from a hook, an unknown or repeated request id, or a hit that covers a whole
prompt synchronously as a reason to end the engine. None of these may be in our power.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.connector.metadata import DualPathMetadata
from vllm_dualpath.connector.stats import DualPathStats, Recorder
from vllm_dualpath.errors import SyncLoadFailed

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_dualpath.connector.scheduler import SchedulerSide
    from vllm_dualpath.connector.worker import WorkerSide

logger = init_logger("vllm.dualpath.guard")

_T = TypeVar("_T")


class _Guard:
    """Calls hooks; logs each kind of failure once, counts all of them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[tuple[str, type[Exception]]] = set()

    def call(self, hook: str, function: Callable[[], _T], safe: _T) -> _T:
        """Return what ``function`` returns, or ``safe`` if it raises."""
        try:
            return function()
        except Exception as exc:
            self.note(hook, exc)
            return safe

    def note(self, hook: str, exc: Exception) -> None:
        """Count a failure and log the first of its kind."""
        self._recorder.count(metrics.LOAD_FAILURES, label="hook_error")
        kind = (hook, type(exc))
        if kind not in self._seen:
            self._seen.add(kind)
            logger.error("%s failed; the engine goes on without it", hook, exc_info=exc)


class GuardedScheduler:
    """The scheduler side's hooks, made safe."""

    def __init__(self, side: SchedulerSide) -> None:
        self.side = side
        self._guard = _Guard(side.recorder)

    def matched(self, request: Request, num_local_tokens: int) -> tuple[int, bool]:
        """Never ``None``; never more than the prompt, nor all of it synchronously."""
        answer = self._guard.call(
            "matched", lambda: self.side.matched(request, num_local_tokens), (0, False)
        )
        num_tokens, is_async = answer
        if num_tokens == 0:
            return 0, False  # also where vLLM holds more than the prompt, after a preemption
        most = request.num_prompt_tokens - num_local_tokens - (not is_async)
        if not 0 <= num_tokens <= most:
            logger.error("a hit of %d tokens, at most %d can be: dropped", num_tokens, most)
            self._recorder_count()
            return 0, False
        return num_tokens, is_async

    def allocated(self, request: Request, block_ids: Sequence[int], num_external: int) -> None:
        """A taken hit that cannot be ordered must fail aloud, or vLLM would wait or read
        garbage.
        """
        try:
            self.side.allocated(request, block_ids, num_external)
        except Exception as exc:
            self._guard.note("allocated", exc)
            if num_external:
                self.side.fail_load(request, block_ids)

    def build(self, output: SchedulerOutput) -> DualPathMetadata:
        """Loads first and on their own: they must reach the worker whatever else fails."""
        orders = self.side.take_orders()
        self._guard.call("add_saves", lambda: self.side.add_saves(orders, output), None)
        self._guard.call("add_persists", lambda: self.side.add_persists(orders, output), None)
        return orders

    def update(self, output: KVConnectorOutput) -> None:
        self._guard.call("update", lambda: self.side.update(output), None)

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        return self._guard.call("finished", lambda: self.side.finished(request, block_ids), False)

    def has_pending_work(self) -> bool:
        return self._guard.call("has_pending_work", self.side.has_pending_work, False)

    def reset(self) -> bool:
        def reset() -> bool:
            self.side.reset()
            return True

        return self._guard.call("reset", reset, False)

    def take_stats(self) -> DualPathStats | None:
        return self._guard.call("take_stats", self.side.take_stats, None)

    def shutdown(self) -> None:
        self._guard.call("shutdown", self.side.shutdown, None)

    def _recorder_count(self) -> None:
        self.side.recorder.count(metrics.LOAD_FAILURES, label="hook_error")


class GuardedWorker:
    """The worker side's hooks, made safe."""

    def __init__(self, side: WorkerSide) -> None:
        self.side = side
        self._guard = _Guard(side.recorder)
        self._receiving: set[str] = set()
        self._delayed: set[str] = set()
        self._ended: set[str] = set()

    def bind(self, step: DualPathMetadata) -> None:
        self._delayed |= step.delayed_frees
        for copy in step.async_loads:
            self._receiving.add(copy.request_id)
        for load in step.store_loads:
            self._receiving.add(load.request_id)
        for request_id, _ in step.failed_loads:
            self._receiving.add(request_id)
        try:
            self.side.bind(step)
        except Exception as exc:
            self._fail_step("bind", exc)

    def start_loads(self) -> None:
        try:
            self.side.start_loads()
        except SyncLoadFailed:
            raise
        except Exception as exc:
            self._fail_step("start_loads", exc)

    def wait_for_layer(self, layer_name: str) -> None:
        # Once a layer and step: no detour through ``call``.
        try:
            self.side.wait_for_layer(layer_name)
        except Exception as exc:
            self._fail_step("wait_for_layer", exc)

    def save_layer(self, layer_name: str) -> None:
        try:
            self.side.save_layer(layer_name)
        except Exception as exc:
            self._guard.note("save_layer", exc)

    def finish_saves(self) -> None:
        self._guard.call("finish_saves", self.side.finish_saves, None)

    def fence(self) -> None:
        self._guard.call("fence", self.side.fence, None)

    def results(self, finished_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Each id once: sent only if vLLM waits for it and has finished it, received only if
        begun.
        """
        if self._delayed:
            self._ended |= finished_ids & self._delayed
        nothing: tuple[set[str], set[str], set[str]] = (set(), set(), set())
        sent, received, failed = self._guard.call(
            "results", lambda: self.side.results(finished_ids), nothing
        )
        if not (sent or received):
            return sent, received, set()
        sent &= self._ended
        received &= self._receiving
        self._ended -= sent
        self._delayed -= sent
        self._receiving -= received
        return sent, received, failed & received

    def _fail_step(self, hook: str, exc: Exception) -> None:
        self._guard.note(hook, exc)
        try:
            self.side.fail_step()
        except SyncLoadFailed:
            raise
        except Exception as failure:
            self._guard.note("fail_step", failure)

    def take_invalid_blocks(self) -> set[int]:
        return self._guard.call("take_invalid_blocks", self.side.take_invalid_blocks, set())

    def take_stats(self) -> DualPathStats | None:
        return self._guard.call("take_stats", self.side.take_stats, None)

    def shutdown(self) -> None:
        self._guard.call("shutdown", self.side.shutdown, None)
