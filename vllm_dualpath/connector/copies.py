"""Carries out copies between staging memory and the paged caches, and says when they are done.

A copy is asynchronous: submitting one costs the same whatever it moves, and returns a *mark*, a
point in the order of copies. Who reads what a copy writes, or changes what it reads, waits for its
mark first. This module has the contract, the engine for caches in host memory, and the thread on
which background loads go on when their mark is reached.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from vllm.logger import init_logger

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.errors import ConfigError, TransferTimeout
from vllm_dualpath.native import (
    CopyQueue,
    PageMap,
    PageRows,
    buffer_address,
    leave_compute_cores,
)

logger = init_logger("vllm.dualpath.copies")

_JOIN_S = 10.0
_WARN_S = 30.0
"""A copy moves memory only: one that takes longer means that something is badly wrong."""

Mark = Any
"""A point in the order of copies, made and understood by one engine. ``None`` has been reached."""

Mapping = Any
"""An engine's own description of caches and a staging memory, and of the pages of a step."""
Rows = Any


class CopyEngine(Protocol):
    """Moves pages. Any thread may call, but for what says that it is the forward thread's.

    Urgent copies run in the order of their submission. Background copies run in theirs, behind
    every urgent one submitted before, and are overtaken by urgent ones submitted after: they must
    not touch the same pages.
    """

    def map(
        self, caches: PagedCaches, memory: mmap.mmap, num_slots: int, geometry: Geometry
    ) -> Mapping:
        """Make ``memory``, of ``num_slots`` slots, ready to be copied to and from."""

    def unmap(self, mapping: Mapping) -> None:
        """End ``map``; no copy may be under way."""

    def rows(self, mapping: Mapping, copies: Sequence[PageCopy]) -> Rows:
        """The pages of ``copies``, for all layers. Raises ``ValueError`` for impossible ones."""

    def submit(
        self, rows: Rows, first_layer: int, end_layer: int, *, load: bool, reported: bool = False
    ) -> Mark:
        """Copy urgently, after everything the forward pass has launched. The forward thread's."""

    def submit_barrier(self) -> None:
        """A copy of nothing, urgent and reported. The forward thread's."""

    def wait_reports(self, seen: int) -> tuple[int, str]:
        """Block until more than ``seen`` copies submitted as ``reported`` have ended, well or not;
        how many have, in the order of their submission, and why copies failed. One thread.

        May return early with as many as before.
        """

    def submit_layers(self, rows: Rows, *, load: bool) -> Sequence[Mark]:
        """``submit`` of each layer in turn: their marks. The forward thread's."""

    def submit_background(
        self, rows: Rows, first_layer: int, end_layer: int, after: Mark, *, load: bool
    ) -> Mark:
        """Copy after ``after``."""

    def hold_forward(self, mark: Mark) -> float:
        """Let what the forward pass launches from now on come after ``mark``. The forward
        thread's; returns for how many seconds it was blocked.
        """

    def now(self) -> Mark:
        """A mark behind everything the forward pass has launched. The forward thread's."""

    def wait(self, mark: Mark) -> None:
        """Block until ``mark`` is reached. Raises ``RuntimeError`` if its copy failed.

        There is no deadline: nothing may touch the memories of a copy that is under way.
        """

    def close(self) -> None:
        """Carry out what was submitted, then end. Raises ``TransferTimeout``."""


class HostCopies:
    """Copies between host memories, by a native thread that needs no GIL.

    A forward pass on a CPU has done what it launched when a hook is called, so only copies are
    ever waited for.
    """

    def __init__(self) -> None:
        self._queue = CopyQueue()
        self._reached = [0, 0]
        """Of each lane, which is the lowest bit of its tickets, the last one known to be done."""

    def map(
        self, caches: PagedCaches, memory: mmap.mmap, num_slots: int, geometry: Geometry
    ) -> Mapping:
        return page_map(caches, buffer_address(memory), num_slots, geometry)

    def unmap(self, mapping: Mapping) -> None:
        """Nothing is held but addresses."""

    def rows(self, mapping: Mapping, copies: Sequence[PageCopy]) -> Rows:
        return page_rows(mapping, copies)

    def submit(
        self, rows: Rows, first_layer: int, end_layer: int, *, load: bool, reported: bool = False
    ) -> Mark:
        return self._queue.submit(rows, load, first_layer, end_layer, False, reported)

    def submit_barrier(self) -> None:
        self._queue.submit_barrier()

    def wait_reports(self, seen: int) -> tuple[int, str]:
        return self._queue.wait_reports(seen, _WARN_S)

    def submit_layers(self, rows: Rows, *, load: bool) -> Sequence[Mark]:
        return self._queue.submit_layers(rows, load)

    def submit_background(
        self,
        rows: Rows,
        first_layer: int,
        end_layer: int,
        after: Mark,  # noqa: ARG002 # always reached
        *,
        load: bool,
    ) -> Mark:
        return self._queue.submit(rows, load, first_layer, end_layer, background=True)

    def hold_forward(self, mark: Mark) -> float:
        # Copies mostly outrun the forward pass, which asks about each layer's.
        if mark is None or mark <= self._reached[mark & 1]:
            return 0.0
        self._reached[mark & 1] = reached = self._queue.done_until(mark)
        if mark <= reached:
            return 0.0
        started = time.perf_counter()
        self.wait(mark)
        return time.perf_counter() - started

    def now(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        while mark is not None and not self._queue.wait(mark, _WARN_S):
            logger.warning("a copy of KV pages is not done after %.0f s; waiting on", _WARN_S)

    def close(self) -> None:
        if not self._queue.close(_JOIN_S):
            raise TransferTimeout(f"copies of KV pages did not end in {_JOIN_S} s")


def page_map(caches: PagedCaches, address: int, num_slots: int, geometry: Geometry) -> PageMap:
    """Describe the caches, and the staging memory that starts at ``address``, to the core."""
    layers = [
        (
            layer.address,
            layer.block_stride,
            layer.num_runs,
            layer.run_stride,
            layer.run_bytes,
            geometry.page_offset(idx, 0),
        )
        for idx, layer in enumerate(caches.layers)
    ]
    return PageMap(
        layers,
        caches.num_blocks,
        address,
        geometry.slot_bytes,
        num_slots,
        geometry.pages_per_block,
    )


def page_rows(mapping: PageMap, copies: Sequence[PageCopy]) -> PageRows:
    """The pages of ``copies``; no Python runs for each page."""
    return PageRows(mapping, [(copy.first_page, copy.block_ids, copy.slots) for copy in copies])


def copy_engine(device: torch.device) -> CopyEngine:
    """The engine for caches on ``device``. Raises ``ConfigError`` for a kind not covered."""
    if device.type == "cpu":
        return HostCopies()
    if device.type == "cuda":
        from vllm_dualpath.connector.cuda_copies import choose_engine

        return choose_engine(device)
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
        leave_compute_cores()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a copy job failed")
