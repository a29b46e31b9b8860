"""Aborts, bad blocks and killed processes: the answer stays right, and nothing stays in use."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from .client import greedy, stream
from .deployment import Deployment, wait_until
from .models import BLOCK_TOKENS
from .prompts import token_ids
from .reference import Reference
from .stored_blocks import end_stuck, files_of, flip_byte, make_stuck, stored_by

_NUM_TOKENS = 300
_NUM_BLOCKS = 4
_ROLES = ("prefill", "decode")


def _warm(llama: Deployment, reference: Reference, name: str) -> list[int]:
    """A prompt whose blocks are stored."""
    prompt = token_ids(name, _NUM_TOKENS)
    assert llama.ask(prompt, 10).tokens == reference.tokens(prompt, 10)
    llama.drained()
    return prompt


def test_abort_in_mid_stream(llama: Deployment, llama_reference: Reference) -> None:
    """The client leaves after a few tokens; the engine stops, and the next request is right."""
    prompt = _warm(llama, llama_reference, "abort in mid-stream")
    with stream(llama.url, greedy(prompt, 400)) as chunks:
        assert next(chunks)
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)


@pytest.mark.parametrize(("role", "position"), [("prefill", 0), ("decode", 3)])
def test_abort_during_staging(
    llama: Deployment, llama_reference: Reference, role: str, position: int
) -> None:
    """The client leaves while one side's read is stuck: its slots are kept until that has ended."""
    prompt = _warm(llama, llama_reference, f"abort during staging {role}")
    stuck = files_of(llama.store, prompt)[position]
    make_stuck(stuck)
    with _request(llama, prompt):
        wait_until(lambda: llama.transfers() == ["staging"], "a transfer that is staged", 5)
        wait_until(lambda: llama.status(role)["stats"]["slots_used"] > 0, "slots in use", 5)
    wait_until(lambda: _is_ending(llama), "the end of the transfer", 5)
    time.sleep(1.5)  # more than a heartbeat
    assert llama.status(role)["stats"]["slots_used"] > 0
    end_stuck(stuck)
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)


@pytest.mark.parametrize("role", _ROLES)
def test_abort_while_a_mover_is_silent(
    llama: Deployment, llama_reference: Reference, role: str
) -> None:
    """The client leaves while a stopped mover has not answered yet."""
    prompt = _warm(llama, llama_reference, f"abort while silent {role}")
    with _stopped(llama.mover_pid(role)):
        with _request(llama, prompt):
            wait_until(lambda: bool(llama.transfers()), "an open transfer", 5)
        wait_until(lambda: _is_ending(llama), "the end of the transfer", 5)
    llama.wait_registered()
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)


def _is_ending(llama: Deployment) -> bool:
    return all(state.startswith("waiting for the end") for state in llama.transfers())


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """A process that stands still until the block is left."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _request(llama: Deployment, prompt: Sequence[int]) -> Iterator[None]:
    """A request under way; leaving the block closes its connection."""
    address = urlsplit(llama.url)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port)) as connection:
        body = json.dumps(greedy(prompt, 10))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        yield


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


def test_a_stuck_read(llama: Deployment, llama_reference: Reference) -> None:
    """Neither side's read of a block makes progress: the prompt is computed, within deadlines."""
    prompt = _warm(llama, llama_reference, "stuck read")
    llama.replace_router("split", "--deadline", "stage_s=1.5")
    stuck = files_of(llama.store, prompt)[0]
    make_stuck(stuck)
    before = llama.counters("prefill")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(llama.ask, prompt, 10).result(timeout=30)
    assert answer.tokens == llama_reference.tokens(prompt, 10)
    end_stuck(stuck)
    after, _ = llama.drained()
    assert (after - before).prompt == (_NUM_TOKENS, 0, 0)
    llama.replace_router("split")


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
            wait_until(lambda: bool(llama.transfers()), "an open transfer", 5)
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
    llama.wait_mover_replaced(role, killed)
    expected = reference.tokens(prompt, 10)
    assert llama.ask(prompt, 10).tokens == expected
    before = llama.drained()
    assert llama.ask(prompt, 10).tokens == expected
    after = llama.drained()
    assert (after[0] - before[0]).external == (len(prompt) - 1) // 64 * 64


@pytest.mark.parametrize("role", _ROLES)
def test_a_control_connection_that_breaks(
    llama: Deployment, llama_reference: Reference, role: str
) -> None:
    """What was sent meanwhile is lost, and nobody waits for it: long before any deadline."""
    prompt = _warm(llama, llama_reference, f"connection breaks {role}")
    mover = llama.mover_pid(role)
    with ThreadPoolExecutor(1) as pool:
        with _stopped(mover):
            _cut_connections_of(llama, mover)
            answer = pool.submit(llama.ask, prompt, 10)
            wait_until(lambda: bool(llama.transfers()), "an open transfer", 5)
        assert answer.result(timeout=30).tokens == llama_reference.tokens(prompt, 10)
    llama.wait_registered()
    assert llama.mover_pid(role) == mover
    assert llama.drained()


def _cut_connections_of(llama: Deployment, mover: int) -> None:
    """Reset the mover's connection to the router, at the router's end."""
    port = llama.control.rpartition(":")[2]
    listed = subprocess.run(
        ["ss", "-Htnp", "dport", "=", f":{port}"], capture_output=True, text=True, check=True
    )
    (line,) = (line for line in listed.stdout.splitlines() if f"pid={mover}," in line)
    own_port = line.split()[3].rpartition(":")[2]
    cut = subprocess.run(
        ["ss", "-K", "-Htn", "dport", "=", f":{own_port}"], capture_output=True, text=True
    )
    if not cut.stdout.strip():
        pytest.skip(f"this kernel or user may not reset a connection: {cut.stderr.strip()}")


def test_router_killed_under_load(llama: Deployment, llama_reference: Reference) -> None:
    """Its clients lose their connections; slots come back, and a new router serves at once."""
    prompt = _warm(llama, llama_reference, "router killed")
    with stream(llama.url, greedy(prompt, 200)) as chunks:
        assert next(chunks)
        llama.replace_router("split")
    llama.expect_clean()
    assert llama.ask(prompt, 10).tokens == llama_reference.tokens(prompt, 10)
