"""Aborts, bad blocks and killed processes: the answer stays right, and nothing stays in use."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from .client import greedy, stream
from .deployment import Deployment, wait_until
from .models import BLOCK_TOKENS
from .prompts import token_ids
from .reference import Reference
from .stored_blocks import flip_byte, stored_by

_NUM_TOKENS = 300
_NUM_BLOCKS = 4
_ROLES = ("prefill", "decode")


def _warm(llama: Deployment, reference: Reference, name: str) -> list[int]:
    """A prompt whose blocks are stored."""
    prompt = token_ids(name, _NUM_TOKENS)
    assert llama.ask(prompt, 10).tokens == reference.tokens(prompt, 10)
    llama.drained()
    return prompt


def _open_transfers(llama: Deployment) -> int:
    return len(llama.cluster.status()["transfers"])


def test_abort_in_mid_stream(llama: Deployment, llama_reference: Reference) -> None:
    """The client leaves after a few tokens; the engine stops, and the next request is right."""
    prompt = _warm(llama, llama_reference, "abort in mid-stream")
    with stream(llama.url, greedy(prompt, 400)) as chunks:
        assert next(chunks)
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)


@pytest.mark.parametrize("role", _ROLES)
def test_abort_during_staging(llama: Deployment, llama_reference: Reference, role: str) -> None:
    """The client leaves while a stopped mover keeps the transfer from being staged."""
    prompt = _warm(llama, llama_reference, f"abort during staging {role}")
    mover = llama.mover_pid(role)
    os.kill(mover, signal.SIGSTOP)
    try:
        _send_and_leave(llama, prompt)
    finally:
        os.kill(mover, signal.SIGCONT)
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)


def _send_and_leave(llama: Deployment, prompt: Sequence[int]) -> None:
    """Send a request, close the connection as soon as its transfer is open."""
    address = urlsplit(llama.url)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port)) as connection:
        body = json.dumps(greedy(prompt, 10))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_until(lambda: _open_transfers(llama) > 0, "an open transfer", 5)


@pytest.mark.parametrize("position", range(_NUM_BLOCKS))
def test_a_flipped_byte_is_found_and_recomputed(
    llama: Deployment, llama_reference: Reference, position: int
) -> None:
    """The hit ends before the bad block, whichever side reads it; then the block is good again."""
    prompt = token_ids(f"flipped byte {position}", _NUM_TOKENS)
    expected = llama_reference.tokens(prompt, 10)
    files = stored_by(llama, prompt)
    assert len(files) == _NUM_BLOCKS
    flip_byte(files[position])
    before = llama.drained()
    assert llama.ask(prompt, 10).tokens == expected
    after = llama.drained()
    hit = position * BLOCK_TOKENS
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - hit, 0, hit)
    assert sum(a.corrupt - b.corrupt for a, b in zip(after, before, strict=True)) == 1
    assert llama.ask(prompt, 10).tokens == expected
    again = llama.drained()
    hit = _NUM_BLOCKS * BLOCK_TOKENS
    assert (again[0] - after[0]).prompt == (_NUM_TOKENS - hit, 0, hit)


def test_a_block_that_is_gone(llama: Deployment, llama_reference: Reference) -> None:
    """A file that somebody removed behind our back ends the hit."""
    prompt = token_ids("block gone", _NUM_TOKENS)
    files = stored_by(llama, prompt)
    files[2].unlink()
    before = llama.drained()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)
    after = llama.drained()
    assert (after[0] - before[0]).prompt == (_NUM_TOKENS - 128, 0, 128)


@pytest.mark.parametrize("role", _ROLES)
def test_a_mover_killed_in_mid_load(
    llama: Deployment, llama_reference: Reference, role: str
) -> None:
    """The request it was staging is answered right; a new mover is there soon, with hits."""
    prompt = _warm(llama, llama_reference, f"mover killed {role}")
    mover = llama.mover_pid(role)
    os.kill(mover, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(llama.ask, prompt, 10)
        try:
            wait_until(lambda: _open_transfers(llama) > 0, "an open transfer", 5)
        finally:
            os.kill(mover, signal.SIGKILL)
        assert answer.result().tokens == llama_reference.tokens(prompt, 10)
    _expect_hits_again(llama, llama_reference, role, mover, prompt)


@pytest.mark.parametrize("role", _ROLES)
def test_a_mover_killed_under_load(
    llama: Deployment, llama_reference: Reference, role: str
) -> None:
    """Six requests are under way, at whatever point each is; all are answered right."""
    prompts = [token_ids(f"under load {role} {idx}", 260 + idx) for idx in range(6)]
    expected = [llama_reference.tokens(prompt, 30) for prompt in prompts]
    mover = llama.mover_pid(role)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(llama.ask_all, prompts, 30)
        time.sleep(0.5)
        os.kill(mover, signal.SIGKILL)
        assert [answer.tokens for answer in answers.result()] == expected
    _expect_hits_again(llama, llama_reference, role, mover, prompts[0])


def _expect_hits_again(
    llama: Deployment, reference: Reference, role: str, killed: int, prompt: Sequence[int]
) -> None:
    llama.wait_registered()
    wait_until(lambda: llama.mover_pid(role) != killed, f"a new {role} mover", 30)
    llama.wait_registered()
    expected = reference.tokens(prompt, 10)
    assert llama.ask(prompt, 10).tokens == expected
    before = llama.drained()
    assert llama.ask(prompt, 10).tokens == expected
    after = llama.drained()
    assert (after[0] - before[0]).external == (len(prompt) - 1) // 64 * 64


def test_router_killed_under_load(llama: Deployment, llama_reference: Reference) -> None:
    """Its clients lose their connections; slots come back, and a new router serves at once."""
    prompt = _warm(llama, llama_reference, "router killed")
    with stream(llama.url, greedy(prompt, 200)) as chunks:
        assert next(chunks)
        llama.replace_router("split")
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)
