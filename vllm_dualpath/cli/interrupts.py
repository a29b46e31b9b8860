"""Other ways to be told to end, for commands that clean up on Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def end_like_ctrl_c() -> None:
    """Let SIGTERM (``timeout``, systemd) and SIGHUP (a terminal that is closed) raise
    ``KeyboardInterrupt``, too. Once, as they often come together; not where ignored (``nohup``).
    """
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


def _end(_signum: int, _frame: FrameType | None) -> None:
    for signum in _SIGNALS:
        # Not SIG_IGN, which what is started meanwhile would inherit.
        signal.signal(signum, _nothing)
    raise KeyboardInterrupt


def _nothing(_signum: int, _frame: FrameType | None) -> None:
    """The clean-up is under way."""
