"""The worker's mapping of its mover's staging memory, and who still uses it.

A mover that dies leaves its memory to our mapping. It must go before the next mover makes its own,
or the memory is there twice, but not while a copy still reads or writes it.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence

from vllm.logger import init_logger

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyEngine, Rows
from vllm_dualpath.connector.metadata import PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.errors import IncompatiblePeer, TransferTimeout
from vllm_dualpath.messages import Attached

logger = init_logger("vllm.dualpath.staging")


class Staging:
    """One mover's staging memory, mapped and ready to copy from and to. Thread-safe."""

    def __init__(
        self,
        attached: Attached,
        fd: int,
        geometry: Geometry,
        caches: PagedCaches,
        engine: CopyEngine,
    ) -> None:
        if attached.slot_bytes != geometry.slot_bytes:
            raise IncompatiblePeer(
                f"mover {attached.pid}: expected slots of {geometry.slot_bytes} bytes, found"
                f" {attached.slot_bytes}"
            )
        self.boot_id = attached.boot_id
        self.num_slots = attached.num_slots
        self._memory = mmap.mmap(fd, attached.staging_bytes, mmap.MAP_SHARED)
        self._engine = engine
        self._mapping = engine.map(caches, self._memory, attached.num_slots, geometry)
        self._mapped = True
        self._num_users = 0
        self._retired = False
        self._changed = threading.Condition()

    def acquire(self) -> bool:
        """Keep the mapping until ``release``. False when it is being given up."""
        with self._changed:
            self._num_users += not self._retired
            return not self._retired

    def release(self) -> None:
        """End one ``acquire``."""
        with self._changed:
            self._num_users -= 1
            self._changed.notify_all()

    def rows(self, copies: Sequence[PageCopy]) -> Rows:
        """The pages of ``copies`` for the copy engine; ``ValueError`` for impossible ones."""
        return self._engine.rows(self._mapping, copies)

    def retire(self, timeout_s: float) -> None:
        """Wait for the last user, then unmap. Raises ``TransferTimeout`` if users stay."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._retired = True
            while self._num_users:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TransferTimeout(
                        f"staging memory of mover {self.boot_id.hex()[:8]}: {self._num_users}"
                        f" copies did not end in {timeout_s} s; it stays mapped"
                    )
        if self._mapped:
            self._mapped = False
            self._engine.unmap(self._mapping)
            self._mapping = None
            self._memory.close()
