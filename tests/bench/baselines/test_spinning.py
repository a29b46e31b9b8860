"""A thread that polls without pause gives way, one that sleeps does not."""

from __future__ import annotations

import os
import subprocess
import sys

from vllm_dualpath.bench.baselines.spinning import give_way

SPINS = "while True: pass"
SLEEPS = "import time; time.sleep(60)"


def priority_of(program: str) -> tuple[int, int]:
    """How many threads gave way, and the process's priority then."""
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        return give_way([child.pid]), os.getpriority(os.PRIO_PROCESS, child.pid)
    finally:
        child.kill()
        child.wait()


def test_what_spins_gets_the_lowest_priority() -> None:
    assert priority_of(SPINS) == (1, 19)


def test_what_sleeps_keeps_its_own() -> None:
    assert priority_of(SLEEPS) == (0, os.getpriority(os.PRIO_PROCESS, 0))
