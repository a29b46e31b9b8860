from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.blocks import (
    Geometry,
    align_up,
    chain_hashes,
    chain_root,
    extend_chain,
    prompt_digest,
    token_bytes,
)

GEOMETRY = Geometry(
    block_tokens=64,
    page_tokens=16,
    layer_page_bytes=(512, 768),
    layout="LBHNC",
    kv_heads=2,
    kv_dtype="bfloat16",
)
ROOT = chain_root(b"fingerprint")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_a_full_block_is_layer_after_layer_page_after_page() -> None:
    assert GEOMETRY.num_layers == 2
    assert GEOMETRY.pages_per_block == 4
    assert GEOMETRY.layer_block_bytes == (2048, 3072)
    assert GEOMETRY.layer_offsets == (0, 2048)
    assert GEOMETRY.payload_bytes == 5120
    assert GEOMETRY.slot_bytes == 8192
    assert GEOMETRY.page_offset(1, 3) == 2048 + 3 * 768


def test_pages_tile_the_payload_without_gap_or_overlap() -> None:
    spans = [
        (GEOMETRY.page_offset(layer, page), GEOMETRY.layer_page_bytes[layer])
        for layer in range(GEOMETRY.num_layers)
        for page in range(GEOMETRY.pages_per_block)
    ]
    expected = 0
    for offset, num_bytes in spans:
        assert offset == expected
        expected += num_bytes
    assert expected == GEOMETRY.payload_bytes


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks", "num_pages"),
    [(0, 0, 0), (1, 1, 1), (16, 1, 1), (17, 1, 2), (64, 1, 4), (65, 2, 5)],
)
def test_partial_blocks_and_pages_count(num_tokens: int, num_blocks: int, num_pages: int) -> None:
    assert GEOMETRY.num_blocks(num_tokens) == num_blocks
    assert GEOMETRY.num_pages(num_tokens) == num_pages


@pytest.mark.parametrize(
    "change",
    [
        {"block_tokens": 72},
        {"block_tokens": 0},
        {"page_tokens": 0},
        {"layer_page_bytes": ()},
        {"layer_page_bytes": (512, 0)},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="geometry"):
        replace(GEOMETRY, **change)


@given(num_bytes=st.integers(0, 1 << 40))
def test_alignment_rounds_up_to_the_next_multiple(num_bytes: int) -> None:
    aligned = align_up(num_bytes)
    assert aligned % 4096 == 0
    assert 0 <= aligned - num_bytes < 4096


def test_the_chain_is_what_it_says() -> None:
    """Other programs that share a store must come to the same names: written out once by hand."""
    tokens = [1, 2, 3, 4, 5]
    root = hashlib.sha256(b"vllm-dualpath/root/1\0fingerprint").digest()
    first = hashlib.sha256(root + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([3, 0, 0, 0, 4, 0, 0, 0])).digest()
    assert chain_hashes(ROOT, tokens, 2) == [first, second]
    assert extend_chain(ROOT, token_bytes(tokens[:2])) == first


@given(tokens=TOKENS, more=TOKENS, block_tokens=st.integers(1, 8))
def test_a_longer_prompt_starts_with_the_shorter_ones_hashes(
    tokens: list[int], more: list[int], block_tokens: int
) -> None:
    short = chain_hashes(ROOT, tokens, block_tokens)
    assert len(short) == len(tokens) // block_tokens
    assert chain_hashes(ROOT, tokens + more, block_tokens)[: len(short)] == short


@given(tokens=st.lists(st.integers(0, 9), min_size=6, max_size=6), position=st.integers(0, 5))
def test_one_other_token_changes_its_block_and_all_after_it(
    tokens: list[int], position: int
) -> None:
    other = tokens.copy()
    other[position] += 1
    pairs = zip(chain_hashes(ROOT, tokens, 2), chain_hashes(ROOT, other, 2), strict=True)
    assert [left == right for left, right in pairs] == [idx < position // 2 for idx in range(3)]
    assert prompt_digest(ROOT, tokens) != prompt_digest(ROOT, other)


def test_root_and_salt_tell_chains_apart() -> None:
    """An empty salt is a salt; a fingerprint that ends like a salt is none."""
    roots = [
        chain_root(b"fingerprint"),
        chain_root(b"other"),
        chain_root(b"fingerprint", ""),
        chain_root(b"fingerprint", "tenant"),
        chain_root(b"fingerprint", "\ud800"),
    ]
    assert len(set(roots)) == len(roots)


def test_a_prompts_digest_covers_its_partial_block_and_root() -> None:
    assert prompt_digest(ROOT, [1, 2, 3]) != prompt_digest(ROOT, [1, 2])
    assert prompt_digest(ROOT, [1]) != prompt_digest(chain_root(b"other"), [1])


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], ["a"]])
def test_what_is_no_token_id_is_refused(tokens: list[object]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        token_bytes(tokens)  # type: ignore[arg-type]
