"""The arithmetic of one step's quota, without a scheduler."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.connector.quota import LEAST_CHUNK_TOKENS, StepQuota
from vllm_dualpath.profile import FittedCurve

BLOCK = 16


def fitted(token_s: float, token_pair_s: float = 0.0, step_s: float = 0.0) -> FittedCurve:
    return FittedCurve(step_s, token_s, token_pair_s, r2=1.0, median_error=0.0, num_samples=9)


def test_prompts_are_taken_whole_until_the_quota_cuts_one():
    """The last prompt gets what is left, down to a block boundary; nobody gets more after it."""
    quota = StepQuota(fitted(1e-3), 0.5, BLOCK)
    quota.begin()
    assert quota.chunk(0, 100) == 100
    assert quota.chunk(1000, 150) == 150
    assert quota.chunk(0, 400) == 240
    assert quota.chunk(0, 1) == 0
    quota.begin()
    assert quota.chunk(240, 160) == 160


def test_a_chunk_in_the_middle_of_a_block_ends_at_a_boundary():
    """It is the prompt's position that is rounded down, not the chunk's length."""
    quota = StepQuota(fitted(1e-3), 0.1, BLOCK)
    assert quota.chunk(7, 500) == 89


def test_a_chunk_grows_no_longer_than_pairs_allow():
    """Behind more cached tokens the same quota covers fewer new ones: the exact most that fit."""
    curve = fitted(1e-5, 1e-7)
    for cached in (0, 1024, 8192):
        quota = StepQuota(curve, 0.3, 1)
        chunk = quota.chunk(cached, 100_000)
        seconds = curve.curve.seconds
        assert seconds(cached, chunk) <= 0.3 < seconds(cached, chunk + 1)


def test_the_first_prompt_of_a_step_always_moves():
    """A quota below a single token gives a least chunk to the first prompt and to no other."""
    quota = StepQuota(fitted(1.0), 1e-6, BLOCK)
    for _ in range(2):
        quota.begin()
        quota.add(5000, 1)
        assert quota.chunk(0, 1000) == LEAST_CHUNK_TOKENS
        assert quota.chunk(0, 1000) == 0
    assert StepQuota(fitted(1.0), 1e-6, 256).chunk(0, 1000) == 256


def test_a_rest_that_is_too_short_is_left():
    """A second prompt is not cut to less than a least chunk."""
    quota = StepQuota(fitted(1e-3), 0.2, BLOCK)
    assert quota.chunk(0, 150) == 150
    assert quota.chunk(0, 500) == 0
    assert quota.chunk(0, 10) == 0, "it would overtake"


def test_what_a_step_takes_anyway_counts():
    """Its fixed seconds and its decodes are taken off the quota."""
    quota = StepQuota(fitted(1e-3, step_s=0.1), 0.4, 1)
    quota.begin()
    quota.add(300, 100)
    assert quota.chunk(0, 500) == 200


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 5000)), max_size=12),
    st.floats(0, 1e-3),
    st.floats(0, 1e-7),
    st.floats(1e-9, 1),
    st.sampled_from([1, 16, 256]),
)
def test_no_step_is_over_its_quota_and_none_is_empty(prompts, token_s, pair_s, quota_s, block):
    """Whatever waits: within the quota unless one least chunk is all there is; in order."""
    curve = fitted(token_s, pair_s)
    quota = StepQuota(curve, quota_s, block)
    quota.begin()
    chunks = [quota.chunk(cached, new) for cached, new in prompts]
    taken = [(cached, chunk) for (cached, _), chunk in zip(prompts, chunks, strict=True) if chunk]
    assert bool(taken) == bool(prompts)
    for (_, new), chunk, later in zip(prompts, chunks, chunks[1:], strict=False):
        assert chunk == new or not later
    total = sum(curve.curve.seconds(*each) for each in taken)
    least = max(LEAST_CHUNK_TOKENS, block)
    assert total <= quota_s * (1 + 1e-9) or (len(taken) == 1 and taken[0][1] <= least)
