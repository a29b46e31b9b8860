"""Qwen3 in vLLM's default processes (mp), with KV caches too small for the load."""

from __future__ import annotations

from .deployment import Deployment
from .models import hit_tokens
from .prompts import token_ids
from .reference import Reference


def test_cold_and_warm(small_cache: Deployment, qwen3_reference: Reference) -> None:
    """One request at a time: the same tokens and counts as with the uni executor."""
    prompt = token_ids("qwen3", 389)
    expected = qwen3_reference.tokens(prompt, 12)
    start = small_cache.drained()
    assert small_cache.ask(prompt, 12).tokens == expected
    cold = small_cache.drained()
    assert (cold[0] - start[0]).prompt == (389, 0, 0)
    assert small_cache.ask(prompt, 12).tokens == expected
    warm = small_cache.drained()
    hit = hit_tokens(389, 389)
    assert (warm[0] - cold[0]).prompt == (389 - hit, 0, hit)
    assert (warm[1] - cold[1]).prompt == (0, 0, 389)


def test_preemption_at_the_decode_engine(
    small_cache: Deployment, qwen3_reference: Reference
) -> None:
    """Requests grow until some are preempted; they recompute and give the right tokens.

    Three at their full length are more than the cache holds: however unevenly they arrive, answers
    are so long that three of five meet.
    """
    prompts = [token_ids(f"preempted decode {idx}", 150) for idx in range(5)]
    expected = [qwen3_reference.tokens(prompt, 400) for prompt in prompts]
    before = small_cache.drained()
    answers = small_cache.ask_all(prompts, 400)
    assert [answer.tokens for answer in answers] == expected
    after = small_cache.drained()
    assert (after[1] - before[1]).preemptions > 0


def test_preemption_at_the_prefill_engine(
    small_cache: Deployment, qwen3_reference: Reference
) -> None:
    """Prompts in chunks outgrow the cache together, with hits and without."""
    prompts = [token_ids(f"preempted prefill {idx}", 600) for idx in range(6)]
    expected = [qwen3_reference.tokens(prompt, 4) for prompt in prompts]
    before = small_cache.drained()
    for _ in range(2):
        answers = small_cache.ask_all(prompts, 4)
        assert [answer.tokens for answer in answers] == expected
        small_cache.drained()
    after = small_cache.drained()
    assert (after[0] - before[0]).preemptions > 0
