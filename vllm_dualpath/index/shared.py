"""A set of block hashes in shared memory: one writer, readers in other processes without locks.

A scheduler asks on every request how much of a prompt is stored and must wait for nobody; the
process that owns the store keeps the answer here. A reader that races with the writer may miss a
stored block or see one that is gone. Both are harmless, since every block read is verified; what a
reader can never see is an exception or an endless loop.

Layout, in 64-bit words of the host's order: 8 header words, then ``num_slots`` (a power of two)
slots of four words, one hash each. Open addressing with linear probing. A slot's first word is also
its state (``_EMPTY``, ``_TOMBSTONE``, or else taken), and is written last when a hash comes and
first when it goes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm_dualpath.blocks import HASH_BYTES
from vllm_dualpath.errors import IncompatiblePeer

_MAGIC = int.from_bytes(b"DPINDEX1", "little")
_WORD_BYTES = 8
_HEADER_WORDS = 8
_SLOT_WORDS = HASH_BYTES // _WORD_BYTES
_MAGIC_AT, _CAPACITY_AT, _COUNT_AT = 0, 1, 2

# A SHA-256 whose first word is one of these (one in 2^63) is simply never indexed.
_EMPTY = 0
_TOMBSTONE = (1 << 64) - 1

_unpack = struct.Struct("=4Q").unpack


class SharedIndex:
    """The layout that writer and reader share. ``close`` lets go of the buffer."""

    def __init__(self, buffer: Any, capacity: int) -> None:
        self._capacity = capacity
        self._num_slots = num_slots(capacity)
        words = memoryview(buffer).cast("B")
        if words.nbytes < self.size_bytes(capacity):
            raise ValueError(
                f"shared index of {capacity} blocks: expected {self.size_bytes(capacity)} bytes,"
                f" found {words.nbytes}"
            )
        self._words = words[: self.size_bytes(capacity)].cast("Q")
        self._end = len(self._words)

    @staticmethod
    def size_bytes(capacity: int) -> int:
        """Bytes of the buffer for ``capacity`` blocks."""
        return (_HEADER_WORDS + num_slots(capacity) * _SLOT_WORDS) * _WORD_BYTES

    @property
    def capacity(self) -> int:
        """Blocks that the index can hold."""
        return self._capacity

    def __len__(self) -> int:
        return self._words[_COUNT_AT]

    def __contains__(self, block_hash: bytes) -> bool:
        return self._find(block_hash) >= 0

    def close(self) -> None:
        """Release the view, so that the buffer can be closed. The index is unusable afterwards."""
        self._words.release()

    def _find(self, block_hash: bytes) -> int:
        """The position of the slot that holds ``block_hash``, or -1."""
        words, (first, second, third, fourth) = self._words, _unpack(block_hash)
        if first in (_EMPTY, _TOMBSTONE):
            return -1
        at = self._start(first)
        for _ in range(self._num_slots):  # bounded, whatever a racing writer does
            word = words[at]
            if word == _EMPTY:
                return -1
            if (
                word == first
                and words[at + 1] == second
                and words[at + 2] == third
                and words[at + 3] == fourth
            ):
                return at
            at += _SLOT_WORDS
            if at == self._end:
                at = _HEADER_WORDS
        return -1

    def _start(self, first: int) -> int:
        """Where the search for a hash with this first word begins."""
        return _HEADER_WORDS + (first & (self._num_slots - 1)) * _SLOT_WORDS


class SharedIndexReader(SharedIndex):
    """Looks up hashes; never writes. Raises ``IncompatiblePeer`` for a buffer of another layout."""

    def __init__(self, buffer: Any) -> None:
        view = memoryview(buffer).cast("B")
        if view.nbytes < _HEADER_WORDS * _WORD_BYTES:
            raise IncompatiblePeer(f"shared index: {view.nbytes} bytes are too few for a header")
        magic, capacity = struct.unpack_from("=QQ", view)
        if magic != _MAGIC or view.nbytes < self.size_bytes(capacity):
            raise IncompatiblePeer(
                f"shared index: magic {magic:#x} and capacity {capacity} in {view.nbytes} bytes:"
                f" expected magic {_MAGIC:#x}; both sides must run the same version"
            )
        super().__init__(view, capacity)

    def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many leading ``hashes`` are stored, as far as can be seen right now."""
        find = self._find
        for num_found, block_hash in enumerate(hashes):
            if find(block_hash) < 0:
                return num_found
        return len(hashes)


class SharedIndexWriter(SharedIndex):
    """The only writer; starts with an empty set. Owned by one thread."""

    def __init__(self, buffer: Any, capacity: int) -> None:
        super().__init__(buffer, capacity)
        self._num_used = 0
        """Slots taken or tombstones: what makes probes long."""
        self.clear()
        self._words[_CAPACITY_AT] = capacity
        self._words[_MAGIC_AT] = _MAGIC

    def add(self, block_hash: bytes) -> bool:
        """Insert a hash. False when the index is full: the block is then missed, never lost."""
        if self._find(block_hash) >= 0:
            return True
        first, *rest = _unpack(block_hash)
        if len(self) >= self._capacity or first in (_EMPTY, _TOMBSTONE):
            return False
        # At most 3/4 of the slots are ever used, so every probe ends soon.
        if 4 * (self._num_used + 1) > 3 * self._num_slots:
            self.rebuild(list(self._hashes()))
        words = self._words
        at = self._start(first)
        while words[at] not in (_EMPTY, _TOMBSTONE):
            at = self._after(at)
        self._num_used += words[at] == _EMPTY
        words[at + 1], words[at + 2], words[at + 3] = rest
        words[at] = first
        words[_COUNT_AT] += 1
        return True

    def discard(self, block_hash: bytes) -> None:
        """Remove a hash if it is there."""
        at = self._find(block_hash)
        if at < 0:
            return
        words = self._words
        words[at] = _TOMBSTONE
        words[_COUNT_AT] -= 1
        # Tombstones before an empty slot stand in no probe's way.
        while words[at] == _TOMBSTONE and words[self._after(at)] == _EMPTY:
            words[at] = _EMPTY
            self._num_used -= 1
            at = self._before(at)

    def clear(self) -> None:
        """Remove everything."""
        self._words[_COUNT_AT] = 0
        self._num_used = 0
        slots = self._words[_HEADER_WORDS:].cast("B")
        slots[:] = bytes(slots.nbytes)

    def rebuild(self, hashes: Iterable[bytes]) -> None:
        """Hold exactly ``hashes``, as far as there is room. Readers miss blocks meanwhile."""
        known = list(hashes)
        self.clear()
        for block_hash in known:
            self.add(block_hash)

    def _hashes(self) -> Iterator[bytes]:
        for at in range(_HEADER_WORDS, self._end, _SLOT_WORDS):
            if self._words[at] not in (_EMPTY, _TOMBSTONE):
                yield self._words[at : at + _SLOT_WORDS].tobytes()

    def _after(self, at: int) -> int:
        return at + _SLOT_WORDS if at + _SLOT_WORDS < self._end else _HEADER_WORDS

    def _before(self, at: int) -> int:
        return (at if at > _HEADER_WORDS else self._end) - _SLOT_WORDS


def num_slots(capacity: int) -> int:
    """Slots for ``capacity`` blocks: the power of two at which they fill at most half."""
    if capacity < 1:
        raise ValueError(f"shared index: expected a positive capacity, found {capacity}")
    return 1 << (2 * capacity - 1).bit_length()
