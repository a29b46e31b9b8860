"""Where our threads run."""

from __future__ import annotations

import os
from contextlib import suppress


def leave_compute_cores() -> None:
    """Keep the calling thread off the cores that the thread which started it is bound to, if this
    process may use others: vLLM binds the forward pass to cores of its own on a CPU.
    """
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
    with suppress(OSError):  # refused where there are none
        os.sched_setaffinity(0, others)
