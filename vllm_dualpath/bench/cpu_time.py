"""CPU time of threads, by the scheduler's own clock."""

from __future__ import annotations

from pathlib import Path


def thread_seconds(pid: int) -> dict[int, float]:
    """Of each thread of a process so far, by id. Raises ``FileNotFoundError`` if it has ended."""
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            used[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread has ended
    return used
