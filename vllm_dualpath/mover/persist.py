"""Blocks that the engine copied to persist slots, and the count of every block stored."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import Persist, StoredBlock
from vllm_dualpath.mover.staging import SlotPool
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.storage.base import WriteBlock

if TYPE_CHECKING:
    from vllm_dualpath.mover.ports import Ports

logger = logging.getLogger(__name__)


def record_store(ports: Ports, block_hash: bytes, parent: bytes, task: IoTask) -> None:
    """Count the outcome of a write; indexes learn of a block only here, after the store has it."""
    if task.error is not None or task.cancelled:
        ports.counters.blocks_not_stored += 1
        logger.warning("block %s not stored: %s", block_hash.hex()[:12], task.error or "cancelled")
        return
    ports.counters.storage_write_bytes += task.num_bytes
    ports.counters.blocks_stored += task.num_bytes > 0
    num_bytes = task.num_bytes or ports.geometry.slot_bytes
    ports.stored((StoredBlock(block_hash, parent, num_bytes, time.time()),))


class PersistSlotsLedger:
    """Which persist slots the engine holds: it fills one, we store it, it is free again."""

    def __init__(self, ports: Ports, pool: SlotPool) -> None:
        self._ports = ports
        self._pool = pool
        self._with_engine: set[int] = set()

    def grant_all(self) -> tuple[int, ...]:
        """Every free slot, for the engine's stock."""
        slots = self._pool.try_take(self._pool.num_free) or ()
        self._with_engine.update(slots)
        return slots

    def take_back(self, slots: tuple[int, ...]) -> None:
        """The engine returns slots it will not use. Raises ``ProtocolError`` for others."""
        if not self._with_engine.issuperset(slots) or len(set(slots)) != len(slots):
            raise ProtocolError(f"persist: slots {slots} are not the engine's")
        self._with_engine.difference_update(slots)
        self._pool.release(slots)

    def store(self, persist: Persist) -> None:
        """Store a filled slot. Raises ``ProtocolError`` for a slot the engine does not hold."""
        if persist.slot not in self._with_engine:
            raise ProtocolError(f"persist: slot {persist.slot} is not the engine's")
        self._with_engine.remove(persist.slot)
        view = self._ports.slot_view(persist.slot)
        self._ports.storage.submit_write(
            IoTask(
                work=WriteBlock(persist.hash, persist.parent, view),
                done=partial(self._stored, persist),
            )
        )

    def _stored(self, persist: Persist, task: IoTask) -> None:
        record_store(self._ports, persist.hash, persist.parent, task)
        self._pool.release((persist.slot,))
