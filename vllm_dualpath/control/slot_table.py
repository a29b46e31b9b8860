"""The table through which a mover tells its engine which slots hold a transfer's KV.

Two shared mappings. The *table* is written by the mover and mapped read-only by the engine: one
entry a published transfer. The *claims* are one 64-bit word an entry, changed by both sides with
compare-exchange:

    bits 63..32  generation of the entry, so that a stale look never claims a reused entry
    bits 31..8   claims taken
    bits  7..0   state: FREE, READY, DEAD

A claim succeeds only on READY, retiring only while claims == releases: whichever comes first wins,
and the other side sees it. So a leg that arrives late finds nothing, and slots an engine may copy
from are never freed.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_dualpath import native
from vllm_dualpath.errors import StagingFull
from vllm_dualpath.messages import TransferKey

_FREE, _READY, _DEAD = 0, 1, 2
_CLAIM_UNIT = 1 << 8
_CLAIM_MASK = 0xFFFFFF << 8
_STATE_MASK = 0xFF


@dataclass(frozen=True, slots=True)
class ClaimedTransfer:
    """What one claim gives: the slots may be read until its ``Release`` is sent."""

    key: TransferKey
    entry: int
    num_cached_blocks: int
    """Leading hit blocks that are not in the slots but in the engine's own prefix cache."""
    num_hit_blocks: int
    num_tokens: int
    digest: bytes
    slots: tuple[int, ...]


def entry_dtype(max_blocks: int) -> np.dtype[np.void]:
    """Layout of one table entry."""
    return np.dtype(
        [
            ("transfer", np.uint64, (2,)),
            ("attempt", np.uint32),
            ("num_slots", np.uint32),
            ("num_cached_blocks", np.uint32),
            ("num_hit_blocks", np.uint32),
            ("num_tokens", np.uint32),
            ("digest", np.uint8, (32,)),
            ("slots", np.uint32, (max_blocks,)),
        ]
    )


def table_bytes(capacity: int, max_blocks: int) -> int:
    """Bytes of the table mapping."""
    return capacity * entry_dtype(max_blocks).itemsize


def claims_bytes(capacity: int) -> int:
    """Bytes of the claims mapping."""
    return capacity * 8


class _SharedTable:
    """Both mappings as numpy views."""

    def __init__(self, table: mmap.mmap, claims: mmap.mmap, capacity: int, max_blocks: int) -> None:
        self._capacity = capacity
        self._max_blocks = max_blocks
        self._entries: npt.NDArray[np.void] = np.frombuffer(
            table, dtype=entry_dtype(max_blocks), count=capacity
        )
        self._words: npt.NDArray[np.uint64] = np.frombuffer(claims, dtype=np.uint64, count=capacity)
        self._words_address = self._words.ctypes.data

    @property
    def max_blocks(self) -> int:
        """Slots that an entry can name."""
        return self._max_blocks

    def _word_address(self, entry: int) -> int:
        return self._words_address + 8 * entry


class SlotTableWriter(_SharedTable):
    """The mover's side. One owner thread."""

    def __init__(self, table: mmap.mmap, claims: mmap.mmap, capacity: int, max_blocks: int) -> None:
        super().__init__(table, claims, capacity, max_blocks)
        self._free = list(range(capacity - 1, -1, -1))
        self._generations = [0] * capacity

    def publish(
        self,
        key: TransferKey,
        num_hit_blocks: int,
        num_tokens: int,
        digest: bytes,
        slots: Sequence[int],
        num_cached_blocks: int = 0,
    ) -> int:
        """Write an entry and make it claimable; return its index. Raises ``StagingFull``."""
        if not self._free:
            raise StagingFull(f"slot table: all {self._capacity} entries are published")
        entry = self._free.pop()
        row = self._entries[entry]
        row["transfer"] = np.frombuffer(key.transfer, dtype=np.uint64)
        row["attempt"] = key.attempt
        row["num_cached_blocks"] = num_cached_blocks
        row["num_hit_blocks"] = num_hit_blocks
        row["num_tokens"] = num_tokens
        row["digest"] = np.frombuffer(digest, dtype=np.uint8)
        row["num_slots"] = len(slots)
        row["slots"][: len(slots)] = slots
        self._generations[entry] = (self._generations[entry] + 1) & 0xFFFFFFFF
        native.atomic_store_u64(self._word_address(entry), self._generations[entry] << 32 | _READY)
        return entry

    def retire(self, entry: int, num_releases: int) -> bool:
        """Make the entry unclaimable if every claim taken has been released. False:
        claims are open.
        """
        base = self._generations[entry] << 32
        expected = base | num_releases << 8 | _READY
        done, observed = native.atomic_compare_exchange_u64(
            self._word_address(entry), expected, base | _DEAD
        )
        return done or observed & _STATE_MASK == _DEAD

    def num_claims(self, entry: int) -> int:
        """Claims taken so far of a published entry."""
        return (native.atomic_load_u64(self._word_address(entry)) & _CLAIM_MASK) >> 8

    def free(self, entry: int) -> None:
        """Give a retired entry back for reuse."""
        self._entries[entry]["transfer"] = 0
        native.atomic_store_u64(self._word_address(entry), self._generations[entry] << 32 | _FREE)
        self._free.append(entry)


class SlotTableReader(_SharedTable):
    """The engine's side. One owner thread; never blocks."""

    def claim(self, key: TransferKey) -> ClaimedTransfer | None:
        """Claim the transfer's slots, or ``None`` if it is not published (ended, or never was).

        Every claim obliges the engine to send one ``Release`` for the key.
        """
        wanted = np.frombuffer(key.transfer, dtype=np.uint64)
        transfers = self._entries["transfer"]
        matches = (transfers[:, 0] == wanted[0]) & (transfers[:, 1] == wanted[1])
        for entry in np.flatnonzero(matches).tolist():
            claimed = self._claim_entry(entry, key)
            if claimed is not None:
                return claimed
        return None

    def _claim_entry(self, entry: int, key: TransferKey) -> ClaimedTransfer | None:
        """Read the word, then the entry, then swap that very word.

        A reused entry has another generation, so a swap that succeeds proves that what was read
        between is whole.
        """
        address = self._word_address(entry)
        word = native.atomic_load_u64(address)
        while word & _STATE_MASK == _READY:
            candidate = self._read(entry)
            if candidate.key != key:
                return None
            done, word = native.atomic_compare_exchange_u64(address, word, word + _CLAIM_UNIT)
            if done:
                return candidate
        return None

    def _read(self, entry: int) -> ClaimedTransfer:
        row = self._entries[entry]
        num_slots = min(int(row["num_slots"]), self._max_blocks)
        return ClaimedTransfer(
            key=TransferKey(row["transfer"].tobytes(), int(row["attempt"])),
            entry=entry,
            num_cached_blocks=int(row["num_cached_blocks"]),
            num_hit_blocks=int(row["num_hit_blocks"]),
            num_tokens=int(row["num_tokens"]),
            digest=row["digest"].tobytes(),
            slots=tuple(row["slots"][:num_slots].tolist()),
        )
