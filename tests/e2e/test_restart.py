"""A store outlives its servers; and without checks a damaged block gives wrong tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .deployment import Deployment
from .models import LLAMA, NO_PREFIX_CACHING
from .prompts import token_ids
from .reference import Reference
from .stored_blocks import files_of, flip_byte

_NUM_TOKENS = 300
_HIT = 256


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [token_ids(f"restart {idx}", _NUM_TOKENS) for idx in range(2)]


@pytest.fixture(scope="module")
def second_life(
    llama_reference: Reference,
    llama_dir: Path,
    log_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
) -> Iterator[Deployment]:
    """Servers that were all stopped after they stored the prompts; checks are off now."""
    store = tmp_path_factory.mktemp("restart-store")
    with Deployment(
        LLAMA, llama_dir, store, log_root / "restart", engine_args=NO_PREFIX_CACHING
    ) as deployment:
        for prompt in prompts:
            assert deployment.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)
        deployment.expect_clean()
        deployment.restart_all({"verify_checksums": False})
        yield deployment


@pytest.fixture
def restarted(second_life: Deployment) -> Iterator[Deployment]:
    yield second_life
    second_life.expect_clean()


def test_the_store_is_warm_after_a_restart(
    restarted: Deployment, llama_reference: Reference, prompts: list[list[int]]
) -> None:
    """New processes hit what the old ones stored."""
    before = restarted.drained()
    assert restarted.ask(prompts[0], 10).tokens == llama_reference.tokens(prompts[0], 10)
    after = restarted.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _HIT, 0, _HIT)


def test_a_flipped_byte_changes_the_answer_without_checks(
    restarted: Deployment, llama_reference: Reference, prompts: list[list[int]]
) -> None:
    """The answer really is made of loaded blocks: equal tokens elsewhere mean something."""
    flip_byte(files_of(restarted.store, prompts[1])[1])
    before = restarted.drained()
    assert restarted.ask(prompts[1], 10).tokens != llama_reference.tokens(prompts[1], 10)
    after = restarted.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - _HIT, 0, _HIT)
    assert (after[0] - before[0]).corrupt == 0
