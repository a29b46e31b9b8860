"""The store's side of the storage measurement: Full Blocks through its asynchronous API.

Also the CRC32C figures, because what checking costs is a property of these reads.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from vllm_dualpath import native
from vllm_dualpath.bench.mover.shapes import shape_named
from vllm_dualpath.blocks import ALIGNMENT_BYTES, Geometry
from vllm_dualpath.errors import StorageError
from vllm_dualpath.storage import PosixStore, ReadBlock, WriteBlock

FINGERPRINT = hashlib.sha256(b"vllm-dualpath bench mover").digest()
_PARENT = bytes(32)
_PROGRESS_S = 30.0

Request = ReadBlock | WriteBlock


def block_files(directory: Path, hashes: Sequence[bytes]) -> list[Path]:
    """Where a store in ``directory`` keeps these blocks."""
    root = directory / FINGERPRINT.hex()
    return [root / h.hex()[:2] / h.hex()[2:4] / h.hex() for h in hashes]


class Storage:
    """One store with the blocks of one shape. See ``child`` for who calls."""

    def __init__(self) -> None:
        self._store: PosixStore
        self._slots: list[memoryview] = []
        self._num_blocks = 0
        self._directory = Path()

    def open(self, directory: str, shape: str, num_blocks: int, depth: int) -> dict[str, Any]:
        """``open_geometry`` for the geometry of a named shape."""
        return self.open_geometry(directory, shape_named(shape).geometry, num_blocks, depth)

    def open_geometry(
        self, directory: str, geometry: Geometry, num_blocks: int, depth: int
    ) -> dict[str, Any]:
        """Make a store in ``directory`` and put blocks into it; says what the store runs on."""
        self._directory = Path(directory)
        self._store = PosixStore(f"file://{directory}", FINGERPRINT, geometry)
        memory = mmap.mmap(-1, depth * geometry.slot_bytes)
        memory[:] = np.random.default_rng(1).bytes(len(memory))
        view = memoryview(memory)
        size = geometry.slot_bytes
        self._slots = [view[idx * size : (idx + 1) * size] for idx in range(depth)]
        self._num_blocks = num_blocks
        self.write("kept", keep=True)
        choice = self._store.io
        return {"backend": choice.backend, "direct": choice.direct, "reason": choice.reason}

    def files(self) -> list[str]:
        """The blocks to read, as files."""
        hashes = block_hashes("kept", self._num_blocks)
        return [str(file) for file in block_files(self._directory, hashes)]

    def read(self, verify: bool = True) -> float:
        """Seconds to read every block once."""
        hashes = iter(block_hashes("kept", self._num_blocks))
        return self._run(lambda slot: ReadBlock(next(hashes), slot, verify))

    def write(self, name: str, keep: bool = False) -> float:
        """Seconds to store as many new blocks."""
        hashes = block_hashes(name, self._num_blocks)
        waiting = iter(hashes)
        seconds = self._run(lambda slot: WriteBlock(next(waiting), _PARENT, slot))
        if not keep:
            for block_hash in hashes:
                self._store.remove(block_hash)
        return seconds

    def close(self) -> None:
        self._store.close()

    def crc32c_gb_per_s(self, num_bytes: int, seconds: float) -> float:
        """Of one buffer, again and again, on this thread."""
        buffer = mmap.mmap(-1, num_bytes)
        buffer[:] = os.urandom(4096) * (num_bytes // 4096)
        address = native.buffer_address(buffer)
        native.crc32c(address, num_bytes)
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            native.crc32c(address, num_bytes)
            count += 1
        return count * num_bytes / elapsed / 1e9

    def _hashes(self, name: str) -> list[bytes]:
        return [
            hashlib.sha256(f"{name}/{idx}".encode()).digest() for idx in range(self._num_blocks)
        ]

    def latencies(self, count: int) -> tuple[list[float], list[float]]:
        """Microseconds of one block at a time: to its callback, and of a plain blocking read.

        What waits polls as the mover's loop does. The plain read opens, reads and closes the same
        file; what the callback takes longer is ours.
        """
        poller = zmq.Poller()
        poller.register(self._store.fileno(), zmq.POLLIN)
        block_hash, path = block_hashes("kept", 1)[0], self.files()[0]
        plain = mmap.mmap(-1, len(self._slots[0]) + ALIGNMENT_BYTES)
        to_callback, to_return = [], []
        for _ in range(count):
            time.sleep(0.002)
            start = time.perf_counter()
            self._store.submit(ReadBlock(block_hash, self._slots[0], False))
            poller.poll(int(_PROGRESS_S * 1000))
            for finished in self._store.finished():
                to_callback.append((time.perf_counter() - start) * 1e6)
                if finished.error is not None:
                    raise finished.error
            time.sleep(0.002)
            start = time.perf_counter()
            _plain_read(path, plain)
            to_return.append((time.perf_counter() - start) * 1e6)
        return to_callback, to_return

    def _run(self, make: Callable[[memoryview], Request]) -> float:
        """Every block once, as many under way as there are slots."""
        free = list(self._slots)
        slots: dict[int, memoryview] = {}
        left = self._num_blocks
        start = time.perf_counter()
        while left or slots:
            while left and free:
                slot = free.pop()
                slots[self._store.submit(make(slot))] = slot
                left -= 1
            free.extend(slots.pop(ticket) for ticket in self._finished())
        return time.perf_counter() - start

    def _finished(self) -> Iterator[int]:
        if not select.select([self._store.fileno()], [], [], _PROGRESS_S)[0]:
            raise StorageError(f"store: no block ended in {_PROGRESS_S} s")
        for finished in self._store.finished():
            if finished.error is not None:
                raise finished.error
            yield finished.ticket


def block_hashes(name: str, num_blocks: int) -> list[bytes]:
    """Names of blocks: nothing chains them, as nobody looks them up by their tokens."""
    return [hashlib.sha256(f"{name}/{idx}".encode()).digest() for idx in range(num_blocks)]


def _plain_read(path: str, buffer: mmap.mmap) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(fd, [buffer], 0)
    finally:
        os.close(fd)
