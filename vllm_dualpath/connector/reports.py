"""Goes on in Python when copies have ended, without the forward thread that ordered them.

The forward thread only leaves behind what is to be called; the copy engine's own thread wakes ours
when a copy has ended. Waking a thread at each layer would take that long from every forward pass.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from vllm.logger import init_logger

from vllm_dualpath.connector.copies import CopyEngine, Mark, Rows
from vllm_dualpath.errors import TransferTimeout
from vllm_dualpath.native import leave_compute_cores

logger = init_logger("vllm.dualpath.reports")

_JOIN_S = 10.0

Report = Callable[[bool], object]
"""Called with whether the copy was carried out. Must be quick."""


class Reports:
    """Calls reports in the order of their copies. Owns the thread ``dualpath-reports``.

    ``submit`` and ``after_all`` are the forward thread's.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._pending: deque[Report] = deque()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="dualpath-reports", daemon=True)
        self._thread.start()

    def submit(
        self, rows: Rows, first_layer: int, end_layer: int, report: Report, *, load: bool
    ) -> Mark:
        """Copy urgently, then report."""
        self._pending.append(report)  # first: the copy may end at once
        try:
            return self._engine.submit(rows, first_layer, end_layer, load=load, reported=True)
        except BaseException:
            self._pending.pop()
            raise

    def after_all(self, report: Report) -> None:
        """Report when every urgent copy submitted so far has ended, and been reported."""
        self._pending.append(report)
        try:
            self._engine.submit_barrier()
        except BaseException:
            self._pending.pop()
            raise

    def close(self) -> None:
        """Wait for all reports, then end. Raises ``TransferTimeout`` if there is no end to them."""
        self.after_all(self._end)
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise TransferTimeout(f"thread {self._thread.name} did not end in {_JOIN_S} s")

    def _end(self, _done: bool) -> None:
        self._ended = True

    def _run(self) -> None:
        leave_compute_cores()
        seen, failure = 0, ""
        while not self._ended:
            count, error = self._engine.wait_reports(seen)
            if error and not failure:
                failure = error
                logger.error("copies of KV pages failed, none works from now on: %s", error)
            while seen < count:
                seen += 1
                self._report(not error)

    def _report(self, done: bool) -> None:
        report = self._pending.popleft()
        try:
            report(done)
        except Exception:
            logger.exception("what follows a copy failed")
