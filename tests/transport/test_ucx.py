from __future__ import annotations

import os
import select
import time

import numpy as np
import pytest

from tests.transport.contract import NUM_BYTES, Pair, TransportContract
from tests.transport.target import Memory
from vllm_dualpath import native
from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport import PeerClosed, PutDone
from vllm_dualpath.transport.ucx import UcxTransport

TCP_ONLY = {"UCX_TLS": "tcp,self"}


class UcxContract(TransportContract):
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


class TestStores(UcxContract):
    """Two processes of one host, one of which maps the other's memory."""

    def test_puts_need_no_answer(self, pair: Pair) -> None:
        """A stopped target does not hold up bytes, only what tells it of them."""
        pair.put_and_wait((0, 0, 8), notice=b"connected")
        with pair.target.stopped():
            pair.put_and_wait((0, 0, NUM_BYTES))

    def test_a_process_that_took_the_pid_is_not_written(self, pair: Pair) -> None:
        """A descriptor that now means another file is refused, and another way found."""
        other = Memory(NUM_BYTES)
        stat = os.fstat(other.fd)
        with pytest.raises(RuntimeError, match="not the peer's memory"):
            native.PeerMemory(
                os.getpid(), pair.memory.fd, stat.st_dev, stat.st_ino, other.address, NUM_BYTES
            )

    def test_memory_shorter_than_it_says(self) -> None:
        """A mapping that would end in a bus error is refused."""
        memory = Memory(4096)
        stat = os.fstat(memory.fd)
        with pytest.raises(RuntimeError, match="has 4096 bytes"):
            native.PeerMemory(
                os.getpid(), memory.fd, stat.st_dev, stat.st_ino, memory.address, 8192
            )

    def test_memory_that_may_shrink(self) -> None:
        """So is one whose owner could shorten it later."""
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, 4096)
        stat = os.fstat(fd)
        with pytest.raises(RuntimeError, match="may shrink"):
            native.PeerMemory(os.getpid(), fd, stat.st_dev, stat.st_ino, 4096, 4096)


class TestCma(UcxContract):
    """Two processes of one host that may write each other's memory, but not map it."""

    share = False


class TestWithoutSharedMemory(UcxContract):
    """Two processes of one host with the network alone between them."""

    environment = TCP_ONLY


class TestBetweenHosts(UcxContract):
    """Through the listener, with UCX's peer failure handling."""

    same_host = False
    environment = TCP_ONLY

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


def test_listens_only_where_told() -> None:
    """A host name or a foreign address is a TransportError, not a surprise."""
    for host in ("localhost.invalid", "203.0.113.1"):
        with pytest.raises(TransportError):
            UcxTransport(host)


def test_wildcard_needs_an_address_to_advertise() -> None:
    """Peers cannot connect to 0.0.0.0."""
    with pytest.raises(TransportError, match="advertise_host"):
        UcxTransport("0.0.0.0")
    UcxTransport("0.0.0.0", advertise_host="127.0.0.1").close()


def test_peer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to a closed listener ends in PeerClosed, and puts before it in PutDone."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    gone, transport = UcxTransport(), UcxTransport()
    memory = Memory(4096)
    region = gone.register(memory.address, 4096)
    transport.register(memory.address, 4096)
    address = gone.address
    gone.close()
    peer_id = transport.connect(address, region.descriptor, same_host=False)
    try:
        assert select.select([transport.fileno()], [], [], 10)[0]
        time.sleep(0.1)
        assert [type(event) for event in transport.poll()] == [PeerClosed]
        with pytest.raises(PeerLost):
            transport.put(peer_id, np.zeros((0, 3), dtype=np.uint64), b"")
    finally:
        transport.close()
