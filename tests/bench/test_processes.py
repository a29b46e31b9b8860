"""Child processes: stopped in order, killed when they do not end, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard, stop_all
from vllm_dualpath.control.host import process_start_ticks
from vllm_dualpath.errors import LaunchError

# Starts a child of its own, says both pids, and waits. It ends on SIGTERM unless told to be deaf.
PARENT = """
import signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def guard() -> Iterator[ProcessGuard]:
    guard = ProcessGuard()
    yield guard
    guard.close()


def parent(tmp_path: Path, guard: ProcessGuard, *arguments: str) -> ManagedProcess:
    command = [sys.executable, "-c", PARENT, *arguments]
    return ManagedProcess("parent", command, tmp_path / "parent.log", guard)


def alive(pid: int) -> bool:
    return process_start_ticks(pid) is not None


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


def child_pid(log_path: Path) -> int:
    wait_for(lambda: log_path.exists() and log_path.read_text().strip() != "")
    return int(log_path.read_text())


def test_stop_ends_the_whole_group(tmp_path: Path, guard: ProcessGuard) -> None:
    """A child that the process left running is ended too, and its exit code is kept."""
    process = parent(tmp_path, guard)
    process.start()
    child = child_pid(process.log_path)
    process.stop()
    assert process.exit_code == -signal.SIGTERM
    wait_for(lambda: not alive(child))
    process.stop()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, guard: ProcessGuard) -> None:
    """After the grace period there is SIGKILL."""
    process = parent(tmp_path, guard, "deaf")
    process.start()
    child = child_pid(process.log_path)
    stop_all([process], grace_s=0.2)
    assert process.exit_code == -signal.SIGKILL
    wait_for(lambda: not alive(child))


def test_a_process_can_be_started_again(tmp_path: Path, guard: ProcessGuard) -> None:
    """After a death the same command runs again; the log goes on."""
    command = [sys.executable, "-c", "print('once'); raise SystemExit(3)"]
    process = ManagedProcess("short", command, tmp_path / "short.log", guard)
    for _ in range(2):
        process.start()
        wait_for(lambda: not process.alive)
        assert process.exit_code == 3
        process.stop()
    assert process.log_tail().split() == ["once", "once"]


def test_a_missing_program_is_a_launch_error(tmp_path: Path, guard: ProcessGuard) -> None:
    """The message names the process."""
    process = ManagedProcess("ghost", ["/nonexistent"], tmp_path / "ghost.log", guard)
    with pytest.raises(LaunchError, match="ghost"):
        process.start()


LAUNCHER = """
import sys, time
from pathlib import Path
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard
process = ManagedProcess("parent", [sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]),
                         ProcessGuard())
process.start()
print(process.pid, flush=True)
time.sleep(60)
"""


def test_children_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """SIGKILL gives the launcher no chance: the guard ends its children and grandchildren."""
    log_path = tmp_path / "parent.log"
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(log_path), PARENT], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        process = int(launcher.stdout.readline())
        grandchild = child_pid(log_path)
        assert alive(process)
        assert alive(grandchild)
        os.kill(launcher.pid, signal.SIGKILL)
    wait_for(lambda: not alive(process) and not alive(grandchild))
