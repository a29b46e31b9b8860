"""The contract of a store: Full Blocks by chain hash.

A store belongs to one model fingerprint and one geometry. It holds opaque payloads with a checksum
a Layer Block; it knows no requests, no engines, no index. Implementations are safe to call from
several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vllm_dualpath.errors import StorageError


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One stored block, as an index needs it."""

    hash: bytes
    parent: bytes
    num_bytes: int
    """What the block takes in the store, header included."""
    last_used_s: float
    """Wall-clock seconds; approximate."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadBlock:
    """What ``BlockStore.get`` is asked for."""

    hash: bytes
    payload: memoryview
    verify: bool = True

    def run(self, store: BlockStore) -> int:
        """Do it now, as long as it takes."""
        return store.get(self.hash, self.payload, verify=self.verify)


@dataclass(frozen=True, slots=True, eq=False)
class WriteBlock:
    """What ``BlockStore.put`` is asked for."""

    hash: bytes
    parent: bytes
    payload: memoryview

    def run(self, store: BlockStore) -> int:
        """Do it now, as long as it takes."""
        return store.put(self.hash, self.parent, self.payload)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a submitted request."""

    ticket: int
    num_bytes: int = 0
    error: StorageError | None = None
    """What ``get`` or ``put`` would have raised."""
    cancelled: bool = False
    """It never started."""
    follow_up: Callable[[], None] | None = None
    """A blocking call that is still to be made on some thread (it raises nothing): after an error
    before anybody hears of it, else whenever there is time."""


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


@runtime_checkable
class AsyncBlockStore(BlockStore, Protocol):
    """A store that also moves blocks on threads of its own, reads apart from writes.

    One thread submits and asks for what has finished. The payload of a request is the store's
    until its end was handed out.
    """

    def fileno(self) -> int:
        """Readable while there is something for ``finished`` to hand out."""

    def submit(self, request: ReadBlock | WriteBlock) -> int:
        """Queue a request and return its ticket. Raises ``ValueError`` for a bad payload and
        ``StorageError`` where no I/O can be set up.
        """

    def cancel(self, ticket: int) -> bool:
        """End a request that waits for its turn; False if it runs or has ended."""

    def started_s(self, ticket: int) -> float | None:
        """When the request left its queue (``time.monotonic``); None if it waits or has ended."""

    def finished(self) -> list[Finished]:
        """Every request that ended since the last call."""
