"""The memory that puts move, and the permutation in which they move it: the same for every side."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from vllm_dualpath import native

NUM_BYTES = 64 << 20


class PutMemory:
    """A sealed memfd mapped shared, as a mover's staging memory is; for the process's life."""

    def __init__(self, num_bytes: int = NUM_BYTES) -> None:
        self.fd = os.memfd_create("dualpath-bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, num_bytes, mmap.MAP_SHARED)
        self.num_bytes = num_bytes
        self.address = native.buffer_address(self.map)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.map, dtype=np.uint8)

    def fill(self, seed: int) -> None:
        """Random bytes: every page is there, and no two pieces are alike."""
        self.array[:] = np.frombuffer(
            np.random.default_rng(seed).bytes(self.num_bytes), dtype=np.uint8
        )

    def clear(self) -> None:
        """Zeros, so that a put which does not arrive cannot pass for the one before."""
        ctypes.memset(self.address, 0, self.num_bytes)

    def crc32c(self) -> int:
        """Over all of it."""
        return native.crc32c(self.address, self.num_bytes)


def permutation(num_bytes: int, piece_bytes: int, seed: int) -> npt.NDArray[np.uint64]:
    """Where each local piece goes: ``result[local index]`` is the remote index."""
    return np.random.default_rng(seed).permutation(num_bytes // piece_bytes).astype(np.uint64)


def make_pieces(
    memory: PutMemory, remote_address: int, piece_bytes: int, seed: int
) -> npt.NDArray[np.uint64]:
    """The permutation as the transport's ``PutArray``."""
    order = permutation(memory.num_bytes, piece_bytes, seed)
    pieces = np.empty((len(order), 3), dtype=np.uint64)
    pieces[:, 0] = memory.address + np.arange(len(order), dtype=np.uint64) * np.uint64(piece_bytes)
    pieces[:, 1] = np.uint64(remote_address) + order * np.uint64(piece_bytes)
    pieces[:, 2] = piece_bytes
    return pieces


def expected_crc32c(memory: PutMemory, piece_bytes: int, seed: int) -> int:
    """The CRC of the target's memory once every piece has arrived."""
    order = permutation(memory.num_bytes, piece_bytes, seed)
    result = np.empty((len(order), piece_bytes), dtype=np.uint8)
    result[order] = memory.array.reshape(len(order), piece_bytes)
    return native.crc32c(native.buffer_address(result), memory.num_bytes)


class TargetMemory:
    """What every target's role answers, whatever brings the bytes."""

    def __init__(self) -> None:
        self.memory = PutMemory()
        self.memory.clear()

    def clear(self) -> None:
        self.memory.clear()

    def crc32c(self) -> int:
        return self.memory.crc32c()


class InitiatorMemory:
    """What every initiator's role has, whatever sends the bytes."""

    def __init__(self) -> None:
        self.memory = PutMemory()
        self.memory.fill(seed=7)

    def expected(self, piece_bytes: int, seed: int) -> int:
        return expected_crc32c(self.memory, piece_bytes, seed)
