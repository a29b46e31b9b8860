"""Ends a launcher's processes when the launcher itself is gone, however it died.

Run as ``python -m vllm_dualpath.bench.guard``. Reads ``+PGID`` and ``-PGID`` lines; when its
standard input closes, the process groups still listed are terminated, and killed after a grace
period. A process of its own and not ``PR_SET_PDEATHSIG``: that signal follows the thread that
started a child, not the process, and misses grandchildren.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

GRACE_S = 5.0
_POLL_S = 0.1


def signal_group(pgid: int, signum: int) -> bool:
    """Send ``signum`` (0 only asks) to a process group; False if it is gone."""
    try:
        os.killpg(pgid, signum)
    except ProcessLookupError:
        return False
    return True


def wait_groups_gone(pgids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait until the groups are empty; returns those that are not after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    left = [pgid for pgid in pgids if signal_group(pgid, 0)]
    while left and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        left = [pgid for pgid in left if signal_group(pgid, 0)]
    return left


def main() -> None:
    """Collect groups until the launcher is gone, then end them."""
    # A terminal's Ctrl-C is for the launcher, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        pgid = int(line[1:])
        if line[0] == "+":
            groups.add(pgid)
        else:
            groups.discard(pgid)
    for pgid in groups:
        signal_group(pgid, signal.SIGTERM)
    for pgid in wait_groups_gone(groups, GRACE_S):
        with contextlib.suppress(PermissionError):
            signal_group(pgid, signal.SIGKILL)


if __name__ == "__main__":
    main()
