"""Paged caches in every layout of vLLM's, made by vLLM's own allocation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.paging import PagedCaches

NUM_BLOCKS = 12
PAGE_TOKENS = 4
PAGES_PER_BLOCK = 2

_FULL = FullAttentionSpec(block_size=PAGE_TOKENS, num_kv_heads=3, head_size=16, dtype=torch.float32)
_MLA = MLAAttentionSpec(block_size=PAGE_TOKENS, num_kv_heads=1, head_size=72, dtype=torch.bfloat16)
_FP8 = FullAttentionSpec(block_size=PAGE_TOKENS, num_kv_heads=2, head_size=9, dtype=torch.uint8)

SPECS: dict[str, list[KVCacheSpec]] = {
    "full": [_FULL] * 3,
    "one_head": [replace(_FULL, num_kv_heads=1)] * 2,
    "odd_bytes": [_FP8] * 2,
    "mla": [_MLA] * 3,
    "mla_padded": [replace(_MLA, page_size_padded=1024)] * 3,
    "mixed_sizes": [_FULL, replace(_FULL, head_size=8), _FULL],
}
BLOCK_COMPACT_ONLY = ("mixed_sizes",)
"""vLLM itself refuses these in layouts that tear pages apart."""
KERNEL_BLOCKS = 2
"""Tokens of a kernel block where vLLM splits its pages for a kernel."""


@dataclass(frozen=True)
class Case:
    layout: str
    spec: str
    kernel_block: int | None = None

    def __str__(self) -> str:
        return f"{self.layout}-{self.spec}" + ("-split" if self.kernel_block else "")


def cases() -> list[Case]:
    """Every layout with every shape that vLLM can express in it."""
    found = [
        Case(layout.name, spec)
        for layout in KVCacheLayout
        for spec in SPECS
        if layout.is_block_compact or spec not in BLOCK_COMPACT_ONLY
    ]
    split = [Case(name, spec, KERNEL_BLOCKS) for name in ("LBHNC", "LBNHC") for spec in ("full",)]
    return [*found, *split]


class Caches:
    """One allocation, vLLM's views of it, and our reading of where pages lie."""

    def __init__(self, case: Case, device: torch.device) -> None:
        layout = KVCacheLayout[case.layout]
        names = [f"layers.{idx}" for idx in range(len(SPECS[case.spec]))]
        specs = dict(zip(names, SPECS[case.spec], strict=True))
        first = specs[names[0]]
        uniform = len(set(specs.values())) == 1
        group = KVCacheGroupSpec(
            names, first if uniform else UniformTypeKVCacheSpecs(PAGE_TOKENS, kv_cache_specs=specs)
        )
        config = get_kv_cache_config_from_groups(_vllm_config(layout), [group], 1 << 30)
        sizes = [case.kernel_block] if case.kernel_block else None
        views = allocate_kv_cache(config, device, layout, sizes)
        self.views = [views[name] for name in names]
        page_bytes = tuple(spec.unpadded_page_size_bytes for spec in specs.values())
        self.geometry = Geometry(
            PAGE_TOKENS * PAGES_PER_BLOCK, PAGE_TOKENS, page_bytes, case.layout, 1, ""
        )
        self.raw = torch.empty(0, dtype=torch.int8, device=device).set_(
            self.views[0].untyped_storage()
        )
        self.paged = PagedCaches(self.views, NUM_BLOCKS, page_bytes, case.layout)

    def fill(self) -> None:
        """Other bytes at each place, padding included."""
        places = torch.arange(self.raw.numel(), device=self.raw.device)
        self.raw.copy_(((places * 37 + places // 251) % 255 - 127).to(torch.int8))

    def page(self, layer: int, block: int) -> torch.Tensor:
        """A page's bytes in the order in which they lie in memory, by torch's own indexing."""
        return self._ordered(layer, block).contiguous().flatten()

    def set_page(self, layer: int, block: int, content: torch.Tensor) -> None:
        """Write what ``page`` gave."""
        page = self._ordered(layer, block)
        page.copy_(content.reshape(page.shape))

    def _ordered(self, layer: int, block: int) -> torch.Tensor:
        view = self.views[layer].view(torch.int8)
        ratio = view.shape[0] // NUM_BLOCKS
        page = view[block * ratio : (block + 1) * ratio]
        return page.permute(sorted(range(page.dim()), key=lambda dim: -page.stride(dim)))


def _vllm_config(layout: KVCacheLayout) -> SimpleNamespace:
    """The few facts that vLLM's planning of the caches reads."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=NUM_BLOCKS,
            prefix_cache_retention_interval=None,
        ),
    )
