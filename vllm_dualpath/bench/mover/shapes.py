"""The block sizes that are measured: what 64 tokens of three models' KV take.

Payloads follow from the models' published shapes; no model is run. A Full Block has 64 tokens in
pages of vLLM's usual size on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dualpath.blocks import Geometry

_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's Full Block."""

    name: str
    geometry: Geometry
    source: str
    """What the sizes are computed from."""

    def num_blocks(self, num_bytes: int) -> int:
        """Blocks of about ``num_bytes`` together, at least two."""
        return max(2, num_bytes // self.geometry.slot_bytes)


def _plain(name: str, layers: int, kv_heads: int, head_dim: int, dtype: str, source: str) -> Shape:
    """Keys and values of two bytes a number, in pages of 16 tokens."""
    page_bytes = 16 * 2 * kv_heads * head_dim * 2
    geometry = Geometry(_BLOCK_TOKENS, 16, (page_bytes,) * layers, "LBHNC", kv_heads, dtype)
    return Shape(name, geometry, source)


def _deepseek() -> Shape:
    """Each layer a compressed cache and an indexer's, in pages of 64 tokens: odd sizes."""
    pages = (656 * _BLOCK_TOKENS, 132 * _BLOCK_TOKENS) * 61
    geometry = Geometry(_BLOCK_TOKENS, _BLOCK_TOKENS, pages, "LBHNC", 1, "fp8_ds_mla")
    source = "61 layers x (656 B in vLLM's fp8 MLA format + 132 B of the indexer's key) a token"
    return Shape("deepseek-v3.2", geometry, source)


SHAPES = (
    _plain("tiny", 8, 8, 64, "bfloat16", "8 layers x 2 x 8 KV heads x 64 x 2 B a token"),
    _plain("qwen2.5-32b", 64, 8, 128, "float16", "64 layers x 2 x 8 KV heads x 128 x 2 B a token"),
    _deepseek(),
)


PROBE = Shape("probe", Geometry(_BLOCK_TOKENS, _BLOCK_TOKENS, (4096,), "LBHNC", 1, "uint8"), "-")
"""Of no model: so small that its read is mostly what surrounds a read."""


def shape_named(name: str) -> Shape:
    """By ``Shape.name``; raises ``KeyError``."""
    return {shape.name: shape for shape in (*SHAPES, PROBE)}[name]
