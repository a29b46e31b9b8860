"""Copies that take their time: nothing is reused, reported or read before they are done."""

from __future__ import annotations

import threading

import pytest

from tests.connector.engine import NUM_LAYERS, Engine, key_of
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
        self._held: list[tuple[object, range, bool]] = []
        self._tickets: list[object] = []

    def submit(self, rows, layers, *, load):
        with self._lock:
            self._held.append((rows, layers, load))
            return len(self._tickets) + len(self._held)

    def submit_layers(self, rows, *, load):
        layers = range(rows.num_layers)
        return [self.submit(rows, range(each, each + 1), load=load) for each in layers]

    def hold_forward(self, mark):
        return 0.0 if mark is None else super().hold_forward(self._release(mark))

    def wait(self, mark):
        if mark is None:
            return
        if threading.current_thread().name == "dualpath-copies":
            threading.Event().wait(self._delay_s)
            mark = self._release(mark)
        super().wait(mark)

    def _release(self, mark):
        with self._lock:
            while len(self._tickets) < mark:
                rows, layers, load = self._held.pop(0)
                self._tickets.append(super().submit(rows, layers, load=load))
            return self._tickets[mark - 1]


@pytest.fixture
def slow(engine):
    """An engine whose worker has slow copies."""

    def make(role: str, delay_s: float, **options: object) -> Engine:
        e = engine(role, **options)
        side = e.worker._worker.side
        side._engine.close()
        copies = SlowCopies(delay_s)
        side._engine = side._batches._engine = copies
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
