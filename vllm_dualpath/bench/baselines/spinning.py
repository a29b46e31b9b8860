"""Threads that spin while there is nothing to do, and what is done about them.

NIXL's progress thread polls without pause. On a cluster that costs each node a core which it has;
here all nodes share this machine's cores, and two such threads would take them from the engines.
With the lowest priority they run on what nobody else wants.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from vllm_dualpath.bench.cpu_time import thread_seconds

_WATCH_S = 2.0
_SPINS = 0.25
"""Of a core, by a thread of a system that serves nobody: two that share one core have half each."""
_LOWEST = 19


def give_way(sessions: Iterable[int]) -> int:
    """Lower the priority of threads that use the CPU although nobody asks anything of them.

    Of all processes in sessions that these led. Returns how many there are.
    """
    watched = _members(set(sessions))
    before = _used_s(watched)
    time.sleep(_WATCH_S)
    after = _used_s(watched)
    spinning = [
        thread for thread, used in after.items() if used - before.get(thread, 0) > _SPINS * _WATCH_S
    ]
    for thread in spinning:
        try:
            os.setpriority(os.PRIO_PROCESS, thread, _LOWEST)
        except ProcessLookupError:
            continue  # it has ended
    return len(spinning)


def _members(sessions: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) in sessions:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue  # it has ended
    return found


def _used_s(pids: Iterable[int]) -> dict[int, float]:
    """CPU seconds of each thread so far."""
    used: dict[int, float] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # it has ended
            used |= thread_seconds(pid)
    return used
