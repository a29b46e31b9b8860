"""The slot table: claims, releases, reuse, and a reader in another process that hammers it."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event as EventType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_dualpath.control.slot_table import (
    SlotTableReader,
    SlotTableWriter,
    claims_bytes,
    table_bytes,
)
from vllm_dualpath.errors import StagingFull
from vllm_dualpath.messages import TransferKey

CAPACITY, MAX_BLOCKS = 4, 6
DIGEST = bytes(range(32))


def make_pair(capacity: int = CAPACITY) -> tuple[SlotTableWriter, SlotTableReader]:
    table = mmap.mmap(-1, table_bytes(capacity, MAX_BLOCKS))
    claims = mmap.mmap(-1, claims_bytes(capacity))
    return (
        SlotTableWriter(table, claims, capacity, MAX_BLOCKS),
        SlotTableReader(table, claims, capacity, MAX_BLOCKS),
    )


def key_of(number: int, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


@pytest.fixture
def pair() -> tuple[SlotTableWriter, SlotTableReader]:
    return make_pair()


def test_publish_and_claim(pair: tuple[SlotTableWriter, SlotTableReader]) -> None:
    """A claim gives all that was published, only under the very key and attempt."""
    writer, reader = pair
    entry = writer.publish(key_of(1, 2), 3, 4000, DIGEST, (5, 7, 9))
    claimed = reader.claim(key_of(1, 2))
    assert claimed is not None
    assert (claimed.key, claimed.num_hit_blocks, claimed.num_tokens) == (key_of(1, 2), 3, 4000)
    assert (claimed.digest, claimed.slots) == (DIGEST, (5, 7, 9))
    assert reader.claim(key_of(1, 3)) is None
    assert reader.claim(key_of(2, 2)) is None
    assert writer.num_claims(entry) == 1


def test_retire_waits_for_releases(pair: tuple[SlotTableWriter, SlotTableReader]) -> None:
    """An entry with open claims cannot be retired; a retired one cannot be claimed."""
    writer, reader = pair
    entry = writer.publish(key_of(1), 0, 1, DIGEST, (1,))
    assert reader.claim(key_of(1)) is not None
    assert reader.claim(key_of(1)) is not None
    assert not writer.retire(entry, 0)
    assert not writer.retire(entry, 1)
    assert reader.claim(key_of(1)) is not None
    assert writer.retire(entry, 3)
    assert writer.retire(entry, 3)
    assert reader.claim(key_of(1)) is None
    writer.free(entry)
    assert reader.claim(key_of(1)) is None


def test_full_table(pair: tuple[SlotTableWriter, SlotTableReader]) -> None:
    """One entry more than there is room for is refused, and possible again after a free."""
    writer, _ = pair
    entries = [writer.publish(key_of(idx), 0, 1, DIGEST, (idx,)) for idx in range(CAPACITY)]
    with pytest.raises(StagingFull):
        writer.publish(key_of(99), 0, 1, DIGEST, (9,))
    assert writer.retire(entries[2], 0)
    writer.free(entries[2])
    assert writer.publish(key_of(99), 0, 1, DIGEST, (9,)) == entries[2]


def test_table_cannot_be_written_by_the_engine() -> None:
    """A reader works on a mapping without write permission; the claims it may change."""
    table_fd = os.memfd_create("table", os.MFD_CLOEXEC)
    os.ftruncate(table_fd, table_bytes(CAPACITY, MAX_BLOCKS))
    claims = mmap.mmap(-1, claims_bytes(CAPACITY))
    writer = SlotTableWriter(mmap.mmap(table_fd, 0), claims, CAPACITY, MAX_BLOCKS)
    read_only = os.open(f"/proc/self/fd/{table_fd}", os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(PermissionError):
        mmap.mmap(read_only, 0)
    reader = SlotTableReader(
        mmap.mmap(read_only, 0, prot=mmap.PROT_READ), claims, CAPACITY, MAX_BLOCKS
    )
    writer.publish(key_of(1), 0, 1, DIGEST, (1, 2))
    claimed = reader.claim(key_of(1))
    assert claimed is not None
    assert claimed.slots == (1, 2)
    os.close(read_only)
    os.close(table_fd)


class TableMachine(RuleBasedStateMachine):
    """Against a model: which keys are ready, with how many claims and releases."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = make_pair()
        self.ready: dict[int, tuple[int, int, int]] = {}
        """By number: entry, claims, releases."""
        self.next_number = 1

    @rule(num_slots=st.integers(0, MAX_BLOCKS))
    def publish(self, num_slots: int) -> None:
        number = self.next_number
        slots = tuple(number * 10 + idx for idx in range(num_slots))
        if len(self.ready) == CAPACITY:
            with pytest.raises(StagingFull):
                self.writer.publish(key_of(number), 0, 1, DIGEST, slots)
            return
        self.next_number += 1
        self.ready[number] = (self.writer.publish(key_of(number), 0, 1, DIGEST, slots), 0, 0)

    @rule(number=st.integers(1, 12))
    def claim(self, number: int) -> None:
        claimed = self.reader.claim(key_of(number))
        assert (claimed is not None) == (number in self.ready)
        if claimed is not None:
            entry, claims, releases = self.ready[number]
            assert claimed.slots == tuple(number * 10 + idx for idx in range(len(claimed.slots)))
            self.ready[number] = (entry, claims + 1, releases)

    @rule(number=st.integers(1, 12))
    def release(self, number: int) -> None:
        if number in self.ready:
            entry, claims, releases = self.ready[number]
            self.ready[number] = (entry, claims, min(claims, releases + 1))

    @rule(number=st.integers(1, 12))
    def retire_and_free(self, number: int) -> None:
        if number in self.ready:
            entry, claims, releases = self.ready[number]
            assert self.writer.retire(entry, releases) == (claims == releases)
            if claims == releases:
                self.writer.free(entry)
                del self.ready[number]

    @invariant()
    def counts_agree(self) -> None:
        for entry, claims, _ in self.ready.values():
            assert self.writer.num_claims(entry) == claims


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTableMachine = TableMachine.TestCase


# --- two processes -------------------------------------------------------------------------------


def hammer(fds: tuple[int, int], stop: EventType, results: Any) -> None:
    """Claim whatever is there, check it, and report every claim."""
    reader = SlotTableReader(
        mmap.mmap(fds[0], 0, prot=mmap.PROT_READ), mmap.mmap(fds[1], 0), 2, MAX_BLOCKS
    )
    num_claims = dict.fromkeys(range(8), 0)
    num_torn = 0
    while not stop.is_set():
        for number in num_claims:
            claimed = reader.claim(key_of(number + 1))
            if claimed is not None:
                num_claims[number] += 1
                # Slots and token count are functions of key and round: a mix is a torn read.
                first = claimed.slots[0]
                whole = claimed.num_tokens == first and claimed.slots == (first,) * MAX_BLOCKS
                num_torn += not whole or first % 8 != number
    results.put((num_claims, num_torn))


@pytest.fixture
def shared_fds() -> Iterator[tuple[int, int]]:
    fds = (
        os.memfd_create("table", os.MFD_CLOEXEC),
        os.memfd_create("claims", os.MFD_CLOEXEC),
    )
    os.ftruncate(fds[0], table_bytes(2, MAX_BLOCKS))
    os.ftruncate(fds[1], claims_bytes(2))
    yield fds
    for fd in fds:
        os.close(fd)


def test_claims_race_with_retiring(shared_fds: tuple[int, int]) -> None:
    """No claim is lost, none succeeds after the retirement, none sees a torn or reused entry."""
    context = multiprocessing.get_context("fork")
    stop, results = context.Event(), context.Queue()
    child = context.Process(target=hammer, args=(shared_fds, stop, results))
    child.start()
    writer = SlotTableWriter(
        mmap.mmap(shared_fds[0], 0), mmap.mmap(shared_fds[1], 0), 2, MAX_BLOCKS
    )
    claims_seen = dict.fromkeys(range(8), 0)
    deadline = time.monotonic() + 1.5
    round_number = 0
    while time.monotonic() < deadline:
        number = round_number % 8
        entry = writer.publish(
            key_of(number + 1), 0, round_number, DIGEST, (round_number,) * MAX_BLOCKS
        )
        if round_number % 3 == 0:
            time.sleep(0.0002)
        # As a mover does: what was claimed is released some time, then the entry is retired.
        while not writer.retire(entry, released := writer.num_claims(entry)):
            pass
        claims_seen[number] += released
        writer.free(entry)
        round_number += 1
    stop.set()
    num_claims, num_torn = results.get(timeout=10)
    child.join(10)
    assert child.exitcode == 0
    assert num_torn == 0
    assert sum(num_claims.values()) > 0
    assert num_claims == claims_seen
