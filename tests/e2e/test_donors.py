"""A third engine's mover reads for the two that serve a request: mode ``pool`` on 1P2D."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_dualpath.bench.servers import SingleEngine
from vllm_dualpath.bench.vllm_command import HOST, free_ports

from .deployment import Deployment, wait_until
from .models import COMMON_ARGS, NO_PREFIX_CACHING, hit_tokens
from .prompts import token_ids
from .reference import Reference

_NUM_TOKENS = 650
"""Ten full blocks and ten tokens."""
_DONOR = "decode-1"


@pytest.fixture(scope="module")
def pool_running(
    llama_running: Deployment, llama_dir: Path, log_root: Path
) -> Iterator[Deployment]:
    """The shared cluster with one more decode engine and a router of this mode."""
    (port,) = free_ports(1)
    extra_config = {
        **llama_running.spec.extra_config,
        "role": "decode",
        "router": llama_running.control,
        "name": _DONOR,
        "url": f"http://{HOST}:{port}",
        "donor_slots": 2,
    }
    server = SingleEngine(
        llama_dir,
        llama_running.spec.store,
        extra_config,
        port=port,
        engine_args=(*COMMON_ARGS, *NO_PREFIX_CACHING),
        log_dir=log_root / "llama-donor",
    )
    with server:
        llama_running.replace_router("pool", "--min-segment-blocks", "1")
        wait_until(lambda: len(_serving(llama_running)) == 3, "three engines", 60)
        yield llama_running
    wait_until(lambda: len(_serving(llama_running)) == 2, "the donor's goodbye", 10)
    llama_running.replace_router("split")


@pytest.fixture
def pool(pool_running: Deployment) -> Iterator[Deployment]:
    yield pool_running
    pool_running.expect_clean()


def _serving(pool: Deployment) -> dict[str, dict[str, Any]]:
    engines = pool.cluster.status()["engines"]
    return {engine["engine_id"]: engine for engine in engines if engine["serving"]}


def _donated_bytes(pool: Deployment) -> int:
    return sum(engine["stats"]["donated_bytes"] for engine in _serving(pool).values())


def _warm(pool: Deployment, reference: Reference, name: str) -> tuple[list[int], tuple[int, ...]]:
    """A prompt whose blocks are stored, and its answer."""
    prompt = token_ids(name, _NUM_TOKENS)
    expected = reference.tokens(prompt, 10)
    assert pool.ask(prompt, 10).tokens == expected
    pool.expect_clean()
    return prompt, expected


def test_a_donor_reads_a_part(pool: Deployment, llama_reference: Reference) -> None:
    """The answer is plain vLLM's, and all hit blocks are read once, some by the third engine."""
    prompt, expected = _warm(pool, llama_reference, "donor")
    before, (prefill, _) = _serving(pool), pool.drained()
    donated = _donated_bytes(pool)
    assert pool.ask(prompt, 10).tokens == expected
    after, (prefill_after, _) = _serving(pool), pool.drained()
    hit = hit_tokens(_NUM_TOKENS, _NUM_TOKENS)
    assert (prefill_after - prefill).prompt == (_NUM_TOKENS - hit, 0, hit)
    read = [
        engine["stats"]["storage_read_bytes"] - before[name]["stats"]["storage_read_bytes"]
        for name, engine in after.items()
    ]
    assert all(read)
    assert sum(read) == hit // 64 * pool.file_bytes
    assert _donated_bytes(pool) > donated


def test_many_requests_at_once(pool: Deployment, llama_reference: Reference) -> None:
    """Requests that donate to each other all get the right answers, and nothing stays in use."""
    warm = [_warm(pool, llama_reference, f"donors {idx}") for idx in range(4)]
    donated = _donated_bytes(pool)
    for _ in range(2):
        answers = pool.ask_all([prompt for prompt, _ in warm], 10)
        assert [answer.tokens for answer in answers] == [expected for _, expected in warm]
    pool.expect_clean()
    assert _donated_bytes(pool) > donated


def test_a_donor_killed_in_the_middle(pool: Deployment, llama_reference: Reference) -> None:
    """Its part is read by another, the answer is right, and a new mover of it donates again."""
    prompt, expected = _warm(pool, llama_reference, "donor killed")
    mover = _serving(pool)[_DONOR]["pid"]
    os.kill(mover, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(pool.ask, prompt, 10)
        try:
            wait_until(lambda: pool.transfers() == ["staging"], "a transfer that is staged", 5)
        finally:
            os.kill(mover, signal.SIGKILL)
        assert answer.result().tokens == expected

    def replaced() -> bool:
        donor = _serving(pool).get(_DONOR)
        return donor is not None and donor["pid"] != mover

    wait_until(replaced, "a new mover of the donor", 30)
    pool.expect_clean()
    donated = _donated_bytes(pool)
    assert pool.ask(prompt, 10).tokens == expected
    pool.expect_clean()
    assert _donated_bytes(pool) > donated
