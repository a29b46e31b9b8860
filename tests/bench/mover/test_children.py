from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.channel import Child, close_all
from vllm_dualpath.bench.mover.puts import PutPair, PutPlan, measure_puts
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.errors import LaunchError

PLAN = PutPlan(links=("shm",), piece_bytes=(1 << 20,), variants=("ours",), budget=Budget(0.0, 1))


@pytest.fixture
def guard() -> Iterator[ProcessGuard]:
    made = ProcessGuard()
    yield made
    made.close()


def children() -> set[int]:
    """Processes that this one started and has not waited for."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return set(map(int, listed.split()))


def test_a_call_is_answered_and_closing_ends_the_child(guard: ProcessGuard, tmp_path: Path) -> None:
    """Also while it is stopped, and twice."""
    child = Child("storage", tmp_path / "log", guard)
    assert child.call("crc32c_gb_per_s", 4096, 0.01) > 0
    child.pause()
    child.close()
    child.close()
    assert child.pid not in children()


def test_an_error_in_a_child_is_told_with_its_words(guard: ProcessGuard, tmp_path: Path) -> None:
    """The child goes on: another call is answered."""
    child = Child("storage", tmp_path / "log", guard)
    with pytest.raises(LaunchError, match="storage: KeyError: 'no such model'"):
        child.call("open", str(tmp_path), "no such model", 1, 1)
    assert child.call("crc32c_gb_per_s", 4096, 0.01) > 0
    child.close()


def test_a_child_that_hangs_or_dies_ends_the_wait(guard: ProcessGuard, tmp_path: Path) -> None:
    """Stopped: the deadline. Killed: at once, and so is a later call."""
    child = Child("storage", tmp_path / "log", guard)
    child.call("crc32c_gb_per_s", 4096, 0.01)
    child.pause()
    with pytest.raises(LaunchError, match="did not answer"):
        child.call("crc32c_gb_per_s", 4096, 0.01, timeout_s=0.2)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LaunchError, match="storage: "):
        child.receive()
    with pytest.raises(LaunchError, match="storage: "):
        child.call("crc32c_gb_per_s", 4096, 0.01)
    close_all([child])
    assert child.pid not in children()


def test_no_child_is_left_when_a_measurement_fails(guard: ProcessGuard, tmp_path: Path) -> None:
    """One side of a pair is killed in mid-measurement: an error, and both are gone."""
    Child("storage", tmp_path / "log", guard).close()  # so that the guard itself is there
    before = children()

    def kill_one() -> None:
        os.kill(min(children() - before), signal.SIGKILL)

    plan = PutPlan(("shm",), (1 << 20,), ("ours",), Budget(60.0, 3))
    with pytest.raises(LaunchError, match="ours-"):
        measure_puts(plan, tmp_path, guard, kill_one)
    assert children() == before


def test_bytes_that_do_not_arrive_are_an_error(guard: ProcessGuard, tmp_path: Path) -> None:
    """A turn compares the target's memory with what should be in it."""
    pair = PutPair("ours", "shm", PLAN, tmp_path, guard)
    expected: dict[int, int] = {}
    pair.connect(PLAN.piece_bytes, expected)
    assert pair.turn(1 << 20, 1) > 0
    expected[1 << 20] ^= 1
    with pytest.raises(LaunchError, match="expected CRC32C"):
        pair.turn(1 << 20, 1)
    pair.close()


def test_a_stopped_pair_uses_no_cpu(guard: ProcessGuard, tmp_path: Path) -> None:
    """The plain loop's target spins; between its turns it must not."""
    pair = PutPair("raw", "shm", PLAN, tmp_path, guard)
    pair.connect(PLAN.piece_bytes, {})
    stat = Path(f"/proc/{pair.target.pid}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().split()[2] != "T":  # a signal takes its time
        assert time.monotonic() < deadline, stat.read_text()
        time.sleep(0.01)
    before = stat.read_text().split()[13:15]
    time.sleep(0.3)
    assert stat.read_text().split()[13:15] == before
    pair.close()
