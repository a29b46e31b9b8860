"""Who of a testbed used the CPU: processes by kind, from the kernel's accounts."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from vllm_dualpath.bench.testbed.network import namespaces, processes_in

_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_KINDS = (
    ("movers", "vllm_dualpath.mover"),
    ("engines", "VLLM::"),
    ("engines' servers", "vllm.entrypoints"),
    ("router", "vllm_dualpath.cli"),
    ("baselines' servers", "lmcache"),
    ("baselines' servers", "mooncake_master"),
    ("router", "vllm-router"),
    ("storage server", "glusterfsd"),
    ("storage clients", "glusterfs"),
)
_UTIME, _STIME = 11, 12
"""Columns of /proc/PID/stat after the command's name."""


def cpu_by_kind(testbed: str) -> dict[str, float]:
    """Seconds that the testbed's processes have used so far, by kind."""
    used: dict[str, float] = defaultdict(float)
    for namespace in namespaces(testbed):
        for pid in processes_in(namespace):
            kind, seconds = _process(pid)
            used[kind] += seconds
    return dict(used)


def _process(pid: int) -> tuple[str, float]:
    if pid == os.getpid():
        times = os.times()
        return "client", times.user + times.system
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace")
        columns = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return "other", 0.0  # it has ended
    kind = next((kind for kind, mark in _KINDS if mark in command), "other")
    return kind, (int(columns[_UTIME]) + int(columns[_STIME])) * _TICKS_S
