"""Looking at clocks while something is open, and telling the engine what was counted.

With nothing open there is no timer: an idle mover sleeps until a message comes.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_dualpath.messages import LocalStats, MoverStats
from vllm_dualpath.mover.book import TransferBook
from vllm_dualpath.mover.engine_port import EnginePort
from vllm_dualpath.mover.local import LocalLoads
from vllm_dualpath.mover.ports import Ports

_WATCH_S = 0.25


class ProgressWatch:
    """Owned by the loop's thread. ``start`` is called on every event that may open something."""

    def __init__(
        self,
        ports: Ports,
        book: TransferBook,
        loads: LocalLoads,
        engine: EnginePort,
        grant_persist_slots: Callable[[], None],
    ) -> None:
        self._ports = ports
        self._book = book
        self._loads = loads
        self._engine = engine
        self._grant_persist_slots = grant_persist_slots
        self._watching = False
        self._reported = MoverStats()

    def start(self) -> None:
        """Something happened: check progress until nothing is open any more."""
        if not self._watching:
            self._watching = True
            self._ports.loop.call_later(_WATCH_S, self._check)

    def stats(self, stage_seconds: tuple[float, ...] = ()) -> MoverStats:
        """Counters and gauges as they are now."""
        counters, pool = self._ports.counters, self._ports.pool
        quarantined = sum(part.num_quarantined for part in self._book.parts)
        return MoverStats(
            storage_read_bytes=counters.storage_read_bytes,
            storage_read_busy_s=self._ports.storage.read_busy_s,
            donated_bytes=counters.donated_bytes,
            storage_write_bytes=counters.storage_write_bytes,
            push_to_prefill_bytes=counters.push_to_prefill_bytes,
            push_to_decode_bytes=counters.push_to_decode_bytes,
            blocks_stored=counters.blocks_stored,
            blocks_not_stored=counters.blocks_not_stored,
            corrupt_blocks=counters.corrupt_blocks,
            rejected_messages=counters.rejected_messages,
            load_failures=dict(counters.load_failures),
            stage_seconds=stage_seconds,
            slots_used=pool.num_granted - quarantined,
            slots_free=pool.num_free,
            slots_quarantined=quarantined,
            donor_slots_used=self._ports.donor_pool.num_granted,
            donor_slots_stuck=self._book.donor_slots_stuck,
            read_queue_tokens=self._ports.storage.read_queue_tokens,
            open_transfers=self._book.num_open + self._loads.num_open,
        )

    def _check(self) -> None:
        self._watching = False
        try:
            self._book.check_progress()
            self._loads.check_progress()
            self._grant_persist_slots()
            idle = self._report()
        except Exception:
            # A watch that ends with a bug would leave what is open without deadlines.
            self.start()
            raise
        if not idle:
            self.start()

    def _report(self) -> bool:
        """Send the engine its counters if they changed; true when nothing is open."""
        stats = self.stats()
        idle = stats.open_transfers == 0 and self._ports.storage.num_open == 0
        stage_seconds = self._ports.counters.stage_seconds
        if stats != self._reported or stage_seconds or idle:
            self._reported = stats
            report = self.stats(tuple(stage_seconds))
            stage_seconds.clear()
            self._engine.send("scheduler", LocalStats(report, idle))
        return idle
