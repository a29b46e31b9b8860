"""Copies that take their time: nothing is reused, reported or read before they are done."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tests.connector.engine import NUM_LAYERS, Engine, key_of, use_copies
from vllm_dualpath.connector.copies import HostCopies
from vllm_dualpath.messages import Saved

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


class SlowCopies(HostCopies):
    """Carries out no urgent copy before the forward thread waits for it, or a while has passed."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._held: list[partial[object]] = []
        self._tickets: list[object] = []
        self._timers: list[threading.Timer] = []

    def submit(self, *arguments, **options):
        return self._hold(partial(super().submit, *arguments, **options))

    def submit_barrier(self):
        self._hold(super().submit_barrier)

    def submit_layers(self, rows, *, load):
        return [self.submit(rows, each, each + 1, load=load) for each in range(rows.num_layers)]

    def hold_forward(self, mark):
        return 0.0 if mark is None else super().hold_forward(self._release(mark))

    def close(self):
        for timer in self._timers:
            timer.join()
        super().close()

    def _hold(self, submit):
        with self._lock:
            self._held.append(submit)
            number = len(self._tickets) + len(self._held)
        self._timers.append(threading.Timer(self._delay_s, self._release, (number,)))
        self._timers[-1].start()
        return number

    def _release(self, number):
        with self._lock:
            while len(self._tickets) < number:
                self._tickets.append(self._held.pop(0)())
            return self._tickets[number - 1]


@pytest.fixture
def slow(engine):
    """An engine whose worker has slow copies."""

    def make(role: str, delay_s: float, **options: object) -> Engine:
        e = engine(role, **options)
        use_copies(e, SlowCopies(delay_s))
        return e

    return make


def test_preempted_pages_are_saved_before_they_are_overwritten(slow):
    """A chunk is being saved when its request loses its pages to another one: the right bytes
    arrive.
    """
    e = slow("prefill", 0.3, num_blocks=13, max_num_batched_tokens=24)
    params = e.mover.publish(e.root, PROMPT, 0, SLOTS)
    e.add("r", PROMPT, 1, params)
    e.step()
    e.preempt("r")
    e.abort("r")
    e.scheduler.reset_prefix_cache()
    e.add("other", [60 + i % 20 for i in range(40)], 1)
    e.run()
    saved = e.mover.saved_pages(key_of(params))
    assert saved == {(layer, page): 1 for layer in range(NUM_LAYERS) for page in range(6)}
    e.check_staged(PROMPT[:24], SLOTS, 0)
    e.check_ended()


def test_saved_is_said_after_the_copy(slow):
    """Whoever hears that a page was saved finds it there."""
    e = slow("prefill", 0.1)
    params = e.mover.publish(e.root, PROMPT, 0, SLOTS)
    e.add("r", PROMPT, 1, params)
    e.step()
    e.mover.wait_for(Saved, NUM_LAYERS)
    e.check_staged(PROMPT, SLOTS, 0)
    e.run()
    e.check_ended()


def test_loads_are_waited_for_layer_by_layer(slow):
    """A layer's attention finds the pages of its load, however late the copy comes."""
    e = slow("prefill", 0.3)
    e.stage(PROMPT, SLOTS, 32)
    e.add("r", PROMPT, 1, e.mover.publish(e.root, PROMPT, 4, SLOTS))
    e.run(8000)
    e.check_output("r", 1)
    e.check_ended()


def test_finished_requests_keep_their_pages_until_stored(slow):
    """A decode engine's request has ended and its blocks are still being copied to be stored."""
    e = slow("decode", 0.2, num_blocks=16)
    e.add("r", PROMPT, 8)
    e.run(8000)
    e.add("other", [60 + i % 20 for i in range(40)], 8)
    e.run(8000)
    e.check_output("r", 8)
    e.check_output("other", 8)
    e.check_ended()
