"""Byte views of vLLM's paged caches and of the staging memory, page by page.

Both become ``[..., words]`` tensors whose last dimension is one page of one layer, so that a copy
is one indexed assignment whatever the attention kind, dtype or strides are.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.errors import ConfigError

_WORDS = ((torch.int64, 8), (torch.uint8, 1))
"""Whole words where sizes and addresses allow: an indexed copy moves one element a thread."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Page ``pages[i]`` of slot ``slots[i]`` belongs to vLLM block ``blocks[i]``. On one device."""

    blocks: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor

    def __len__(self) -> int:
        return int(self.blocks.numel())


class PagedCaches:
    """vLLM's caches of all layers as ``[num_blocks, words]`` each; shares their memory."""

    def __init__(
        self, caches: Sequence[torch.Tensor], num_blocks: int, page_bytes: Sequence[int]
    ) -> None:
        self.device = caches[0].device
        self.num_blocks = num_blocks
        self.layers = [
            _page_view(cache, num_blocks, num_bytes)
            for cache, num_bytes in zip(caches, page_bytes, strict=True)
        ]
        self.pages_split = caches[0].shape[0] // num_blocks
        """Kernel blocks in a page: more than one lays its bytes out differently."""


class StagingView:
    """The staging memory of one mover as ``[num_slots, pages_per_block, words]`` per layer."""

    def __init__(self, memory: mmap.mmap, num_slots: int, geometry: Geometry) -> None:
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._num_slots = num_slots
        self._geometry = geometry

    def layers(self, memory: torch.Tensor, words: Sequence[torch.dtype]) -> list[torch.Tensor]:
        """Views of ``memory``, which is ``bytes`` or a device's alias of it."""
        geometry = self._geometry
        views = []
        for layer, dtype in enumerate(words):
            item = dtype.itemsize
            typed = memory.view(dtype)
            page = geometry.layer_page_bytes[layer] // item
            views.append(
                typed.as_strided(
                    (self._num_slots, geometry.pages_per_block, page),
                    (geometry.slot_bytes // item, page, 1),
                    geometry.page_offset(layer, 0) // item,
                )
            )
        return views


def make_rows(copies: Sequence[PageCopy], geometry: Geometry, device: torch.device) -> Rows:
    """One row for each page of all ``copies``."""
    blocks: list[int] = []
    slots: list[int] = []
    pages: list[int] = []
    per_block = geometry.pages_per_block
    for copy in copies:
        first_block = copy.first_page // per_block
        blocks.extend(copy.block_ids)
        for page in range(copy.first_page, copy.last_page):
            slots.append(copy.slots[page // per_block - first_block])
            pages.append(page % per_block)
    return Rows(_index(blocks, device), _index(slots, device), _index(pages, device))


def _index(values: list[int], device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _page_view(cache: torch.Tensor, num_blocks: int, page_bytes: int) -> torch.Tensor:
    """``[num_blocks, words]`` over a logical ``[B, H, N, C]`` cache. Raises ``ConfigError``."""
    ratio, rest = divmod(cache.shape[0], num_blocks)
    content = prod(cache.shape[1:]) * cache.element_size() * ratio
    if rest or content != page_bytes:
        raise ConfigError(
            f"KV cache of shape {tuple(cache.shape)}: expected {num_blocks} pages of {page_bytes}"
            f" bytes, found {content} bytes a page; report this model"
        )
    if not _is_dense(cache[0]) or (ratio > 1 and cache.stride(0) != prod(cache.shape[1:])):
        raise ConfigError(
            f"KV cache of shape {tuple(cache.shape)} and strides {cache.stride()}: expected each"
            " page in one piece; set VLLM_KV_CACHE_LAYOUT to LBHNC or LBNHC"
        )
    stride_bytes = cache.stride(0) * ratio * cache.element_size()
    offset_bytes = cache.storage_offset() * cache.element_size()
    for dtype, item in _WORDS:
        if not (page_bytes % item or stride_bytes % item or offset_bytes % item):
            view = torch.empty(0, dtype=dtype, device=cache.device)
            view.set_(
                cache.untyped_storage(),
                offset_bytes // item,
                (num_blocks, page_bytes // item),
                (stride_bytes // item, 1),
            )
            return view
    raise AssertionError("a byte divides everything")


def _is_dense(page: torch.Tensor) -> bool:
    """Whether the elements of ``page`` fill one contiguous piece of memory, in whatever order."""
    expected = 1
    dims = [(stride, size) for stride, size in zip(page.stride(), page.shape, strict=True)]
    for stride, size in sorted(dims):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
