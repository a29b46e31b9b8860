"""Identity of hosts and processes: the basis of every "that writer is dead" proof on one host."""

from __future__ import annotations

from pathlib import Path

_START_TIME_FIELD = 22


def host_id() -> str:
    """Equal for two processes only if they share a kernel and a pid namespace.

    Such processes can see each other's pids and reach each other's memory (CMA).
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{boot}/{namespace}"


def process_start_ticks(pid: int) -> int | None:
    """Start time of ``pid`` in clock ticks since boot; ``None`` if there is no such process.

    A zombie counts as gone: its memory is.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and parentheses: count fields after the last ')'.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[_START_TIME_FIELD - 3])


def process_alive(pid: int, start_ticks: int) -> bool:
    """Whether the very process that started at ``start_ticks`` still runs under ``pid``."""
    return process_start_ticks(pid) == start_ticks
