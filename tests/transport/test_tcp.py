from __future__ import annotations

import select
import socket
import time
from contextlib import suppress

import msgspec
import numpy as np
import pytest

from tests.transport.contract import NUM_BYTES, Pair, RemoteContract
from tests.transport.target import DEADLINE_S, Memory
from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport import PeerClosed, PutDone
from vllm_dualpath.transport.frames import pack, unpack
from vllm_dualpath.transport.tcp import TcpTransport, _Address, _Descriptor


class TestTcp(RemoteContract):
    """Our own connections, large pieces by reference."""

    kind = "tcp"

    def test_pieces_of_every_size(self, pair: Pair) -> None:
        """Pieces sent by reference and gathered ones alternate without losing their order."""
        sizes = [1, 16 << 10, 100, (16 << 10) - 1, 1 << 20, 4096, 3, 40_001] * 20
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        places = np.random.default_rng(4).permutation(len(sizes)).tolist()
        remote = dict(
            zip(places, np.cumsum([0, *(sizes[i] for i in places)]).tolist()[:-1], strict=True)
        )
        pieces = [(offsets[i], remote[i], sizes[i]) for i in range(len(sizes))]
        pair.put_and_wait(*pieces)
        for local, where, size in pieces:
            assert pair.target.read(where, size) == pair.memory.registered[local : local + size]

    def test_a_stranger_is_turned_away(self, pair: Pair) -> None:
        """Without the token of the target's descriptor nothing is written and nobody noticed."""
        address, descriptor, _ = pair.hello
        region = unpack(descriptor, _Descriptor)
        forged = pack(msgspec.structs.replace(region, token=bytes(16)))
        stranger = pair.transport.connect(address, forged, same_host=False)
        try:
            put_id = pair.transport.put(stranger, pair.pieces((0, 0, 4096)), b"evil")
        except PeerLost:  # turned away already
            assert [type(event) for event in pair.events(1)] == [PeerClosed]
        else:
            events = pair.events(2)
            assert [type(event) for event in events] == [PutDone, PeerClosed]
            assert isinstance(events[0], PutDone)
            assert (events[0].put_id, events[0].ok) == (put_id, False)
        assert pair.target.next_notice(0, 0.1) is None
        assert pair.target.read(0, 4096) == bytes(4096)

    def test_noise_is_turned_away(self, pair: Pair) -> None:
        """Bytes that are no greeting end their connection and disturb no other."""
        address = unpack(pair.hello[0], _Address)
        for noise in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(100)):
            with socket.create_connection((address.host, address.port), DEADLINE_S) as stranger:
                stranger.sendall(noise)
                try:
                    assert stranger.recv(1) == b""
                except ConnectionResetError:
                    continue  # the end, with the rest of the noise unread
        pair.put_and_wait((0, 0, NUM_BYTES))

    @pytest.mark.parametrize("bad", ["outside", "pieces", "notice"])
    def test_a_peer_that_breaks_the_protocol(self, pair: Pair, bad: str) -> None:
        """One who knows the token can still write into the registered regions alone."""
        address = unpack(pair.hello[0], _Address)
        region = unpack(pair.hello[1], _Descriptor)
        outside = np.array([region.address + NUM_BYTES - 8, 16], "<u8").tobytes() + bytes(16)
        frames = {
            "outside": np.array([1], "<u8").tobytes() + np.array([1, 0], "<u4").tobytes() + outside,
            "pieces": np.array([1], "<u8").tobytes() + np.array([1 << 31, 0], "<u4").tobytes(),
            "notice": np.array([1], "<u8").tobytes() + np.array([0, 4097], "<u4").tobytes(),
        }
        with socket.create_connection((address.host, address.port), DEADLINE_S) as peer:
            peer.sendall(b"DPTCP\0\0\1" + region.token + frames[bad])
            with suppress(ConnectionResetError):  # as good an end
                assert peer.recv(1) == b""
        pair.put_and_wait((0, 0, 8), notice=b"alive")
        assert pair.target.next_notice(0, DEADLINE_S) == (b"alive", 0)

    def test_half_a_batch_is_not_noticed(self, pair: Pair) -> None:
        """A connection that ends inside a batch delivers no notice."""
        address = unpack(pair.hello[0], _Address)
        region = unpack(pair.hello[1], _Descriptor)
        head = np.array([1], "<u8").tobytes() + np.array([1, 4], "<u4").tobytes()
        piece = np.array([region.address, 1000], "<u8").tobytes()
        with socket.create_connection((address.host, address.port), DEADLINE_S) as peer:
            peer.sendall(b"DPTCP\0\0\1" + region.token + head + piece + b"half" + bytes(500))
        assert pair.target.next_notice(0, 0.2) is None


class TestTcpWithoutFile(RemoteContract):
    """Memory that is no shared file is gathered, whatever its size."""

    kind = "tcp"
    share = False


def test_listens_only_where_told() -> None:
    """A host name or a foreign address is a TransportError, not a surprise."""
    for host in ("localhost.invalid", "203.0.113.1"):
        with pytest.raises(TransportError):
            TcpTransport(host)
    with pytest.raises(TransportError, match="advertise_host"):
        TcpTransport("0.0.0.0")


def test_peer_that_is_not_there() -> None:
    """Connecting to a closed listener ends in PeerClosed, and puts before it in PutDone."""
    gone, transport = TcpTransport(), TcpTransport()
    memory = Memory(4096)
    region = gone.register(memory.address, 4096)
    transport.register(memory.address, 4096)
    address = gone.address
    gone.close()
    peer_id = transport.connect(address, region.descriptor, same_host=False)
    try:
        assert select.select([transport.fileno()], [], [], 10)[0]
        time.sleep(0.1)
        assert isinstance(transport.poll()[-1], PeerClosed)
        with pytest.raises(PeerLost):
            transport.put(peer_id, np.zeros((0, 3), dtype=np.uint64), b"")
    finally:
        transport.close()
