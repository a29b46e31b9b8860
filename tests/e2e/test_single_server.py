"""One server without a router: a persistent KV cache, before and after a restart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vllm_dualpath.bench.servers import SingleEngine

from .client import complete, complete_all, greedy
from .counters import scrape
from .deployment import DRAIN_S, wait_until
from .models import BLOCK_TOKENS, COMMON_ARGS, NO_PREFIX_CACHING, hit_tokens
from .prompts import token_ids
from .reference import Reference
from .stored_blocks import files_of, flip_byte

_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_CORRUPT = "vllm:dualpath_corrupt_blocks_total"
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_NUM_TOKENS = 389
_REPORT_S = 0.3


class Single:
    """A server with our connector alone; may be started again over its store."""

    def __init__(self, model_dir: Path, store: Path, log_dir: Path) -> None:
        self.store = store
        self._model_dir = model_dir
        self._log_dir = log_dir
        self.engine = self._launched()

    def _launched(self) -> SingleEngine:
        self._num_pokes = 0
        engine = SingleEngine(
            self._model_dir,
            f"file://{self.store}",
            {"staging_bytes": 64 << 20, "persist_slots": 64},
            engine_args=(*COMMON_ARGS, *NO_PREFIX_CACHING),
            log_dir=self._log_dir,
        )
        engine.launch()
        return engine

    def restart(self) -> None:
        self.engine.stop()
        self.engine = self._launched()
        self.engine.wait_ready()

    @property
    def url(self) -> str:
        return self.engine.url

    def ask(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        return complete(self.url, greedy(prompt, num_tokens)).tokens

    def prompt_tokens(self) -> list[int]:
        """Computed (without those of ``expect_clean``), local, external, so far."""
        samples = scrape(self.url)
        computed, *others = (int(samples.value(_BY_SOURCE, source)) for source in _SOURCES)
        return [computed - self._num_pokes, *others]

    def expect_stored(self, prompt: list[int]) -> None:
        """Wait until every full block of ``prompt`` is in the store."""
        num_blocks = len(prompt) // BLOCK_TOKENS
        wait_until(
            lambda: len(files_of(self.store, prompt)) == num_blocks, "blocks stored", DRAIN_S
        )

    def expect_clean(self) -> None:
        """Fail unless all slots, blocks and requests are free within ``DRAIN_S``.

        vLLM reports only in its steps, so that each look is preceded by a request of one token,
        and a second one confirms the first: the mover's numbers arrive a little later.
        """
        deadline_s = time.monotonic() + DRAIN_S
        for _ in range(2):
            time.sleep(_REPORT_S)
            while leaks := self._leaks():
                assert time.monotonic() < deadline_s, f"in use {DRAIN_S:.0f} s after: {leaks}"
                time.sleep(0.05)

    def _leaks(self) -> dict[str, object]:
        self.ask([0], 1)
        self._num_pokes += 1
        samples = scrape(self.url)
        found: dict[str, object] = {
            name: samples.value(f"vllm:{name}")
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        for state in ("used", "quarantined"):
            # The mover's first report may not have reached vLLM yet.
            slots = samples.values.get(("vllm:dualpath_staging_slots", state))
            found[state] = "unknown" if slots is None else slots
        return {name: value for name, value in found.items() if value}


@pytest.fixture(scope="module")
def running(
    qwen3_plain: object, qwen3_dir: Path, log_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Single]:
    single = Single(qwen3_dir, tmp_path_factory.mktemp("single-store"), log_root / "single")
    try:
        single.engine.wait_ready()
        yield single
    finally:
        single.engine.stop()


@pytest.fixture
def single(running: Single) -> Iterator[Single]:
    yield running
    running.expect_clean()


def _delta(single: Single, prompt: list[int], expected: tuple[int, ...]) -> list[int]:
    """Ask; how many prompt tokens were computed, local, external."""
    before = single.prompt_tokens()
    assert single.ask(prompt, len(expected)) == expected
    single.expect_clean()
    return [a - b for a, b in zip(single.prompt_tokens(), before, strict=True)]


def test_before_and_after_a_restart(single: Single, qwen3_reference: Reference) -> None:
    """Cold, warm, and warm in a new process: plain vLLM's tokens, and the hit is counted."""
    prompt = token_ids("single", _NUM_TOKENS)
    expected = qwen3_reference.tokens(prompt, 12)
    assert _delta(single, prompt, expected) == [_NUM_TOKENS, 0, 0]
    single.expect_stored(prompt)
    hit = hit_tokens(_NUM_TOKENS, _NUM_TOKENS)
    assert _delta(single, prompt, expected) == [_NUM_TOKENS - hit, 0, hit]
    single.restart()
    assert _delta(single, prompt, expected) == [_NUM_TOKENS - hit, 0, hit]


def test_generated_blocks_are_stored(single: Single, qwen3_reference: Reference) -> None:
    """The second turn hits what the first one generated."""
    prompt = token_ids("single generated", 100)
    expected = qwen3_reference.tokens(prompt, 120)
    _delta(single, prompt, expected)
    known = [*prompt, *expected][:-1]
    single.expect_stored(known)
    second = [*prompt, *expected, *token_ids("single second", 40)]
    counted = _delta(single, second, qwen3_reference.tokens(second, 8))
    assert counted == [len(second) - 192, 0, 192]


def test_many_at_once(single: Single, qwen3_reference: Reference) -> None:
    """Six prompts, cold and then warm together."""
    prompts = [token_ids(f"single many {idx}", 130 + 40 * idx) for idx in range(6)]
    expected = [qwen3_reference.tokens(prompt, 16) for prompt in prompts]
    for _ in range(2):
        answers = complete_all(single.url, [greedy(prompt, 16) for prompt in prompts])
        assert [answer.tokens for answer in answers] == expected
        for prompt in prompts:
            single.expect_stored(prompt)
        single.expect_clean()


def test_a_flipped_byte(single: Single, qwen3_reference: Reference) -> None:
    """The hit ends before the bad block; the rest is recomputed."""
    prompt = token_ids("single flipped", _NUM_TOKENS)
    expected = qwen3_reference.tokens(prompt, 12)
    assert _delta(single, prompt, expected) == [_NUM_TOKENS, 0, 0]
    single.expect_stored(prompt)
    num_corrupt = scrape(single.url).value(_CORRUPT)
    flip_byte(files_of(single.store, prompt)[2])
    assert single.ask(prompt, 12) == expected
    single.expect_clean()
    assert scrape(single.url).value(_CORRUPT) == num_corrupt + 1
    single.expect_stored(prompt)
    hit = hit_tokens(_NUM_TOKENS, _NUM_TOKENS)
    assert _delta(single, prompt, expected) == [_NUM_TOKENS - hit, 0, hit]


def test_mover_killed(single: Single, qwen3_reference: Reference) -> None:
    """Without its mover the server computes; a new mover brings the hits back."""
    prompt = token_ids("single", _NUM_TOKENS)
    expected = qwen3_reference.tokens(prompt, 12)
    (mover,) = _mover_pids(single.engine.server.process.pid)
    os.kill(mover, signal.SIGKILL)
    assert single.ask(prompt, 12) == expected
    hit = hit_tokens(_NUM_TOKENS, _NUM_TOKENS)
    wait_until(
        lambda: _delta(single, prompt, expected) == [_NUM_TOKENS - hit, 0, hit], "hits again", 30
    )


def _mover_pids(server_pid: int) -> list[int]:
    """Movers that this server, or a process of it, has started."""
    descendants = psutil.Process(server_pid).children(recursive=True)
    return [each.pid for each in descendants if "vllm_dualpath.mover" in each.cmdline()]
