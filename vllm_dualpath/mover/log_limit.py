"""A flood of warnings of one kind says no more than the first of them and their number."""

from __future__ import annotations

import logging
import time

_MOST = 20
_WINDOW_S = 30.0


class RepeatLimit(logging.Filter):
    """For a handler: at most so many records a window of each place in the code.

    The first one after a window in which some were left out says how many. A store that fails lets
    every block of every request fail: thousands of lines an hour that say the same.
    """

    def __init__(self, most: int = _MOST, window_s: float = _WINDOW_S) -> None:
        super().__init__()
        self._most = most
        self._window_s = window_s
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}
        """When the window of a place began, and its records since."""

    def filter(self, record: logging.LogRecord) -> bool:
        place, now_s = (record.pathname, record.lineno), time.monotonic()
        began_s, count = self._seen.get(place, (now_s, 0))
        if now_s - began_s > self._window_s:
            if count > self._most:
                left_out = f"{count - self._most} more like this were left out"
                record.msg, record.args = f"{record.getMessage()} ({left_out})", ()
            began_s, count = now_s, 0
        self._seen[place] = (began_s, count + 1)
        return count < self._most
