"""Carries out copies between staging memory and the paged caches, and says when they are done.

On a CPU a copy is immediate. On a GPU it runs on a stream of our own, ordered by events after the
kernels that wrote what it reads, and before those that read what it writes or reuse what it reads.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from vllm.logger import init_logger

from vllm_dualpath.errors import ConfigError, TransferTimeout

logger = init_logger("vllm.dualpath.copies")

_JOIN_S = 10.0
_HOST_REGISTER_PORTABLE = 1

Copy = Callable[[], None]
Mark = torch.cuda.Event | None
"""A point in the order of copies; ``None`` has been reached."""


class CopyEngine(Protocol):
    """Runs copies. Called from the forward thread, but for ``run_and_wait``."""

    def submit(self, copy: Copy) -> Mark:
        """Run ``copy`` after everything the forward pass has launched so far."""

    def hold_forward(self, mark: Mark) -> None:
        """Let what the forward pass launches from now on wait for ``mark``."""

    def now(self) -> Mark:
        """A mark behind everything the forward pass has launched so far."""

    def run_and_wait(self, copy: Copy, after: Mark) -> None:
        """Run ``copy`` after ``after`` and block until it is done. Not for the forward thread."""

    def wait(self, mark: Mark) -> None:
        """Block until ``mark`` is reached. Not for the forward thread."""

    def map_memory(self, memory: torch.Tensor) -> torch.Tensor:
        """What copies use to reach the host memory ``memory``."""

    def unmap_memory(self, memory: torch.Tensor) -> None:
        """End ``map_memory``; no copy may be under way."""


class HostCopies:
    """Copies between host memories: done when ``submit`` returns."""

    def submit(self, copy: Copy) -> Mark:
        copy()
        return None

    def hold_forward(self, mark: Mark) -> None:
        """Nothing is ever under way."""

    def now(self) -> Mark:
        return None

    def run_and_wait(self, copy: Copy, after: Mark) -> None:  # noqa: ARG002 # always reached
        copy()

    def wait(self, mark: Mark) -> None:
        """Every mark is reached."""

    def map_memory(self, memory: torch.Tensor) -> torch.Tensor:
        return memory

    def unmap_memory(self, memory: torch.Tensor) -> None:
        """Nothing was mapped."""


class CudaCopies:
    """Copies by kernels that reach registered host memory over the bus, on one stream of our own.

    One stream for both directions also orders a load into a page behind the save that still reads
    it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(self, copy: Copy) -> Mark:
        return self._launch(copy, self.now())

    def hold_forward(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def now(self) -> Mark:
        mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def run_and_wait(self, copy: Copy, after: Mark) -> None:
        self.wait(self._launch(copy, after))

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def map_memory(self, memory: torch.Tensor) -> torch.Tensor:
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        self._check(
            _cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _HOST_REGISTER_PORTABLE),
            f"registering {memory.numel()} bytes of staging memory",
        )
        return get_accelerator_view_from_cpu_tensor(memory)

    def unmap_memory(self, memory: torch.Tensor) -> None:
        self._stream.synchronize()
        self._check(
            _cudart().cudaHostUnregister(memory.data_ptr()),
            "unregistering staging memory",
        )

    def _launch(self, copy: Copy, after: Mark) -> Mark:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            copy()
            mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        return mark

    def _check(self, error: object, what: str) -> None:
        if int(error) != 0:  # type: ignore[call-overload] # cudart's enum converts to int
            raise ConfigError(f"CUDA: {what} failed with error {error}; check the memlock limit")


def copy_engine(device: torch.device) -> CopyEngine:
    """The engine for caches on ``device``. Raises ``ConfigError`` for a kind not covered."""
    if device.type == "cpu":
        return HostCopies()
    if device.type == "cuda":
        return CudaCopies(device)
    raise ConfigError(f"KV caches: expected them on cpu or cuda, found {device}")


class CopyThread:
    """Runs jobs in order, off the forward thread. Owned by the worker side."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dualpath-copies", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Run ``job`` after all earlier ones. It must handle its own errors."""
        self._jobs.put(job)

    def close(self) -> None:
        """Run what is queued, then end. Raises ``TransferTimeout`` if the thread stays."""
        self._jobs.put(None)
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise TransferTimeout(f"thread {self._thread.name} did not end in {_JOIN_S} s")

    def _run(self) -> None:
        # vLLM binds the thread that started this one to its compute cores: stay off them.
        with suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a copy job failed")


def _cudart() -> Any:
    """The CUDA runtime that torch itself found and loaded."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
