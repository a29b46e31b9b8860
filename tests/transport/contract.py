"""The rules of ``vllm_dualpath.transport.base``, as tests that every transport has to pass."""

from __future__ import annotations

import functools
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.transport.target import DEADLINE_S, Memory, ProcessTarget, Target
from vllm_dualpath import native
from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport import (
    Event,
    PeerClosed,
    PutArray,
    PutDone,
    Transport,
    make_transport,
)

NUM_BYTES = 32 << 20

# (local offset, remote offset, bytes) of pieces that no region holds
OUTSIDE = [
    (0, NUM_BYTES - 10, 11),
    (NUM_BYTES - 10, 0, 11),
    (-1, 0, 1),
    (0, -1, 1),
    (0, NUM_BYTES, 1),
    (NUM_BYTES, 0, 1),
    (0, 0, NUM_BYTES + 1),
    (0, 0, (1 << 64) - 1),
    (0, 0, 0),
]


@functools.cache
def random_bytes() -> bytes:
    """What the initiator's memory holds."""
    return np.random.default_rng(1).bytes(NUM_BYTES)


@dataclass
class Pair:
    """An initiator in this process, connected to a target."""

    transport: Transport
    memory: Memory
    target: Any
    target_address: int
    peer_id: int
    hello: tuple[bytes, bytes, int]

    def pieces(self, *pieces: tuple[int, int, int]) -> PutArray:
        """From (local offset, remote offset, bytes)."""
        array = np.array(pieces, dtype=np.uint64).reshape(-1, 3)
        return array + np.array([self.memory.address, self.target_address, 0], dtype=np.uint64)

    def put(self, *pieces: tuple[int, int, int], notice: bytes = b"") -> int:
        return self.transport.put(self.peer_id, self.pieces(*pieces), notice)

    def events(self, count: int, timeout_s: float = DEADLINE_S) -> list[Event]:
        """At least ``count`` events, or what came until the deadline."""
        events: list[Event] = []
        deadline = time.monotonic() + timeout_s
        while len(events) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.transport.fileno()], [], [], left)[0]:
                break
            events.extend(self.transport.poll())
        return events

    def put_and_wait(self, *pieces: tuple[int, int, int], notice: bytes = b"") -> None:
        put_id = self.put(*pieces, notice=notice)
        assert self.events(1) == [PutDone(put_id, True, "")]

    def notice(self, checked_bytes: int = 0) -> tuple[bytes, int] | None:
        return self.target.next_notice(checked_bytes, DEADLINE_S)


class TransportContract:
    """Subclasses choose the transport; ``pair`` is a connected one of it."""

    kind = "ucx"
    same_host = True
    in_child = True
    share = True
    """Whether the target offers its memory as a file."""
    environment: dict[str, str] = {}

    @pytest.fixture
    def pair(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        target = (ProcessTarget if self.in_child else Target)(self.kind, NUM_BYTES, self.share)
        transport = make_transport(self.kind)
        memory = Memory(NUM_BYTES)
        memory.registered[:] = random_bytes()
        transport.register(memory.address, NUM_BYTES)
        hello = target.hello()
        peer_id = transport.connect(hello[0], hello[1], same_host=self.same_host)
        yield Pair(transport, memory, target, hello[2], peer_id, hello)
        transport.close()
        if isinstance(target, ProcessTarget):
            target.kill()
        else:
            target.close()

    def test_bytes_arrive(self, pair: Pair) -> None:
        """A put writes its bytes, and nothing else, and ends in one PutDone."""
        pair.put_and_wait((100, 5000, 300))
        assert pair.target.read(5000, 300) == pair.memory.registered[100:400]
        assert pair.target.read(4000, 1000) == bytes(1000)
        assert pair.target.read(5300, 1000) == bytes(1000)
        assert pair.events(1, 0.1) == []

    def test_small_pieces_in_random_order(self, pair: Pair) -> None:
        """8192 scattered pieces are all visible when the notice is read."""
        order = np.random.default_rng(2).permutation(8192)
        pieces = [(int(local) * 4096, remote * 4096, 4096) for remote, local in enumerate(order)]
        pair.put(*pieces, notice=b"all")
        source = np.frombuffer(pair.memory.registered, dtype=np.uint8).reshape(8192, 4096)
        expected = np.ascontiguousarray(source[order])
        crc = native.crc32c(native.buffer_address(expected), NUM_BYTES)
        assert pair.notice(NUM_BYTES) == (b"all", crc)

    def test_notice_comes_after_its_bytes(self, pair: Pair) -> None:
        """A large batch is whole when its notice is read, time after time."""
        for repeat in range(4):
            pair.memory.registered[:8] = repeat.to_bytes(8, "little")
            put_id = pair.put((0, 0, NUM_BYTES), notice=b"large")
            assert pair.notice(NUM_BYTES) == (b"large", pair.memory.crc32c(0, NUM_BYTES))
            assert pair.events(1) == [PutDone(put_id, True, "")]

    def test_notices_keep_the_order_of_their_batches(self, pair: Pair) -> None:
        """The last notice covers earlier batches, also those without a notice of their own."""
        step = NUM_BYTES // 16
        ids = [
            pair.put((i * step, i * step, step), notice=b"" if i == 7 else bytes([i]))
            for i in range(16)
        ]
        expected = [bytes([i]) for i in range(16) if i != 7]
        notices = [pair.notice(NUM_BYTES) for _ in expected]
        assert [notice[0] if notice else None for notice in notices] == expected
        assert notices[-1] is not None
        assert notices[-1][1] == pair.memory.crc32c(0, NUM_BYTES)
        assert pair.events(16) == [PutDone(put_id, True, "") for put_id in ids]

    def test_a_batch_may_be_empty(self, pair: Pair) -> None:
        """A notice travels without pieces, and an empty batch without a notice still ends."""
        pair.put_and_wait(notice=b"alone")
        assert pair.notice() == (b"alone", 0)
        pair.put_and_wait()

    def test_the_same_batch_twice(self, pair: Pair) -> None:
        """A repeated batch is a batch: written again, reported again, noticed again."""
        ids = {pair.put((0, 64, 64), notice=b"again") for _ in range(2)}
        assert len(ids) == 2
        assert pair.notice() == pair.notice() == (b"again", 0)
        assert {event.put_id for event in pair.events(2) if isinstance(event, PutDone)} == ids

    def test_overlapping_and_adjacent_pieces(self, pair: Pair) -> None:
        """Merging neighbours changes nothing but speed."""
        pair.put_and_wait((0, 0, 10), (10, 10, 10), (20, 30, 10), (30, 20, 10), (0, 40, 10))
        source = pair.memory.registered
        expected = source[:20] + source[30:40] + source[20:30] + source[:10]
        assert pair.target.read(0, 50) == expected

    def test_size_of_a_notice(self, pair: Pair) -> None:
        """4096 bytes are a notice, one more is refused."""
        pair.put_and_wait(notice=bytes(4096))
        assert pair.notice() == (bytes(4096), 0)
        with pytest.raises(TransportError, match="4096"):
            pair.put(notice=bytes(4097))

    def test_pieces_outside_are_refused(self, pair: Pair) -> None:
        """One bad piece refuses the whole batch before a byte of it is written."""
        good = [pair.memory.address, pair.target_address, 8]
        for local, remote, num_bytes in OUTSIDE:
            bad = [
                (pair.memory.address + local) % (1 << 64),
                (pair.target_address + remote) % (1 << 64),
                num_bytes,
            ]
            with pytest.raises(TransportError):
                pair.transport.put(pair.peer_id, np.array([good, bad], dtype=np.uint64), b"bad")
        pair.put_and_wait((0, 8, 8))
        assert pair.target.read(0, 8) == bytes(8)
        assert pair.target.next_notice(0, 0.05) is None

    def test_shape_of_pieces(self, pair: Pair) -> None:
        """Anything but rows of three numbers is refused."""
        with pytest.raises(TransportError):
            pair.transport.put(pair.peer_id, np.zeros((4, 2), dtype=np.uint64), b"")

    def test_bad_addresses_are_refused(self, pair: Pair) -> None:
        """Cut, damaged and mixed-up addresses and descriptors never reach the wire."""
        address, descriptor, _ = pair.hello
        own = pair.transport.register(pair.memory.address, 4096).descriptor
        damaged = descriptor[:20] + bytes([descriptor[20] ^ 1]) + descriptor[21:]
        for bad in [(b"", descriptor), (address, b""), (address[:-1], descriptor), (address, own)]:
            with pytest.raises(TransportError):
                pair.transport.connect(*bad, same_host=self.same_host)
        if self.kind != "loopback":
            with pytest.raises(TransportError, match="damaged"):
                pair.transport.connect(address, damaged, same_host=self.same_host)

    def test_unknown_peer(self, pair: Pair) -> None:
        """A peer id that was never given is a lost peer; closing it does nothing."""
        with pytest.raises(PeerLost):
            pair.transport.put(12345, pair.pieces((0, 0, 8)), b"")
        pair.transport.disconnect(12345)
        assert pair.events(1, 0.05) == []

    def test_disconnect_ends_every_put(self, pair: Pair) -> None:
        """Each put gets one outcome, then PeerClosed comes; the id is dead at once."""
        ids = [pair.put((0, 0, NUM_BYTES)) for _ in range(8)]
        pair.transport.disconnect(pair.peer_id)
        with pytest.raises(PeerLost):
            pair.put((0, 0, 8))
        events = pair.events(len(ids) + 1)
        done = [event for event in events if isinstance(event, PutDone)]
        assert [event.put_id for event in done] == ids
        assert isinstance(events[-1], PeerClosed)
        assert events[-1].peer_id == pair.peer_id
        assert len(events) == len(ids) + 1

    def test_connect_again_after_disconnect(self, pair: Pair) -> None:
        """A new connection to the same peer has a new id and works."""
        pair.put_and_wait((0, 0, 8))
        pair.transport.disconnect(pair.peer_id)
        assert isinstance(pair.events(1)[0], PeerClosed)
        address, descriptor, _ = pair.hello
        again = pair.transport.connect(address, descriptor, same_host=self.same_host)
        assert again != pair.peer_id
        pair.peer_id = again
        pair.put_and_wait((0, 64, 64), notice=b"again")
        assert pair.target.read(64, 64) == pair.memory.registered[:64]

    def test_fileno_is_readable_while_events_wait(self, pair: Pair) -> None:
        """The descriptor is quiet before, readable after, and quiet again once polled."""
        fd = pair.transport.fileno()
        assert select.select([fd], [], [], 0.05)[0] == []
        pair.put((0, 0, 8))
        assert select.select([fd], [], [], DEADLINE_S)[0] == [fd]
        assert select.select([fd], [], [], 0)[0] == [fd]
        assert len(pair.transport.poll()) == 1
        assert select.select([fd], [], [], 0.05)[0] == []

    def test_after_close(self, pair: Pair) -> None:
        """Closing twice is fine; puts are then refused, and those before it have ended."""
        put_id = pair.put((0, 0, NUM_BYTES))
        before = time.monotonic()
        pair.transport.close()
        pair.transport.close()
        assert time.monotonic() - before < 3
        done = [event for event in pair.transport.poll() if isinstance(event, PutDone)]
        assert [event.put_id for event in done] == [put_id]
        with pytest.raises(PeerLost):
            pair.put((0, 0, 8))
        with pytest.raises(TransportError):
            pair.transport.register(pair.memory.address, 8)

    def test_the_target_closes_first(self, pair: Pair) -> None:
        """A target that closes is no reason to hang, for either side."""
        pair.put_and_wait((0, 0, 8))
        assert pair.target.close() < 3
        before = time.monotonic()
        pair.transport.close()
        assert time.monotonic() - before < 3


class ProcessContract(TransportContract):
    """What only a transport with real peers can show: idle processes, dead and stopped ones."""

    def outcomes_after(self, pair: Pair, ids: list[int]) -> None:
        """Every put ends once, then the peer is closed, by the transport or by disconnect."""
        pair.transport.disconnect(pair.peer_id)
        before = time.monotonic()
        events = pair.events(len(ids) + 1)
        assert time.monotonic() - before < 5
        assert [event.put_id for event in events if isinstance(event, PutDone)] == ids
        assert isinstance(events[-1], PeerClosed)

    def test_idle_processes_sleep(self, pair: Pair) -> None:
        """Connected and idle, neither side uses the CPU."""
        pair.put_and_wait((0, 0, NUM_BYTES), notice=b"warm")
        before = time.process_time()
        assert pair.target.cpu_seconds_while_idle(1.0) < 0.1
        assert time.process_time() - before < 0.1

    def test_killed_target(self, pair: Pair) -> None:
        """Puts to a process killed under way all end, and closing does not hang."""
        pair.put_and_wait((0, 0, 8))
        ids = [pair.put((0, 0, NUM_BYTES)) for _ in range(8)]
        pair.target.kill()
        self.outcomes_after(pair, ids)
        before = time.monotonic()
        pair.transport.close()
        assert time.monotonic() - before < 4

    def test_target_killed_before_the_put(self, pair: Pair) -> None:
        """A put to a process long dead ends."""
        pair.put_and_wait((0, 0, 8))
        pair.target.kill()
        time.sleep(0.2)
        try:
            ids = [pair.put((0, 0, 4096), notice=b"late")]
        except PeerLost:
            ids = []
        self.outcomes_after(pair, ids)

    def test_close_with_a_killed_target(self, pair: Pair) -> None:
        """Closing right after a peer's death takes at most a few seconds."""
        pair.put_and_wait((0, 0, 8))
        pair.put((0, 0, NUM_BYTES))
        pair.target.kill()
        before = time.monotonic()
        pair.transport.close()
        assert time.monotonic() - before < 4

    def test_stopped_target(self, pair: Pair) -> None:
        """A peer that is alive but does nothing cannot hold disconnect or close."""
        pair.put_and_wait((0, 0, 8))
        with pair.target.stopped():
            ids = [pair.put((0, 0, NUM_BYTES), notice=b"n") for _ in range(4)]
            # More notices than a shared-memory queue holds, so that some must wait for the target.
            ids += [pair.put(notice=bytes(4000)) for _ in range(2000)]
            time.sleep(0.1)
            self.outcomes_after(pair, ids)
            before = time.monotonic()
            pair.transport.close()
            assert time.monotonic() - before < 4

    def test_another_peer_is_not_disturbed(self, pair: Pair) -> None:
        """The death of one peer leaves the connection to another as it was."""
        other = type(pair.target)(self.kind, NUM_BYTES)
        address, descriptor, base = other.hello()
        other_id = pair.transport.connect(address, descriptor, same_host=self.same_host)
        pair.put_and_wait((0, 0, 8))
        ids = [pair.put((0, 0, NUM_BYTES)) for _ in range(4)]
        pair.target.kill()
        self.outcomes_after(pair, ids)
        pair.peer_id, pair.target_address = other_id, base
        pair.put_and_wait((0, 0, NUM_BYTES), notice=b"still here")
        assert other.next_notice(0, 5.0) == (b"still here", 0)
        other.kill()


class RemoteContract(ProcessContract):
    """What only a way between hosts can show: the loss of a peer, and of the way to it."""

    same_host = False

    def test_death_of_the_target_is_reported(self, pair: Pair) -> None:
        """PeerClosed arrives without a put and without disconnect."""
        pair.put_and_wait((0, 0, 8))
        pair.target.kill()
        (event,) = pair.events(1)
        assert isinstance(event, PeerClosed)
        with pytest.raises(PeerLost):
            pair.put((0, 0, 8))

    def test_writes_after_the_target_closed_are_rejected(self, pair: Pair) -> None:
        """A target that has destroyed its end sees no byte more, though its process lives."""
        pair.put_and_wait((0, 0, 4096))
        for _ in range(16):
            pair.put((0, 0, NUM_BYTES))
        pair.target.close()
        seen = pair.target.read(0, NUM_BYTES)
        pair.memory.registered[:] = b"\xa5" * NUM_BYTES
        try:
            for _ in range(4):
                pair.put((0, 0, NUM_BYTES))
        except PeerLost:
            pass
        events = pair.events(21, 2.0)
        assert isinstance(events[-1], PeerClosed)
        assert pair.target.read(0, NUM_BYTES) == seen
