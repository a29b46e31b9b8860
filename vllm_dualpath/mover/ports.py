"""What a transfer needs of its mover, gathered so that transfers can be driven in tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import EngineConfig
from vllm_dualpath.control.slot_table import SlotTableWriter
from vllm_dualpath.messages import MoverMessage, Peer, StoredBlock, TransferKey
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.mover.peers import PeerDirectory
from vllm_dualpath.mover.staging import SharedMemory, SlotPool
from vllm_dualpath.mover.storage_queue import StorageQueue
from vllm_dualpath.storage.base import BlockStore


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything is owned by the loop's thread, the store's own calls excepted."""

    engine_id: str
    boot_id: bytes
    contact: Peer
    """This mover, as a peer sees it; without slots."""
    config: EngineConfig
    geometry: Geometry
    loop: EventLoop
    staging: SharedMemory
    pool: SlotPool
    donor_pool: SlotPool
    store: BlockStore
    storage: StorageQueue
    peers: PeerDirectory
    table: SlotTableWriter
    counters: Counters
    tell_router: Callable[[MoverMessage], None]
    stored: Callable[[tuple[StoredBlock, ...]], None]
    """The store has these blocks now."""
    dropped: Callable[[tuple[bytes, ...], bool], None]
    """These blocks cannot be read; whether because they are gone."""
    closed: Callable[[TransferKey, frozenset[bytes]], None]
    """A transfer has ended and holds nothing any more; boot ids of those to whom something may
    still be under way.
    """

    def slot_view(self, slot: int) -> memoryview:
        """The memory of one slot."""
        start = slot * self.geometry.slot_bytes
        return self.staging.view[start : start + self.geometry.slot_bytes]

    def slot_address(self, slot: int) -> int:
        """Where one slot lies in this process."""
        return self.staging.address + slot * self.geometry.slot_bytes
