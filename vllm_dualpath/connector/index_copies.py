"""Copies for caches on a GPU by torch's indexing kernels, which reach registered host memory over
the bus.

The slowest way, kept for GPUs and drivers where no other one passes the self test: it needs nothing
but torch.
"""

from __future__ import annotations

import mmap
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.paging import LayerLayout, PagedCaches
from vllm_dualpath.errors import ConfigError

_HOST_REGISTER_PORTABLE = 1
_WORDS = ((torch.int64, 8), (torch.uint8, 1))
"""Whole words where sizes and addresses allow: an indexed copy moves one element a thread."""


@dataclass(frozen=True, slots=True)
class _Views:
    """Of each layer: ``[blocks, runs, words]`` and, of staging, ``[slots, pages, runs, words]``."""

    host: torch.Tensor
    caches: tuple[torch.Tensor, ...]
    staging: tuple[torch.Tensor, ...]
    pages_per_block: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Page ``pages[i]`` of slot ``slots[i]`` belongs to vLLM block ``blocks[i]``. On the device."""

    views: _Views
    blocks: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor


class IndexCopies:
    """One stream for both directions: it also orders a load into a page behind the save that still
    reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._unreported: queue.SimpleQueue[torch.cuda.Event] = queue.SimpleQueue()

    def map(
        self, caches: PagedCaches, memory: mmap.mmap, num_slots: int, geometry: Geometry
    ) -> _Views:
        from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

        host = torch.frombuffer(memory, dtype=torch.uint8)
        register_memory(host)
        mapped = get_accelerator_view_from_cpu_tensor(host)
        pairs = [
            _views(cache, layer, caches.num_blocks, mapped, num_slots, geometry, idx)
            for idx, (cache, layer) in enumerate(zip(caches.tensors, caches.layers, strict=True))
        ]
        return _Views(
            host,
            tuple(pair[0] for pair in pairs),
            tuple(pair[1] for pair in pairs),
            geometry.pages_per_block,
        )

    def unmap(self, mapping: _Views) -> None:
        self._stream.synchronize()
        unregister_memory(mapping.host)

    def rows(self, mapping: _Views, copies: Sequence[PageCopy]) -> _Rows:
        size = mapping.pages_per_block
        num_blocks, num_slots = mapping.caches[0].shape[0], mapping.staging[0].shape[0]
        blocks, slots, pages = [], [], []
        for copy in copies:
            _check(copy, size, num_blocks, num_slots)
            numbers = np.arange(copy.first_page, copy.last_page)
            blocks.append(np.asarray(copy.block_ids, np.int64))
            slots.append(
                np.asarray(copy.slots, np.int64)[numbers // size - copy.first_page // size]
            )
            pages.append(numbers % size)
        return _Rows(mapping, self._index(blocks), self._index(slots), self._index(pages))

    def submit(
        self, rows: _Rows, first_layer: int, end_layer: int, *, load: bool, reported: bool = False
    ) -> torch.cuda.Event:
        mark = self.submit_background(rows, first_layer, end_layer, self.now(), load=load)
        if reported:
            self._unreported.put(mark)
        return mark

    def submit_barrier(self) -> None:
        mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        mark.record(self._stream)
        self._unreported.put(mark)

    def wait_reports(self, seen: int) -> tuple[int, str]:
        try:
            self._unreported.get().synchronize()
        except RuntimeError as exc:
            return seen + 1, str(exc)
        return seen + 1, ""

    def submit_layers(self, rows: _Rows, *, load: bool) -> list[torch.cuda.Event]:
        after = self.now()
        layers = range(len(rows.views.caches))
        return [
            self.submit_background(rows, layer, layer + 1, after, load=load) for layer in layers
        ]

    def submit_background(
        self,
        rows: _Rows,
        first_layer: int,
        end_layer: int,
        after: torch.cuda.Event,
        *,
        load: bool,
    ) -> torch.cuda.Event:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for layer in range(first_layer, end_layer):
                cache, staging = rows.views.caches[layer], rows.views.staging[layer]
                if load:
                    cache.index_put_((rows.blocks,), staging[rows.slots, rows.pages])
                else:
                    staging.index_put_((rows.slots, rows.pages), cache[rows.blocks])
            mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        return mark

    def hold_forward(self, mark: torch.cuda.Event | None) -> float:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
        return 0.0

    def now(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            mark.synchronize()

    def close(self) -> None:
        self._stream.synchronize()

    def _index(self, values: list[np.ndarray[Any, np.dtype[np.int64]]]) -> torch.Tensor:
        joined = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values]))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return joined.pin_memory().to(self._device, non_blocking=True)


def _check(copy: PageCopy, pages_per_block: int, num_blocks: int, num_slots: int) -> None:
    """A kernel that indexes memory that is not there ends the whole process."""
    if max(copy.block_ids, default=0) >= num_blocks or max(copy.slots, default=0) >= num_slots:
        raise ValueError(
            f"blocks {copy.block_ids} and slots {copy.slots}: expected less than {num_blocks} and"
            f" {num_slots}"
        )
    room = len(copy.slots) * pages_per_block - copy.first_page % pages_per_block
    if len(copy.block_ids) > room:
        raise ValueError(
            f"{len(copy.block_ids)} pages from page {copy.first_page} on do not fit into"
            f" {len(copy.slots)} slots"
        )


def register_memory(memory: torch.Tensor) -> None:
    """Let a GPU reach host memory. Raises ``ConfigError``."""
    check_cudart(
        torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
            memory.data_ptr(), memory.numel(), _HOST_REGISTER_PORTABLE
        ),
        f"registering {memory.numel()} bytes of staging memory",
    )


def unregister_memory(memory: torch.Tensor) -> None:
    """End ``register_memory``; no copy may be under way."""
    check_cudart(
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()),  # type: ignore[no-untyped-call]
        "unregistering staging memory",
    )


def check_cudart(error: object, what: str) -> None:
    """Raise ``ConfigError`` for an error of the CUDA runtime."""
    if int(error) != 0:  # type: ignore[call-overload] # cudart's enum converts to int
        raise ConfigError(f"CUDA: {what} failed with error {error}; check the memlock limit")


def _views(
    cache: torch.Tensor,
    layer: LayerLayout,
    num_blocks: int,
    mapped: torch.Tensor,
    num_slots: int,
    geometry: Geometry,
    idx: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's pages in both memories, in the largest words that divide everything."""
    cache_offset = cache.storage_offset() * cache.element_size()
    staging_offset = geometry.page_offset(idx, 0)
    sizes = (layer.block_stride, layer.run_stride, layer.run_bytes, cache_offset, staging_offset)
    dtype, item = next((d, i) for d, i in _WORDS if not any(size % i for size in sizes))
    in_cache = torch.empty(0, dtype=dtype, device=cache.device)
    in_cache.set_(
        cache.untyped_storage(),
        cache_offset // item,
        (num_blocks, layer.num_runs, layer.run_bytes // item),
        (layer.block_stride // item, layer.run_stride // item, 1),
    )
    in_staging = mapped.view(dtype).as_strided(
        (num_slots, geometry.pages_per_block, layer.num_runs, layer.run_bytes // item),
        (geometry.slot_bytes // item, layer.page_bytes // item, layer.run_bytes // item, 1),
        staging_offset // item,
    )
    return in_cache, in_staging
