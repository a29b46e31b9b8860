"""No exception leaves a hook, and every answer is one that vLLM can bear."""

from __future__ import annotations

import pytest

from tests.connector.engine import key_of
from vllm_dualpath.connector.guard import GuardedScheduler, GuardedWorker
from vllm_dualpath.connector.metadata import DualPathMetadata
from vllm_dualpath.connector.stats import Recorder

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


class Broken:
    """A side whose every hook raises."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def __getattr__(self, name: str):
        def hook(*_args):
            raise RuntimeError(name)

        return hook


class Answering(Broken):
    """A side that answers what it is told to."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def matched(self, *_args):
        return self.answer

    def results(self, *_args):
        return self.answer


class Prompt:
    num_prompt_tokens = 40


def test_worker_hooks_swallow_and_count():
    """Each hook gives its safe answer; failures are counted, the first of a kind is logged."""
    side = Broken()
    worker = GuardedWorker(side)
    worker.bind(DualPathMetadata())
    worker.start_loads()
    worker.wait_for_layer("l")
    worker.save_layer("l")
    worker.finish_saves()
    worker.fence()
    assert worker.results({"r"}) == (set(), set(), set())
    assert worker.take_invalid_blocks() == set()
    assert worker.take_stats() is None
    worker.shutdown()
    assert side.recorder._counters["vllm:dualpath_load_failures|hook_error"] == 13


def test_scheduler_hooks_swallow_and_count():
    """The scheduler's hooks as well."""
    side = Broken()
    scheduler = GuardedScheduler(side)
    assert scheduler.matched(Prompt(), 0) == (0, False)
    assert scheduler.finished(Prompt(), []) is False
    assert scheduler.has_pending_work() is False
    assert scheduler.reset() is False
    scheduler.update(None)
    assert scheduler.take_stats() is None
    scheduler.shutdown()
    assert side.recorder._counters["vllm:dualpath_load_failures|hook_error"] == 7


@pytest.mark.parametrize(
    ("answer", "local", "expected"),
    [
        ((16, False), 0, (16, False)),
        ((40, True), 0, (40, True)),
        ((40, False), 0, (0, False)),
        ((24, False), 16, (0, False)),
        ((23, False), 16, (23, False)),
        ((41, True), 0, (0, False)),
        ((-1, True), 0, (0, False)),
        ((0, True), 0, (0, False)),
        ((0, False), 60, (0, False)),
    ],
)
def test_hits_are_bounded(answer, local, expected):
    """A synchronous hit never covers the prompt, no hit exceeds it, zero is never asynchronous."""
    side = Answering(answer)
    assert GuardedScheduler(side).matched(Prompt(), local) == expected
    assert bool(side.recorder.take()) == (expected[0] != max(answer[0], 0) or answer[0] < 0)


def test_completions_are_reported_once_and_only_when_vllm_waits():
    """Unknown ids, early ids and repeats, each of which ends vLLM, are held back."""
    side = Answering(None)
    worker = GuardedWorker(side)
    side.bind = lambda _step: None
    step = DualPathMetadata(delayed_frees={"s"}, failed_loads=[("r", (1,))])
    worker.bind(step)
    side.answer = ({"s", "x"}, {"r", "y"}, {"r", "z"})
    assert worker.results(set()) == (set(), {"r"}, {"r"})
    side.answer = ({"s", "x"}, {"r", "y"}, {"r"})
    assert worker.results({"s", "x"}) == ({"s"}, set(), set())
    side.answer = ({"s"}, set(), set())
    assert worker.results({"s"}) == (set(), set(), set())


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
@pytest.mark.parametrize("hook", ["add_saves", "add_persists", "update", "matched", "finished"])
def test_engine_lives_with_a_broken_scheduler_hook(engine, monkeypatch, role, hook):
    """VLLM's scheduler goes on, requests end, whichever of our hooks raises."""
    e = engine(role)

    def broken(*_args):
        raise RuntimeError(hook)

    monkeypatch.setattr(e.side, hook, broken)
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.add("r", PROMPT, 3, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    e.run(4000)
    e.check_output("r", 3)
    assert e.num_free_blocks == e.cache_config.num_blocks - 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_load_that_cannot_be_ordered_fails_aloud(engine, monkeypatch, role):
    """An exception when a hit is taken must not leave vLLM waiting, or computing on garbage."""
    e = engine(role)

    def broken(*_args):
        raise RuntimeError("taken")

    monkeypatch.setattr(e.side._hits, "taken", broken)
    e.stage(PROMPT, SLOTS, len(PROMPT))
    params = e.mover.publish(e.root, PROMPT, 2, SLOTS)
    e.add("r", PROMPT, 3, params)
    e.run()
    e.check_output("r", 3)
    assert e.mover.num_claims(key_of(params)) == 1
    e.check_ended()
