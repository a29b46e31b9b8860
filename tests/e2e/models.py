"""The models under test, and the flags every server of theirs has.

Float32 and a wide initialisation: greedy answers are varied, depend on every prompt token, and are
the same whatever the batch; see ``vllm_dualpath/bench/tiny_model.py``.
"""

from __future__ import annotations

from vllm_dualpath.bench.tiny_model import TinyModel

from .client import MODEL_NAME

MAX_MODEL_LEN = 1024
MAX_BATCHED_TOKENS = 256
"""Longer prompts are prefilled in chunks."""
PAGE_TOKENS = 32
BLOCK_TOKENS = 64

LLAMA = TinyModel(arch="llama", heads=4, kv_heads=2, max_len=MAX_MODEL_LEN)
QWEN3 = TinyModel(arch="qwen3", layers=3, heads=6, kv_heads=2, hidden=96, max_len=MAX_MODEL_LEN)

COMMON_ARGS = (
    *("--served-model-name", MODEL_NAME),
    *("--dtype", "float32"),
    *("--block-size", str(PAGE_TOKENS)),
    *("--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)),
    *("--max-num-seqs", "16"),
    "--disable-uvicorn-access-log",
)
PREFIX_CACHING = ("--enable-prefix-caching",)
NO_PREFIX_CACHING = ("--no-enable-prefix-caching",)


def block_file_bytes(model: TinyModel) -> int:
    """Size of a stored block: a header of 4 KiB, then float32 keys and values of all layers."""
    per_token = model.layers * model.kv_heads * 2 * model.head_dim * 4
    return 4096 + per_token * BLOCK_TOKENS


def hit_tokens(num_tokens: int, num_stored_tokens: int) -> int:
    """Tokens of stored blocks that a prompt can use: at least one token is computed."""
    return min(num_stored_tokens, num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
