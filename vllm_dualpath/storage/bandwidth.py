"""How fast a directory's file system moves large blocks, for ``doctor``. Knows no store format."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vllm_dualpath.blocks import align_up
from vllm_dualpath.storage.directio import aligned_buffer, open_new, open_read

_CHUNK_BYTES = 4 << 20


def measure_bandwidth(path: Path, num_bytes: int, *, direct: bool) -> tuple[float, float]:
    """Write, then read back, a file of about ``num_bytes`` in ``path``.

    Returns (read, write) in bytes a second: one transfer in flight, so a lower bound of what
    several store threads get. Writes count their way to the device. The file is removed.
    Raises ``OSError``.
    """
    buffer = aligned_buffer(min(_CHUNK_BYTES, align_up(max(num_bytes, 1))))
    # Random bytes: a file system that compresses would flatter itself with zeros.
    buffer[:] = os.urandom(len(buffer))
    num_chunks = max(1, num_bytes // len(buffer))
    scratch = path / f"bandwidth-{os.getpid()}-{os.urandom(8).hex()}"
    try:
        write_s = _time_writes(scratch, buffer, num_chunks, direct=direct)
        read_s = _time_reads(scratch, buffer, num_chunks, direct=direct)
    finally:
        scratch.unlink(missing_ok=True)
    return num_chunks * len(buffer) / read_s, num_chunks * len(buffer) / write_s


def _time_writes(scratch: Path, buffer: memoryview, num_chunks: int, *, direct: bool) -> float:
    fd = open_new(scratch, direct=direct)
    try:
        start_s = time.perf_counter()
        for idx in range(num_chunks):
            _require(os.pwrite(fd, buffer, idx * len(buffer)), len(buffer))
        os.fsync(fd)
        return time.perf_counter() - start_s
    finally:
        os.close(fd)


def _time_reads(scratch: Path, buffer: memoryview, num_chunks: int, *, direct: bool) -> float:
    fd = open_read(scratch, direct=direct)
    try:
        # Where direct I/O is missing, at least start without the pages just written.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start_s = time.perf_counter()
        for idx in range(num_chunks):
            _require(os.preadv(fd, [buffer], idx * len(buffer)), len(buffer))
        return time.perf_counter() - start_s
    finally:
        os.close(fd)


def _require(moved_bytes: int, expected_bytes: int) -> None:
    if moved_bytes != expected_bytes:
        raise OSError(f"bandwidth: expected {expected_bytes} bytes to move, {moved_bytes} did")
