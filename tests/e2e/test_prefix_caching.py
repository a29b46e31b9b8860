"""vLLM's own prefix cache beside the store: the longer one wins, on either side.

``/reset_prefix_cache`` empties one engine's cache only, so that both orders can be made. In the
first part plans cover whole hits; in the second they leave out what the prefill engine holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .client import complete, greedy, post
from .deployment import Deployment
from .models import BLOCK_TOKENS, PAGE_TOKENS, hit_tokens
from .prompts import token_ids
from .reference import Reference

_NUM_TOKENS = 310
_HIT = 256
_LOCAL = 288
"""Nine whole pages of 32; the store has four whole blocks of 64."""


def _reset(deployment: Deployment, role: str) -> None:
    post(f"{deployment.engine_url(role)}/reset_prefix_cache", None)


def _check(deployment: Deployment, reference: Reference, prompt: list[int]) -> None:
    assert deployment.ask(prompt, 10).tokens == reference.tokens(prompt, 10)


def test_local_prefix_longer_than_the_hit(
    prefix_caching: Deployment, llama_reference: Reference
) -> None:
    """Nothing is loaded at the prefill engine, the few missing tokens at the decode engine."""
    prompt = token_ids("local longer", _NUM_TOKENS)
    _check(prefix_caching, llama_reference, prompt)
    before = prefix_caching.drained()
    _check(prefix_caching, llama_reference, prompt)
    after = prefix_caching.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _LOCAL, _LOCAL, 0)
    assert (after[1] - before[1]).prompt == (0, _LOCAL, _NUM_TOKENS - _LOCAL)


def test_local_prefix_shorter_than_the_hit_at_the_prefill_engine(
    prefix_caching: Deployment, llama_reference: Reference
) -> None:
    """Only what is missing between the local prefix and the stored hit is loaded."""
    prompt = token_ids("shorter at prefill", _NUM_TOKENS)
    _check(prefix_caching, llama_reference, prompt)
    prefix_caching.drained()
    _reset(prefix_caching, "prefill")
    _warm_locally(prefix_caching, "prefill", prompt[:100])
    before = prefix_caching.drained()
    _check(prefix_caching, llama_reference, prompt)
    after = prefix_caching.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _HIT, 96, _HIT - 96)
    assert (after[1] - before[1]).prompt == (0, _LOCAL, _NUM_TOKENS - _LOCAL)


def test_local_prefix_shorter_than_the_hit_at_the_decode_engine(
    prefix_caching: Deployment, llama_reference: Reference
) -> None:
    """The decode engine loads everything beyond its own prefix."""
    prompt = token_ids("shorter at decode", _NUM_TOKENS)
    _check(prefix_caching, llama_reference, prompt)
    prefix_caching.drained()
    _reset(prefix_caching, "decode")
    _warm_locally(prefix_caching, "decode", prompt[:70])
    before = prefix_caching.drained()
    _check(prefix_caching, llama_reference, prompt)
    after = prefix_caching.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _LOCAL, _LOCAL, 0)
    assert (after[1] - before[1]).prompt == (0, 64, _NUM_TOKENS - 64)


def test_empty_caches_on_both_sides(prefix_caching: Deployment, llama_reference: Reference) -> None:
    """After both caches were emptied the hit is the store's alone."""
    prompt = token_ids("both empty", _NUM_TOKENS)
    _check(prefix_caching, llama_reference, prompt)
    prefix_caching.drained()
    for role in ("prefill", "decode"):
        _reset(prefix_caching, role)
    before = prefix_caching.drained()
    _check(prefix_caching, llama_reference, prompt)
    after = prefix_caching.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _HIT, 0, _HIT)
    assert (after[1] - before[1]).prompt == (0, 0, _NUM_TOKENS)


def test_second_turn(prefix_caching: Deployment, llama_reference: Reference) -> None:
    """The prefill engine knows the first prompt only, the store also a generated block."""
    prompt = token_ids("second turn with local", 100)
    answer = prefix_caching.ask(prompt, 100).tokens
    assert answer == llama_reference.tokens(prompt, 100)
    second = [*prompt, *answer, *token_ids("second append", 30)]
    before = prefix_caching.drained()
    _check(prefix_caching, llama_reference, second)
    after = prefix_caching.drained()
    num_known = len(prompt) + len(answer) - 1
    local, hit = 96, hit_tokens(len(second), num_known)
    assert hit == 192
    assert (after[0] - before[0]).prompt == (len(second) - hit, local, hit - local)
    decode_local = num_known // PAGE_TOKENS * PAGE_TOKENS
    assert (after[1] - before[1]).prompt == (0, decode_local, len(second) - decode_local)


def _warm_locally(deployment: Deployment, role: str, prompt: list[int]) -> None:
    """A request at the engine itself, past the router: only its own cache learns of it."""
    complete(deployment.engine_url(role), greedy(prompt, 1))


# --- plans that leave out what the prefill engine holds ---


@pytest.fixture
def past_cache(prefix_caching: Deployment) -> Iterator[Deployment]:
    """A new router, which knows of no earlier prompt."""
    prefix_caching.replace_router("split", "--read-past-cache")
    yield prefix_caching
    prefix_caching.replace_router("split")


def test_second_turn_reads_only_what_the_prefill_engine_lacks(
    past_cache: Deployment, llama_reference: Reference
) -> None:
    """The prefill engine has the first prompt: what was generated since is read, by both sides."""
    prompt = token_ids("past the cache", 200)
    answer = past_cache.ask(prompt, 200).tokens
    assert answer == llama_reference.tokens(prompt, 200)
    second = [*prompt, *answer, *token_ids("past the cache, second append", 30)]
    before = past_cache.drained()
    _check(past_cache, llama_reference, second)
    after = past_cache.drained()
    num_cached = len(prompt) // BLOCK_TOKENS
    num_known = len(prompt) + len(answer) - 1
    local, hit = num_cached * BLOCK_TOKENS, hit_tokens(len(second), num_known)
    assert (local, hit) == (192, 384)
    assert (after[0] - before[0]).prompt == (len(second) - hit, local, hit - local)
    num_read = sum(b.blocks_read - a.blocks_read for a, b in zip(before, after, strict=True))
    assert num_read == (hit - local) // BLOCK_TOKENS


def test_the_same_prompt_again_reads_nothing(
    past_cache: Deployment, llama_reference: Reference
) -> None:
    """Chunked, so that what is cached and what is computed go out in more than one step."""
    prompt = token_ids("nothing to read", 700)
    _check(past_cache, llama_reference, prompt)
    past_cache.drained()
    _reset(past_cache, "decode")
    before = past_cache.drained()
    _check(past_cache, llama_reference, prompt)
    after = past_cache.drained()
    local = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert (after[0] - before[0]).prompt == (len(prompt) - local, local, 0)
    assert (after[1] - before[1]).prompt == (0, 0, len(prompt))
    assert [b.blocks_read - a.blocks_read for a, b in zip(before, after, strict=True)] == [0, 0]


def test_a_cache_emptied_behind_the_routers_back(
    past_cache: Deployment, llama_reference: Reference
) -> None:
    """The first prompt that counts on it is computed; the router then believes in none."""
    first, second = (token_ids(f"emptied {name}", _NUM_TOKENS) for name in ("first", "second"))
    for prompt in (first, second):
        _check(past_cache, llama_reference, prompt)
    past_cache.drained()
    _reset(past_cache, "prefill")
    start, num_misses = past_cache.drained(), _num_misses(past_cache)
    _check(past_cache, llama_reference, first)
    missed = past_cache.drained()
    _check(past_cache, llama_reference, second)
    after = past_cache.drained()
    assert (missed[0] - start[0]).prompt == (_NUM_TOKENS, 0, 0)
    assert (after[0] - missed[0]).prompt == (_NUM_TOKENS - _HIT, 0, _HIT)
    assert _num_misses(past_cache) == num_misses + 1


def _num_misses(deployment: Deployment) -> int:
    failures = deployment.status("prefill")["stats"]["load_failures"]
    return int(failures.get("not_cached", 0))


def test_turns_of_many_at_once(past_cache: Deployment, llama_reference: Reference) -> None:
    """Conversations that go on side by side, some from the cache, some from the store."""
    prompts = [token_ids(f"many {agent}", 100 + 60 * agent) for agent in range(5)]
    for turn in range(3):
        answers = past_cache.ask_all(prompts, 8)
        for agent, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            assert answer.tokens == llama_reference.tokens(prompt, 8)
            more = token_ids(f"many {agent} {turn}", 70)
            prompts[agent] = [*prompt, *answer.tokens, *more]
        past_cache.drained()
        if turn == 0:
            _reset(past_cache, "prefill")
