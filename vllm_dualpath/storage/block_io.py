"""Moving whole block files through the compiled core, and what an outcome means.

Payload memory stays referenced from submission until the outcome was polled. Where a call hangs in
the kernel past ``close``, the memory it may still write to is kept for the life of the process.
Knows files and errno; no hashes, no directories, no quarantine.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal

from vllm_dualpath import native
from vllm_dualpath.blocks import ALIGNMENT_BYTES
from vllm_dualpath.errors import (
    BlockNotFound,
    OutOfDescriptors,
    StorageError,
    StoreFull,
    TransferTimeout,
)
from vllm_dualpath.storage.format import FileLayout

Backend = Literal["io_uring", "threads"]

PIECE_BYTES = 1 << 20
"""A block is moved in pieces of about this size: large enough for a disk's or server's full speed,
small enough that one block alone keeps a queue busy and that its checksum starts early."""

_DEFAULT_THREADS: dict[Backend, int] = {"io_uring": 4, "threads": 16}
"""A ring's thread only submits and checks sums, some 10 GB/s; a blocking one serves one block."""

_CLOSE_S = 10.0

_abandoned: list[object] = []
"""Engines and payloads that a hung kernel call may still use."""


class IoStatus(IntEnum):
    """How a block's transfer ended; the numbers are the core's."""

    DONE = 0
    EXISTS = 1
    WRONG_SIZE = 2
    FAILED = 3
    CANCELLED = 4


class IoStep(IntEnum):
    """What was being done when it failed; the numbers are the core's."""

    LOOK_UP = 0
    OPEN = 1
    STAT = 2
    ALLOCATE = 3
    READ = 4
    WRITE = 5
    CLOSE = 6
    RENAME = 7
    MAKE_DIRECTORY = 8
    UNLINK = 9


@dataclass(frozen=True, slots=True)
class IoOutcome:
    """The end of one transfer."""

    ticket: int
    status: IoStatus
    step: IoStep
    error: int
    """errno, where it failed."""
    num_bytes: int
    """Moved, header included; 0 unless done."""
    found_bytes: int
    """Reads: the size of the file."""
    modified_s: int
    """Reads: its mtime."""
    header: bytes
    """Reads that are done: as it lies in the file."""
    crcs: bytes
    """Reads that are done and verify: the checksum of each layer, as they lie in a header."""

    def raise_failure(self, action: str, block_hash: bytes) -> None:
        """Raise the ``StorageError`` that fits errno, if it failed; ``action``: get or put."""
        if self.status is not IoStatus.FAILED:
            return
        step = self.step.name.lower().replace("_", " ")
        cause = OSError(self.error, os.strerror(self.error))
        message = f"{action} block {block_hash.hex()}: {step}: {cause}"
        raise storage_error(self.error, message, reading=action == "get")


@dataclass(frozen=True, slots=True)
class IoChoice:
    """How blocks are moved, and why it is not a faster way."""

    backend: Backend
    direct: bool
    reason: str = ""

    def __str__(self) -> str:
        kind = f"{self.backend}, {'direct' if self.direct else 'buffered'}"
        return f"{kind} ({self.reason})" if self.reason else kind


class BlockIo:
    """Files of one layout in one file system. Any thread may call; ``close`` comes last.

    Raises ``OSError`` where io_uring is refused. ``num_threads`` (a direction) None means the
    backend's default; ``depth`` is the number of pieces in flight a direction.
    """

    def __init__(
        self,
        directory: Path,
        layout: FileLayout,
        choice: IoChoice,
        num_threads: int | None = None,
        depth: int = 64,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._engine = native.BlockEngine(
            io_uring=choice.backend == "io_uring",
            direct=choice.direct,
            num_threads=num_threads or _DEFAULT_THREADS[choice.backend],
            depth=depth,
            piece_bytes=piece_bytes,
            directory=str(directory),
            header_bytes=layout.header_bytes,
            payload_bytes=layout.payload_bytes,
            crc_table_offset=layout.crc_table_offset,
            header_crc_offset=layout.header_crc_offset,
            layer_bytes=layout.layer_bytes,
        )
        self._payload_bytes = layout.payload_bytes
        self._payloads: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        """An outcome may be polled before the thread that submitted it has noted the payload."""

    def fileno(self) -> int:
        """Readable while outcomes wait for ``poll``."""
        return self._engine.fileno()

    def read(self, path: str, payload: memoryview, *, verify: bool) -> IoOutcome:
        """Read a file and wait for its end."""
        return _outcome(self._engine.read(path, self._address(payload), verify))

    def write(self, path: str, temporary: str, payload: memoryview, header: bytes) -> IoOutcome:
        """Write a file, give it its name, and wait for the end."""
        address = self._address(payload)
        return _outcome(self._engine.write(path, temporary, address, header))

    def submit_read(self, path: str, payload: memoryview, *, verify: bool) -> int:
        """Queue a read; returns its ticket."""
        address = self._address(payload)
        with self._lock:
            ticket = self._engine.submit_read(path, address, verify)
            self._payloads[ticket] = payload
        return ticket

    def submit_write(self, path: str, temporary: str, payload: memoryview, header: bytes) -> int:
        """Queue a write; returns its ticket."""
        address = self._address(payload)
        with self._lock:
            ticket = self._engine.submit_write(path, temporary, address, header)
            self._payloads[ticket] = payload
        return ticket

    def cancel(self, ticket: int) -> bool:
        """End what waits for its turn, with an outcome; False if it runs or has ended."""
        return self._engine.cancel(ticket)

    def started_s(self, ticket: int) -> float | None:
        """When it left its queue, in ``time.monotonic``'s seconds; None if it waits."""
        return self._engine.started_s(ticket)

    def poll(self) -> list[IoOutcome]:
        """Every outcome since the last call."""
        outcomes = [_outcome(each) for each in self._engine.poll()]
        with self._lock:
            for outcome in outcomes:
                self._payloads.pop(outcome.ticket, None)
        return outcomes

    def close(self) -> None:
        """Cancel the reads that wait, finish the writes. Raises ``TransferTimeout`` if a call
        does not end.
        """
        if not self._engine.close(_CLOSE_S):
            _abandoned.append((self._engine, self._payloads))
            raise TransferTimeout(f"store: a call to the file system did not end in {_CLOSE_S} s")

    def _address(self, payload: memoryview) -> int:
        if payload.nbytes != self._payload_bytes:
            raise ValueError(
                f"payload: expected {self._payload_bytes} bytes, found {payload.nbytes}"
            )
        address = native.buffer_address(payload)
        if address % ALIGNMENT_BYTES:
            raise ValueError(f"payload: expected memory aligned to {ALIGNMENT_BYTES} bytes")
        return address


def storage_error(error: int, message: str, *, reading: bool) -> StorageError:
    """The exception that stands for an errno, with what to do about it."""
    if reading and error in (errno.ENOENT, errno.ESTALE):
        return BlockNotFound(message)
    if error in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{message}: free space, or set store_quota_bytes")
    if error == errno.EMFILE:
        return OutOfDescriptors(f"{message}: raise this process's limit (ulimit -n)")
    if error == errno.ENFILE:
        return OutOfDescriptors(f"{message}: raise the host's limit (sysctl fs.file-max)")
    return StorageError(message)


def _outcome(values: tuple[int, int, int, int, int, int, int, bytes, bytes]) -> IoOutcome:
    ticket, status, step, *rest = values
    return IoOutcome(ticket, IoStatus(status), IoStep(step), *rest)  # type: ignore[arg-type]
