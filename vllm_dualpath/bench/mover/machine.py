"""What was measured on: nothing about a figure can be compared without it."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path
from typing import Any

from vllm_dualpath import __version__, native
from vllm_dualpath.bench.mover import fio

_STEAL_FIELD = 8


def describe_machine(directory: Path, cores: tuple[int, int] | None) -> dict[str, Any]:
    """CPU, kernel, file system, and the versions of what was compared."""
    ucx = native.ucx_report()
    return {
        "version": __version__,
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "ucx": {"version": ucx.version, "path": ucx.path, "transports": list(ucx.transports)},
        "crc32c": native.crc32c_implementation(),
        "file_system": _file_system(directory),
        "fio": fio.fio_version() if fio.is_installed() else None,
        "cores": list(cores) if cores else None,
        "garbage_collector": "off in the measuring processes"
        + ("" if gc.isenabled() else " and here"),
    }


def cpu_times() -> list[int]:
    """Clock ticks of all CPUs by state, since boot."""
    return [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def steal_share(before: list[int], after: list[int]) -> float:
    """How much of the machine's time its hypervisor gave to others meanwhile."""
    passed = [late - early for early, late in zip(before, after, strict=True)]
    return passed[_STEAL_FIELD - 1] / max(1, sum(passed[:_STEAL_FIELD]))


def cpu_model() -> str:
    """As the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    """Type and source of the mount that holds ``directory``."""
    best, found = "", "unknown"
    path = str(directory.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        source, mount, kind = line.split()[:3]
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, found = mount, f"{kind} on {source}"
    return found
