"""Who reads the hit: every mode gives plain vLLM's tokens, and its own side reads."""

from __future__ import annotations

import pytest

from .deployment import Deployment
from .models import hit_tokens
from .prompts import token_ids
from .reference import Reference

_NUM_TOKENS = 389
"""Six full blocks and five tokens, prefilled in two chunks."""
_NUM_HIT_BLOCKS = 6

# Mode, further flags, and the blocks that the prefill side and the decode side read.
_MODES = (
    ("prefill_only", (), (6, 0)),
    ("dual", (), (6, 0)),
    ("split", ("--split-fraction", "0.5"), (3, 3)),
    ("split", ("--split-fraction", "0"), (0, 6)),
)


@pytest.mark.parametrize(("mode", "flags", "reads"), _MODES)
def test_every_mode_reads_where_it_says(
    llama: Deployment,
    llama_reference: Reference,
    mode: str,
    flags: tuple[str, ...],
    reads: tuple[int, int],
) -> None:
    """Cold then warm, after the router was killed and replaced by one of this mode."""
    llama.replace_router(mode, *flags)
    name = f"modes {mode} {flags}"
    prompt = token_ids(name, _NUM_TOKENS)
    expected = llama_reference.tokens(prompt, 12)
    start = llama.drained()
    assert llama.ask(prompt, 12).tokens == expected
    cold = llama.drained()
    assert (cold[0] - start[0]).prompt == (_NUM_TOKENS, 0, 0)
    assert (cold[1] - start[1]).prompt == (0, 0, _NUM_TOKENS)
    assert llama.ask(prompt, 12).tokens == expected
    warm = llama.drained()
    hit = hit_tokens(_NUM_TOKENS, _NUM_TOKENS)
    assert (warm[0] - cold[0]).prompt == (_NUM_TOKENS - hit, 0, hit)
    assert (warm[1] - cold[1]).prompt == (0, 0, _NUM_TOKENS)
    found = tuple(b.blocks_read - a.blocks_read for a, b in zip(cold, warm, strict=True))
    assert found == reads


def test_a_replaced_router_learns_the_store_again(
    llama: Deployment, llama_reference: Reference
) -> None:
    """What was stored under the old router is a hit under the new one."""
    prompt = token_ids("replaced router", 300)
    expected = llama_reference.tokens(prompt, 8)
    assert llama.ask(prompt, 8).tokens == expected
    before = llama.drained()
    llama.replace_router("split")
    assert llama.ask(prompt, 8).tokens == expected
    after = llama.drained()
    assert (after[0] - before[0]).prompt == (300 - 256, 0, 256)
