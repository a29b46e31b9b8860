"""Prompts of every shape, on Llama without vLLM's prefix cache: each hit is ours, and counted."""

from __future__ import annotations

import asyncio

import pytest

from vllm_dualpath.bench.replay import ReplayPlan, TokenRange, count_exact, replay

from .client import MODEL_NAME, complete, greedy
from .deployment import Deployment
from .models import BLOCK_TOKENS, MAX_BATCHED_TOKENS, hit_tokens
from .prompts import token_ids
from .reference import Reference

_LENGTHS = (
    1,
    BLOCK_TOKENS - 1,
    BLOCK_TOKENS,
    BLOCK_TOKENS + 1,
    2 * BLOCK_TOKENS,
    4 * BLOCK_TOKENS,
    3 * MAX_BATCHED_TOKENS + 5,
)


@pytest.mark.parametrize("num_tokens", _LENGTHS)
def test_prompts_of_any_length(
    llama: Deployment, llama_reference: Reference, num_tokens: int
) -> None:
    """Shorter than a block, whole blocks, blocks and a rest, several chunks; cold, then warm."""
    prompt = token_ids(f"length {num_tokens}", num_tokens)
    expected = llama_reference.tokens(prompt, 10)
    start = llama.drained()
    assert llama.ask(prompt, 10).tokens == expected
    cold = llama.drained()
    assert (cold[0] - start[0]).prompt == (num_tokens, 0, 0)
    assert llama.ask(prompt, 10).tokens == expected
    warm = llama.drained()
    hit = hit_tokens(num_tokens, num_tokens)
    assert (warm[0] - cold[0]).prompt == (num_tokens - hit, 0, hit)
    assert (warm[0] - cold[0]).external_hits == hit
    # vLLM computes the last token itself, and a request with nothing else is a new one to it.
    loaded = (0, 0, num_tokens) if num_tokens > 1 else (1, 0, 0)
    assert (warm[1] - cold[1]).prompt == loaded


def test_a_shared_prefix_is_a_hit(llama: Deployment, llama_reference: Reference) -> None:
    """Another prompt with the same first 200 tokens hits their three full blocks."""
    prefix = token_ids("shared prefix", 200)
    first, second = (prefix + token_ids(f"rest {idx}", 90) for idx in range(2))
    assert llama.ask(first, 8).tokens == llama_reference.tokens(first, 8)
    before = llama.drained()
    assert llama.ask(second, 8).tokens == llama_reference.tokens(second, 8)
    after = llama.drained()
    assert (after[0] - before[0]).prompt == (290 - 192, 0, 192)


def test_generated_blocks_are_stored(llama: Deployment, llama_reference: Reference) -> None:
    """The second turn hits a block whose tokens the first turn generated."""
    prompt = token_ids("generated blocks", 100)
    answer = llama.ask(prompt, 120).tokens
    assert answer == llama_reference.tokens(prompt, 120)
    before = llama.drained()
    # The KV of the last token that was generated was never computed.
    num_known = len(prompt) + len(answer) - 1
    second = [*prompt, *answer, *token_ids("second turn", 40)]
    assert llama.ask(second, 8).tokens == llama_reference.tokens(second, 8)
    after = llama.drained()
    hit = hit_tokens(len(second), num_known)
    assert hit == 192
    assert (after[0] - before[0]).prompt == (len(second) - hit, 0, hit)


def test_a_cache_salt_has_its_own_blocks(llama: Deployment, llama_reference: Reference) -> None:
    """Blocks stored under one salt are no hits without it, and none under another one."""
    prompt = token_ids("cache salt", 150)
    expected = llama_reference.tokens(prompt, 6)
    before = llama.drained()
    hits = []
    for salt in ("one", "two", None, "one"):
        options = {} if salt is None else {"cache_salt": salt}
        assert llama.ask(prompt, 6, **options).tokens == expected
        after = llama.drained()
        hits.append((after[0] - before[0]).external)
        before = after
    assert hits == [0, 0, 0, 128]


def test_two_samples_of_one_prompt(llama: Deployment, llama_reference: Reference) -> None:
    """n=2: both take the same slots, and give what plain vLLM samples from the same seed.

    Short enough that both fit one step: a seeded request whose prefill is cut in two kills vLLM
    0.32 on a CPU ("CPU Generator does not use offset").
    """
    prompt = token_ids("two samples", 120)
    options: dict[str, object] = {"n": 2, "temperature": 1.0, "seed": 7}
    expected = llama_reference.ask(prompt, 12, **options).choices
    assert len(set(expected)) == 2
    for _ in range(2):
        assert llama.ask(prompt, 12, **options).choices == expected


def test_a_list_of_prompts(llama: Deployment, llama_reference: Reference) -> None:
    """Goes to the decode engine alone and is answered."""
    prompts = [token_ids(f"list {idx}", 70 + idx) for idx in range(3)]
    before = llama.drained()
    answer = complete(llama.url, greedy(prompts, 6))
    assert answer.choices == tuple(llama_reference.tokens(prompt, 6) for prompt in prompts)
    after = llama.drained()
    assert (after[0] - before[0]).prompt == (0, 0, 0)


def test_prompt_logprobs(llama: Deployment, llama_reference: Reference) -> None:
    """Every prompt token is computed, although its blocks are stored, and has its logprob."""
    prompt = token_ids("prompt logprobs", 140)
    expected = llama_reference.ask(prompt, 6, prompt_logprobs=1)
    assert llama.ask(prompt, 6).tokens == expected.tokens
    before = llama.drained()
    answer = llama.ask(prompt, 6, prompt_logprobs=1)
    assert answer.tokens == expected.tokens
    found, wanted = (_logprobs(each.body["choices"][0]) for each in (answer, expected))
    assert len(found) == len(prompt) - 1
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, abs=1e-4)
    after = llama.drained()
    assert (after[1] - before[1]).prompt == (140, 0, 0)


def _logprobs(choice: dict[str, object]) -> dict[tuple[int, str], float]:
    """Logprob by position and token id."""
    positions = choice["prompt_logprobs"]
    assert isinstance(positions, list)
    return {
        (idx, min(entry, key=lambda token: entry[token]["rank"])): max(
            value["logprob"] for value in entry.values()
        )
        for idx, entry in enumerate(positions)
        if entry
    }


def test_eight_agents_at_once(llama: Deployment, llama_reference: Reference) -> None:
    """Concurrent multi-turn agents: every answer of every turn is plain vLLM's."""
    plan = ReplayPlan(
        agents=8,
        turns=3,
        first=TokenRange(150, 260),
        append=TokenRange(30, 70),
        generate=20,
        seed=11,
    )
    before = llama.drained()
    result = asyncio.run(replay(llama.url, plan, MODEL_NAME))
    assert [record.error for record in result.records if record.error] == []
    num_exact = asyncio.run(count_exact(llama_reference.url, result, MODEL_NAME))
    assert num_exact == len(result.records) == 24
    after = llama.drained()
    prefill, decode = after[0] - before[0], after[1] - before[1]
    assert prefill.external >= 16 * 2 * BLOCK_TOKENS  # two blocks at least, in turns 2 and 3
    assert prefill.computed + prefill.external == result.prompt_tokens
    assert decode.external == result.prompt_tokens
    assert prefill.blocks_read > 0 < decode.blocks_read
