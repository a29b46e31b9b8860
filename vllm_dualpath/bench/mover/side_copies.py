"""Copies between staging and a paged cache, beside memcpy of the same bytes in one piece."""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np

from vllm_dualpath import native
from vllm_dualpath.bench.mover.shapes import shape_named
from vllm_dualpath.bench.mover.side_puts_memory import PutMemory
from vllm_dualpath.errors import TransferTimeout

_COPY_S = 30.0


class Copies:
    """Staging slots and a cache of one shape; pages lie in the cache in random order."""

    def __init__(self) -> None:
        self._queue = native.CopyQueue()

    def open(self, shape: str, num_blocks: int) -> int:
        """Make both memories; returns the bytes that each copy moves."""
        geometry = shape_named(shape).geometry
        num_pages = num_blocks * geometry.pages_per_block
        self._staging = PutMemory(num_blocks * geometry.slot_bytes)
        self._staging.fill(seed=1)
        self._cache = mmap.mmap(-1, num_pages * sum(geometry.layer_page_bytes))
        self._cache_address = native.buffer_address(self._cache)
        self._num_bytes = len(self._cache)
        ctypes.memset(self._cache_address, 1, self._num_bytes)
        self._num_layers = geometry.num_layers
        layers, address = [], self._cache_address
        for layer, page_bytes in enumerate(geometry.layer_page_bytes):
            offset = geometry.page_offset(layer, 0)
            layers.append((address, page_bytes, 1, 0, page_bytes, offset))
            address += num_pages * page_bytes
        self._map = native.PageMap(
            layers,
            num_pages,
            self._staging.address,
            geometry.slot_bytes,
            num_blocks,
            geometry.pages_per_block,
        )
        order = np.random.default_rng(3).permutation(num_pages).tolist()
        self._rows = native.PageRows(self._map, [(0, order, list(range(num_blocks)))])
        return self._num_bytes

    def copy(self, load: bool) -> float:
        """Seconds for all pages of all layers."""
        start = time.perf_counter()
        ticket = self._queue.submit(self._rows, load, 0, self._num_layers)
        if not self._queue.wait(ticket, _COPY_S):
            raise TransferTimeout(f"copies: not done in {_COPY_S} s")
        return time.perf_counter() - start

    def memcpy(self, load: bool) -> float:
        """Seconds for as many bytes in one piece, in the same direction."""
        source, target = self._staging.address, self._cache_address
        if not load:
            source, target = target, source
        start = time.perf_counter()
        ctypes.memmove(target, source, self._num_bytes)
        return time.perf_counter() - start
