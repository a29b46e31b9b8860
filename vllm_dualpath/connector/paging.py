"""Where the pages of vLLM's paged caches lie in memory.

A page of one layer is one piece of memory, or several equal pieces at equal distances: that covers
every layout of vLLM's KV caches. In staging its pieces lie one behind the other, in the order in
which they lie in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from vllm_dualpath.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer: page ``b`` starts ``b * block_stride`` bytes after ``address``."""

    address: int
    block_stride: int
    num_runs: int
    """Pieces of a page, ``run_stride`` bytes apart."""
    run_stride: int
    run_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.num_runs * self.run_bytes


class PagedCaches:
    """vLLM's caches of all layers. Keeps their memory alive. Immutable."""

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        num_blocks: int,
        page_bytes: Sequence[int],
        layout: str = "",
    ) -> None:
        """Raises ``ConfigError`` for caches whose pages cannot be copied; ``layout`` names them."""
        self.tensors = tuple(caches)
        self.device = caches[0].device
        self.num_blocks = num_blocks
        self.layers = tuple(
            _layer_layout(cache, num_blocks, num_bytes, layout)
            for cache, num_bytes in zip(caches, page_bytes, strict=True)
        )
        self.pages_split = caches[0].shape[0] // num_blocks
        """Kernel blocks in a page: more than one lays its bytes out differently."""


def _layer_layout(
    cache: torch.Tensor, num_blocks: int, page_bytes: int, layout: str
) -> LayerLayout:
    """How the pages of a logical ``[B, H, N, C]`` cache lie."""
    where = f"KV cache of shape {tuple(cache.shape)}, strides {cache.stride()}, layout {layout}"
    item = cache.element_size()
    ratio, rest = divmod(cache.shape[0], num_blocks)
    content = prod(cache.shape[1:]) * item * ratio
    if rest or content != page_bytes:
        raise ConfigError(
            f"{where}: expected {num_blocks} pages of {page_bytes} bytes, found {content} bytes a"
            " page; report this model"
        )
    dims = [(cache.stride(dim), cache.shape[dim]) for dim in range(1, cache.dim())]
    if ratio > 1:
        dims.append((cache.stride(0), ratio))
    pieces = _pieces(dims)
    if len(pieces) > 2 or pieces[0][0] != 1:
        raise ConfigError(
            f"{where}: expected a page in one piece, or in equal pieces at equal distances; set"
            " VLLM_KV_CACHE_LAYOUT to one that docs/compatibility.md lists"
        )
    run_bytes = pieces[0][1] * item
    stride, num_runs = pieces[1] if len(pieces) == 2 else (0, 1)
    return LayerLayout(
        address=cache.data_ptr(),
        block_stride=cache.stride(0) * ratio * item,
        num_runs=num_runs,
        run_stride=stride * item,
        run_bytes=run_bytes,
    )


def _pieces(dims: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(stride, size) of the fewest dimensions that address the same memory, innermost first."""
    pieces: list[tuple[int, int]] = []
    for stride, size in sorted((stride, size) for stride, size in dims if size > 1):
        if pieces and stride == pieces[-1][0] * pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] * size)
        else:
            pieces.append((stride, size))
    if not pieces or pieces[0][0] != 1:
        pieces.insert(0, (1, 1))  # elements that stand alone
    return pieces
