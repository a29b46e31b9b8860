"""The contract of a store: Full Blocks by chain hash.

A store belongs to one model fingerprint and one geometry. It holds opaque payloads with a checksum
a Layer Block; it knows no requests, no engines, no index. Implementations are safe to call from
several threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One stored block, as an index needs it."""

    hash: bytes
    parent: bytes
    num_bytes: int
    """What the block takes in the store, header included."""
    last_used_s: float
    """Wall-clock seconds; approximate."""


class BlockStore(Protocol):
    """See the module's docstring. ``payload`` is a writable buffer of ``geometry.slot_bytes``
    bytes.

    Buffers are 4 KiB aligned and stay unchanged (put) or untouched by others (get) until the call
    returns.
    """

    @property
    def uri(self) -> str: ...

    def get(self, block_hash: bytes, payload: memoryview, *, verify: bool = True) -> int:
        """Read one block into ``payload``; return the bytes read from storage.

        Raises ``BlockNotFound``, ``BlockCorrupt`` (bad checksum, short, foreign hash or geometry;
        the block was quarantined and will not be found again) or ``StorageError`` (an I/O error).
        """

    def put(self, block_hash: bytes, parent: bytes, payload: memoryview) -> int:
        """Store one block; return the bytes written, 0 if it was there. All or nothing, idempotent.

        Raises ``StoreFull`` or ``StorageError``; nothing is left behind then.
        """

    def contains(self, block_hash: bytes) -> bool: ...

    def remove(self, block_hash: bytes) -> int:
        """Remove one block; return the bytes freed, 0 if it was not there."""

    def entries(self) -> Iterator[BlockEntry]:
        """Every stored block whose header is sound, parents in no particular order."""

    def acquire_eviction_lease(self, owner: str, duration_s: float) -> bool:
        """Become, or stay, the one who evicts. False while another owner's lease has not run
        out.
        """

    def close(self) -> None: ...
