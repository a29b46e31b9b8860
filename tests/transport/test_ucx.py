from __future__ import annotations

import os
import select
import time

import numpy as np
import pytest

from tests.transport.contract import NUM_BYTES, Pair, ProcessContract, RemoteContract
from tests.transport.target import Memory
from vllm_dualpath import native
from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport import PeerClosed
from vllm_dualpath.transport.ucx import UcxTransport

TCP_ONLY = {"UCX_TLS": "tcp,self"}


class TestStores(ProcessContract):
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


class TestCma(ProcessContract):
    """Two processes of one host that may write each other's memory, but not map it."""

    share = False


class TestWithoutSharedMemory(ProcessContract):
    """Two processes of one host with the network alone between them."""

    environment = TCP_ONLY


class TestBetweenHosts(RemoteContract):
    """Through the listener, with UCX's peer failure handling."""

    same_host = False
    environment = TCP_ONLY


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
