from __future__ import annotations

import hashlib
import mmap
import os
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_dualpath.errors import IncompatiblePeer
from vllm_dualpath.index import SharedIndex, SharedIndexReader, SharedIndexWriter

CAPACITY = 8


def name(idx: int) -> bytes:
    """Hashes that want one of two slots, and differ late, so that probes meet many of them."""
    return struct.pack("=4Q", 13 + idx % 2, 7, idx // 6, idx)


def shared_buffer(capacity: int) -> mmap.mmap:
    return mmap.mmap(-1, SharedIndex.size_bytes(capacity))


IDS = st.integers(1, 12)


class AgainstSet(RuleBasedStateMachine):
    """Without a race, a reader sees exactly the set."""

    def __init__(self) -> None:
        super().__init__()
        buffer = shared_buffer(CAPACITY)
        self.writer = SharedIndexWriter(buffer, CAPACITY)
        self.reader = SharedIndexReader(buffer)
        self.model: set[int] = set()

    @rule(idx=IDS)
    def add(self, idx: int) -> None:
        fits = idx in self.model or len(self.model) < CAPACITY
        assert self.writer.add(name(idx)) is fits
        if fits:
            self.model.add(idx)

    @rule(idx=IDS)
    def discard(self, idx: int) -> None:
        self.writer.discard(name(idx))
        self.model.discard(idx)

    @rule(ids=st.frozensets(IDS, max_size=CAPACITY))
    def rebuild(self, ids: frozenset[int]) -> None:
        self.writer.rebuild(name(idx) for idx in ids)
        self.model = set(ids)

    @rule()
    def clear(self) -> None:
        self.writer.clear()
        self.model.clear()

    @invariant()
    def reader_sees_the_set(self) -> None:
        assert {idx for idx in range(1, 13) if name(idx) in self.reader} == self.model
        assert len(self.reader) == len(self.model)

    @rule(ids=st.lists(IDS))
    def look_up(self, ids: list[int]) -> None:
        expected = next((at for at, idx in enumerate(ids) if idx not in self.model), len(ids))
        assert self.reader.longest_prefix([name(idx) for idx in ids]) == expected


TestAgainstSet = AgainstSet.TestCase
TestAgainstSet.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def test_churn_for_ever_does_not_slow_probes_down() -> None:
    """Tombstones are cleared away: after a thousand times its size a table has empty slots."""
    capacity = 64
    buffer = shared_buffer(capacity)
    writer, reader = SharedIndexWriter(buffer, capacity), SharedIndexReader(buffer)
    names = [hashlib.sha256(idx.to_bytes(4, "little")).digest() for idx in range(64_000)]
    for idx, block_hash in enumerate(names):
        assert writer.add(block_hash)
        if idx >= 40:
            writer.discard(names[idx - 40])
    assert reader.longest_prefix(names[-40:]) == 40
    assert writer._num_used <= 0.75 * 128 + 1


def test_tombstones_that_stand_before_taken_slots_are_cleared_away_as_well() -> None:
    """A stored block in every fourth slot keeps the tombstones between from being dropped."""
    capacity, num_slots = 64, 128
    buffer = shared_buffer(capacity)
    writer, reader = SharedIndexWriter(buffer, capacity), SharedIndexReader(buffer)
    at_slot = [struct.pack("=4Q", slot, 7, 7, slot) for slot in range(num_slots)]
    keepers = at_slot[3::4]
    for keeper in keepers:
        assert writer.add(keeper)
    for slot in reversed(range(num_slots)):
        if slot % 4 < 3:
            writer.add(at_slot[slot])
            writer.discard(at_slot[slot])
            assert writer._num_used <= num_slots * 3 // 4
    assert reader.longest_prefix(keepers) == len(keepers) == len(reader)


def test_hashes_that_look_like_a_slots_state_are_never_indexed() -> None:
    buffer = shared_buffer(CAPACITY)
    writer, reader = SharedIndexWriter(buffer, CAPACITY), SharedIndexReader(buffer)
    for odd in (bytes(32), b"\xff" * 32):
        assert not writer.add(odd)
        assert odd not in reader


def test_a_buffer_of_another_layout_is_refused() -> None:
    for buffer in (bytearray(8), bytearray(4096)):
        with pytest.raises(IncompatiblePeer, match="shared index"):
            SharedIndexReader(buffer)
    with pytest.raises(ValueError, match="expected"):
        SharedIndexWriter(bytearray(100), CAPACITY)
    whole = bytearray(SharedIndex.size_bytes(CAPACITY))
    SharedIndexWriter(whole, CAPACITY).close()
    with pytest.raises(IncompatiblePeer, match="capacity 8"):
        SharedIndexReader(whole[:-8])


def test_a_closed_index_lets_go_of_its_buffer() -> None:
    buffer = shared_buffer(CAPACITY)
    writer, reader = SharedIndexWriter(buffer, CAPACITY), SharedIndexReader(buffer)
    writer.close()
    reader.close()
    buffer.close()


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(min_size=512, max_size=512))
def test_a_reader_survives_any_bytes_in_the_slots(noise: bytes) -> None:
    """A racing writer can show no more than this: the answer may be wrong, but there is one."""
    buffer = shared_buffer(CAPACITY)
    SharedIndexWriter(buffer, CAPACITY)
    buffer[64:] = noise
    assert SharedIndexReader(buffer).longest_prefix([name(1), name(2)]) in (0, 1, 2)


def test_a_reader_in_another_process_races_with_the_writer() -> None:
    """What stays in the set is found while others come and go and the table is not rebuilt."""
    capacity = 4096
    buffer = shared_buffer(capacity)
    names = [hashlib.sha256(idx.to_bytes(4, "little")).digest() for idx in range(capacity)]
    writer = SharedIndexWriter(buffer, capacity)
    for block_hash in names[:1000]:
        writer.add(block_hash)
    child = os.fork()
    if child == 0:
        reader, end_s, ok = SharedIndexReader(buffer), time.monotonic() + 0.4, True
        while time.monotonic() < end_s:
            ok = ok and reader.longest_prefix(names[:1000]) == 1000
            ok = ok and 0 <= reader.longest_prefix(names[1000:]) <= capacity
        os._exit(0 if ok else 1)
    status = (0, 0)
    while status == (0, 0):
        for block_hash in names[1000:2000]:
            writer.add(block_hash)
        for block_hash in names[1000:2000]:
            writer.discard(block_hash)
        status = os.waitpid(child, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status[1]) == 0
    assert len(writer) == 1000
