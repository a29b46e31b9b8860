"""Blocking calls on files past the page cache: for headers and for measuring.

Blocks themselves go through the compiled core (``block_io``). Direct I/O needs buffers, offsets and
lengths aligned to 4 KiB. Raises ``OSError``: the store translates.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_dualpath.blocks import ALIGNMENT_BYTES

_FLAGS = os.O_CLOEXEC


class AlignedBuffers:
    """A pool of page-aligned buffers of one size, for headers. Safe from any thread."""

    def __init__(self, num_bytes: int = ALIGNMENT_BYTES) -> None:
        self._num_bytes = num_bytes
        self._free: deque[memoryview] = deque()

    @contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """A buffer that is the caller's until the block ends; its content is undefined."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = aligned_buffer(self._num_bytes)
        try:
            yield buffer
        finally:
            self._free.append(buffer)

    def close(self) -> None:
        """Forget the free buffers."""
        self._free.clear()


def aligned_buffer(num_bytes: int) -> memoryview:
    """Writable zeroed memory that starts on a page boundary."""
    return memoryview(mmap.mmap(-1, num_bytes))


def open_read(path: Path, *, direct: bool) -> int:
    """Open for reading; returns a descriptor. Does not wait for a writer if it is a FIFO."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS | (os.O_DIRECT if direct else 0))


def open_new(path: Path, *, direct: bool) -> int:
    """Create a file that must not exist, for writing; returns a descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
    return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)


def read_all(fd: int, buffers: Sequence[memoryview]) -> int:
    """Fill ``buffers`` in order from the file's start; returns the bytes read, fewer at its end."""
    done, total = 0, sum(len(buffer) for buffer in buffers)
    while done < total:
        count = os.preadv(fd, _rest(buffers, done), done)
        done += count
        # After an unaligned count there can be no next direct read: it is the end of the file.
        if count == 0 or count % ALIGNMENT_BYTES:
            break
    return done


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    rest: list[memoryview] = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(done - len(buffer), 0)
    return rest
