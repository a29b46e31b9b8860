"""The scheduler side's view of its mover: which transfers are published, what is stored, persist
slots.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dualpath.connector.attach import MoverConnection
from vllm_dualpath.connector.stats import Recorder
from vllm_dualpath.control.slot_table import SlotTableReader, claims_bytes, table_bytes
from vllm_dualpath.errors import IncompatiblePeer
from vllm_dualpath.index.shared import SharedIndexReader
from vllm_dualpath.messages import Attached, LocalMessage, LocalStats, PersistSlots, RootChanged

_TABLE, _CLAIMS, _INDEX = 1, 2, 3
"""Positions of the descriptors that come with ``Attached``; the staging memory is the worker's."""


@dataclass(slots=True)
class MoverView:
    """One mover as the scheduler's hooks see it. Lookups are the hooks', the slots' deque is
    shared.
    """

    boot_id: bytes
    table: SlotTableReader
    index: SharedIndexReader | None
    persist_slots: deque[int] = field(default_factory=deque)


class SchedulerMover:
    """Attaches to the mover and keeps ``view`` current."""

    def __init__(self, socket_path: Path, recorder: Recorder) -> None:
        self.view: MoverView | None = None
        self.idle = True
        """Whether the mover said, after the last activity, that nothing is open in it."""
        self._recorder = recorder
        self._root: bytes | None = None
        self.connection = MoverConnection(socket_path, "scheduler", self)

    def change_root(self, root: bytes) -> None:
        """Tell this and every later mover that the chain starts at ``root`` now."""
        self._root = root
        view = self.view
        if view is not None:
            self.connection.send_surely(view.boot_id, RootChanged(root))

    def prepare(self) -> None:
        """Nothing to let go of: the mappings went with the last view."""

    def attached(self, attached: Attached, fds: list[int]) -> None:
        if len(fds) <= _CLAIMS:
            raise IncompatiblePeer(
                f"mover {attached.pid}: expected 3 descriptors, found {len(fds)}"
            )
        self._recorder.forget_mover()
        table = mmap.mmap(
            fds[_TABLE],
            table_bytes(attached.table_capacity, attached.table_max_blocks),
            mmap.MAP_SHARED,
            mmap.PROT_READ,
        )
        claims = mmap.mmap(fds[_CLAIMS], claims_bytes(attached.table_capacity), mmap.MAP_SHARED)
        reader = SlotTableReader(table, claims, attached.table_capacity, attached.table_max_blocks)
        if self._root is not None:
            self.connection.send_surely(attached.boot_id, RootChanged(self._root))
        self.view = MoverView(attached.boot_id, reader, _map_index(attached, fds))

    def received(self, message: LocalMessage) -> None:
        view = self.view
        if isinstance(message, PersistSlots) and view is not None:
            view.persist_slots.extend(message.slots)
        elif isinstance(message, LocalStats):
            self._recorder.record_mover(message.stats)
            self.idle = message.idle

    def lost(self) -> None:
        self.view = None
        self.idle = True


def _map_index(attached: Attached, fds: list[int]) -> SharedIndexReader | None:
    if not attached.index_capacity_blocks or len(fds) <= _INDEX:
        return None
    size = os.fstat(fds[_INDEX]).st_size
    return SharedIndexReader(mmap.mmap(fds[_INDEX], size, mmap.MAP_SHARED, mmap.PROT_READ))
