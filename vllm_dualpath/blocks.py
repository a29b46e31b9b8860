"""Geometry of stored KV, and the hash chain that names it.

Tokens group into *pages* (vLLM's KV blocks, ``page_tokens`` each) and pages into *Full Blocks*
(``block_tokens`` each, all layers), the unit of storage and of staging slots. A *Layer Block* is
one layer of a Full Block. A Full Block's payload is ``[layer][page][page bytes]``: the pages as
they lie in vLLM's cache, so nothing is converted on the way.

This module knows numbers and bytes only: no vLLM, no torch, no files.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

ALIGNMENT_BYTES = 4096
"""Direct I/O and page alignment of headers, payloads and slots."""

HASH_BYTES = 32

_ROOT_DOMAIN = b"vllm-dualpath/root/1\0"
_TAIL_DOMAIN = b"vllm-dualpath/tail/1\0"


def align_up(num_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    """Round up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the KV of one engine's shard lies in pages. Two geometries that differ never share KV."""

    block_tokens: int
    page_tokens: int
    layer_page_bytes: tuple[int, ...]
    """Bytes of one page in each layer, in the order of the model's layers."""
    layout: str
    """vLLM's physical layout name, e.g. ``LBHNC``."""
    kv_heads: int
    kv_dtype: str

    def __post_init__(self) -> None:
        if self.page_tokens <= 0 or self.block_tokens <= 0:
            raise ValueError(f"geometry: token counts must be positive: {self}")
        if self.block_tokens % self.page_tokens:
            raise ValueError(
                f"geometry: block_tokens {self.block_tokens} is not a multiple of the page size"
                f" {self.page_tokens}"
            )
        if not self.layer_page_bytes or min(self.layer_page_bytes) <= 0:
            raise ValueError("geometry: every layer needs a positive page size")

    @property
    def num_layers(self) -> int:
        return len(self.layer_page_bytes)

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens

    @property
    def layer_block_bytes(self) -> tuple[int, ...]:
        """Bytes of each Layer Block."""
        return tuple(num_bytes * self.pages_per_block for num_bytes in self.layer_page_bytes)

    @property
    def layer_offsets(self) -> tuple[int, ...]:
        """Offset of each Layer Block in the payload."""
        return (0, *accumulate(self.layer_block_bytes))[:-1]

    @property
    def payload_bytes(self) -> int:
        """Bytes of a Full Block without padding."""
        return sum(self.layer_block_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a staging slot, and of a stored payload: padded for direct I/O."""
        return align_up(self.payload_bytes)

    def num_blocks(self, num_tokens: int) -> int:
        """Full Blocks that ``num_tokens`` touch, the last perhaps partly."""
        return -(-num_tokens // self.block_tokens)

    def num_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` touch, the last perhaps partly."""
        return -(-num_tokens // self.page_tokens)

    def page_offset(self, layer: int, page_in_block: int) -> int:
        """Offset of one page of one layer in a slot."""
        return self.layer_offsets[layer] + page_in_block * self.layer_page_bytes[layer]


def chain_root(fingerprint: bytes, cache_salt: str | None = None) -> bytes:
    """The chain's start: covers the model (``fingerprint``) and a request's ``cache_salt``."""
    digest = hashlib.sha256(_ROOT_DOMAIN + fingerprint)
    if cache_salt is not None:
        digest.update(b"salt\0" + cache_salt.encode("utf-8", "surrogatepass"))
    return digest.digest()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian. Raises ``ValueError`` for ids outside that
    range.
    """
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as exc:
        raise ValueError(f"token ids must be integers in [0, 2^32): {exc}") from exc
    return packed.tobytes()


def extend_chain(parent: bytes, block_token_bytes: bytes) -> bytes:
    """The hash of one Full Block: SHA-256 over its parent's hash and its tokens."""
    return hashlib.sha256(parent + block_token_bytes).digest()


def chain_hashes(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """The chain hash of every full block of ``token_ids``."""
    return _chain(root, token_bytes(token_ids), block_tokens)


def prompt_digest(root: bytes, token_ids: Sequence[int]) -> bytes:
    """One hash over a whole prompt, its partial last block included.

    The router states it for the prompt it planned, an engine for the prompt it was given.
    """
    return _digest(root, token_bytes(token_ids))


def hash_prompt(
    root: bytes, token_ids: Sequence[int], block_tokens: int
) -> tuple[list[bytes], bytes]:
    """``chain_hashes`` and ``prompt_digest`` of one prompt; looks at its ids once."""
    packed = token_bytes(token_ids)
    return _chain(root, packed, block_tokens), _digest(root, packed)


def _chain(root: bytes, packed: bytes, block_tokens: int) -> list[bytes]:
    stride = 4 * block_tokens
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(packed) - stride + 1, stride):
        parent = extend_chain(parent, packed[start : start + stride])
        hashes.append(parent)
    return hashes


def _digest(root: bytes, packed: bytes) -> bytes:
    return hashlib.sha256(_TAIL_DOMAIN + root + packed).digest()
