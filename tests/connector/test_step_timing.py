"""The chunks that steps are timed with."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.connector.step_timing import full_chunks, random_chunks


@given(st.integers(1, 100_000), st.integers(1, 8192), st.integers())
def test_chunks_add_up_and_none_is_too_large(num_tokens: int, largest: int, seed: int) -> None:
    """Random or full, they compute the prompt exactly once and within vLLM's budget."""
    if num_tokens // largest > 5000:
        num_tokens = 5000 * largest
    for chunks in (
        random_chunks(random.Random(seed), num_tokens, largest),
        full_chunks(num_tokens, largest),
    ):
        assert sum(chunks) == num_tokens
        assert 0 < min(chunks) <= max(chunks) <= largest
