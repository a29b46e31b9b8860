"""With a real mover and a real store: what was computed once is loaded, also after a crash."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.connector.engine import Engine

PROMPT = list(range(1, 43))


class NoScriptedMover:
    """Stands where other tests have a scripted mover."""

    alive = False
    entries: dict[object, int] = {}

    def die(self) -> None:
        """The real one ends with its engine."""


class RealEngine(Engine):
    """Leaves it to the connector to start its mover."""

    def new_mover(self) -> NoScriptedMover:  # type: ignore[override]
        os.close(self._lock_fd)
        self._lock_fd = os.open(os.devnull, os.O_RDONLY)
        return NoScriptedMover()

    @property
    def connections(self) -> list:
        return [self.side._mover.connection, self.worker._worker.side._mover.connection]

    @property
    def pid(self) -> int:
        return self.worker._worker.side._mover._process._process.pid

    def num_loaded(self, request_id: str) -> int:
        """Run a request to its end; returns how many of its tokens came from the store."""
        counters = self.side.recorder._counters
        self.add(request_id, PROMPT, 8)
        step = self.schedule()
        num_tokens = counters["vllm:dualpath_hit_tokens|"]
        self.update(step, self.execute(step))
        self.run(8000)
        self.check_output(request_id, 8)
        return num_tokens


@pytest.fixture
def real_engine(tmp_path: Path) -> Iterator[RealEngine]:
    store = tmp_path / "store"
    store.mkdir()
    settings = {"store": f"file://{store}", "deadlines": {"attach_s": 60, "stage_s": 30}}
    engine = RealEngine(tmp_path, "both", persist=False, extra=settings)
    engine.wait(lambda: engine.side._mover.view.persist_slots, 10)
    yield engine
    engine.close()


def test_stored_once_loaded_later_and_after_a_crash(real_engine):
    """Stored, dropped from the prefix cache, loaded; the mover is killed, its successor loads."""
    e = real_engine
    assert e.num_loaded("first") == 0
    e.wait(lambda: len(e.side._mover.view.index) >= 4, 20)
    e.wait(lambda: len(e.side._mover.view.persist_slots) >= 4, 20)
    assert e.scheduler.reset_prefix_cache()
    assert e.num_loaded("second") == 32
    e.wait(lambda: len(e.side._mover.view.index) >= 5, 20)

    pid = e.pid
    os.kill(pid, signal.SIGKILL)
    e.wait(lambda: all(c.boot_id is None for c in e.connections))
    assert e.scheduler.reset_prefix_cache()
    assert e.num_loaded("without") == 0
    e.wait(lambda: all(c.boot_id is not None for c in e.connections), 40)
    assert e.pid != pid
    e.wait(lambda: len(e.side._mover.view.index) >= 5, 20)
    assert e.scheduler.reset_prefix_cache()
    assert e.num_loaded("again") == 40
    assert e.num_free_blocks == e.cache_config.num_blocks - 1
