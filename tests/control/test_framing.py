"""Framed messages and descriptors over a Unix socket, and the engine's link built on them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dualpath.control.framing import FramedSocket
from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.errors import IncompatiblePeer, PeerLost, ProtocolError, TransferTimeout
from vllm_dualpath.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Attached,
    PersistSlots,
    Release,
    TransferKey,
    encode,
)

WAIT_S = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[FramedSocket, FramedSocket]]:
    left, right = (FramedSocket(each) for each in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def exchange(sender: FramedSocket, receiver: FramedSocket, num_messages: int) -> list[bytes]:
    """Flush one side and read the other until the messages are there."""
    messages: list[bytes] = []
    while len(messages) < num_messages:
        sender.flush()
        readable, _, _ = select.select([receiver], [], [], WAIT_S)
        assert readable, "nothing came"
        messages += receiver.receive()
    return messages


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=20))
def test_any_messages(payloads: list[bytes]) -> None:
    """Messages of any content arrive whole and in order."""
    left, right = (FramedSocket(each) for each in socket.socketpair())
    for payload in payloads:
        left.send(payload)
    assert exchange(left, right, len(payloads)) == payloads
    left.close()
    right.close()


def test_any_split(pair: tuple[FramedSocket, FramedSocket]) -> None:
    """A stream that arrives byte by byte gives the same messages."""
    raw, end = socket.socketpair()
    receiver = FramedSocket(end)
    messages = []
    for byte in struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0) + struct.pack("<I", 1) + b"d":
        raw.sendall(bytes([byte]))
        messages += receiver.receive()
    assert messages == [b"abc", b"", b"d"]
    raw.close()
    receiver.close()


def test_huge_message(pair: tuple[FramedSocket, FramedSocket]) -> None:
    """The largest message takes many turns of both sides; the sender never blocks."""
    left, right = pair
    payload = os.urandom(1 << 20) * (MAX_MESSAGE_BYTES >> 20)
    left.send(payload)
    assert left.wants_write
    assert exchange(left, right, 1) == [payload]
    assert not left.wants_write


def test_too_long_a_message(pair: tuple[FramedSocket, FramedSocket]) -> None:
    """A length beyond the limit is an error before any memory is taken for it."""
    raw, end = socket.socketpair()
    receiver = FramedSocket(end)
    raw.sendall(struct.pack("<I", MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="at most"):
        receiver.receive()
    raw.close()
    receiver.close()


def test_descriptors(pair: tuple[FramedSocket, FramedSocket]) -> None:
    """Descriptors arrive with their message, refer to the same file, and are not inherited."""
    left, right = pair
    fds = [os.memfd_create(f"fd{idx}", os.MFD_CLOEXEC) for idx in range(3)]
    for idx, fd in enumerate(fds):
        os.write(fd, bytes([idx]))
    left.send(b"x" * 300_000, fds)
    assert len(exchange(left, right, 1)[0]) == 300_000
    received = right.take_fds()
    assert right.take_fds() == []
    for idx, (sent, got) in enumerate(zip(fds, received, strict=True)):
        assert os.pread(got, 1, 0) == bytes([idx])
        assert os.fstat(got).st_ino == os.fstat(sent).st_ino
        assert fcntl.fcntl(got, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    for fd in (*fds, *received):
        os.close(fd)


def test_end_of_stream(pair: tuple[FramedSocket, FramedSocket]) -> None:
    """What was sent before the end is delivered first; then both directions say ``PeerLost``."""
    left, right = pair
    left.send(b"last words")
    left.close()
    assert right.receive() == [b"last words"]
    with pytest.raises(PeerLost):
        right.receive()
    with pytest.raises(PeerLost):
        right.send(b"anybody?")


# --- link ----------------------------------------------------------------------------------------


class Listener:
    """A socket on which a mover is played."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._socket.settimeout(WAIT_S)

    def accept(self) -> FramedSocket:
        return FramedSocket(self._socket.accept()[0])

    def close(self) -> None:
        self._socket.close()


def attached(version: int = PROTOCOL_VERSION) -> bytes:
    return encode(
        Attached(
            version=version,
            boot_id=bytes(16),
            pid=1,
            staging_bytes=0,
            slot_bytes=0,
            num_slots=0,
            table_capacity=0,
            table_max_blocks=0,
            index_capacity_blocks=0,
        )
    )


def test_link(tmp_path: Path) -> None:
    """Messages pass both ways; when the mover goes, ``on_close`` runs once and ``send`` says so."""
    listener = Listener(tmp_path / "sock")
    received: list[object] = []
    came, gone = threading.Event(), threading.Event()

    def on_message(message: object) -> None:
        received.append(message)
        came.set()

    link = EngineLink(tmp_path / "sock", "worker", on_message, lambda _: gone.set())
    peers: list[FramedSocket] = []

    def serve() -> None:
        peer = listener.accept()
        peers.append(peer)
        peer.send(attached())
        peer.send(encode(PersistSlots((1, 2))))

    server = threading.Thread(target=serve)
    server.start()
    answer, fds = link.connect(WAIT_S)
    server.join(WAIT_S)
    assert (answer.version, fds) == (PROTOCOL_VERSION, [])
    assert came.wait(WAIT_S)
    assert received == [PersistSlots((1, 2))]
    key = TransferKey(bytes(16), 0)
    assert link.send(Release(key))
    frames = exchange(peers[0], peers[0], 2)
    assert frames[1] == encode(Release(key))
    peers[0].close()
    assert gone.wait(WAIT_S)
    assert not link.is_open
    assert not link.send(Release(key))
    link.close()
    listener.close()


def test_link_sends_what_is_queued_before_it_closes(tmp_path: Path) -> None:
    """``close`` lets go only when everything has left, and does not call ``on_close``."""
    listener = Listener(tmp_path / "sock")
    closed: list[str] = []
    link = EngineLink(tmp_path / "sock", "worker", lambda _: None, closed.append)
    peers: list[FramedSocket] = []

    def serve() -> None:
        peers.append(listener.accept())
        peers[0].send(attached())

    server = threading.Thread(target=serve)
    server.start()
    link.connect(WAIT_S)
    server.join(WAIT_S)
    for attempt in range(100):
        link.send(Release(TransferKey(bytes(16), attempt)))
    link.close()
    assert not closed
    assert len(exchange(peers[0], peers[0], 101)) == 101
    listener.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (attached(version=99), IncompatiblePeer),
        (encode(PersistSlots(())), IncompatiblePeer),
        (b"garbage", ProtocolError),
        (None, PeerLost),
    ],
    ids=["version", "type", "garbage", "closed"],
)
def test_link_refuses(tmp_path: Path, answer: bytes | None, error: type[Exception]) -> None:
    """A mover of another version, or something else on the socket, is refused with its reason."""
    listener = Listener(tmp_path / "sock")

    def serve() -> None:
        peer = listener.accept()
        exchange(peer, peer, 1)
        if answer is not None:
            peer.send(answer)
        peer.close()

    server = threading.Thread(target=serve)
    server.start()
    link = EngineLink(tmp_path / "sock", "worker", lambda _: None, lambda _: None)
    with pytest.raises(error):
        link.connect(WAIT_S)
    server.join(WAIT_S)
    link.close()
    listener.close()


def test_link_without_a_mover(tmp_path: Path) -> None:
    """Nobody listens: the wait has an end."""
    link = EngineLink(tmp_path / "nobody", "worker", lambda _: None, lambda _: None)
    with pytest.raises(TransferTimeout, match="listen"):
        link.connect(0.1)
    assert not link.send(Release(TransferKey(bytes(16), 0)))


def test_link_of_a_process_with_many_files(tmp_path: Path) -> None:
    """A server has thousands of connections: descriptors beyond 1023 are as good as others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    listener = Listener(tmp_path / "sock")
    peers: list[FramedSocket] = []

    def serve() -> None:
        peers.append(listener.accept())
        peers[0].send(attached())

    server = threading.Thread(target=serve)
    server.start()
    link = EngineLink(tmp_path / "sock", "worker", lambda _: None, lambda _: None)
    with contextlib.ExitStack() as files:
        try:
            for _ in range(1100):
                files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            answer, _ = link.connect(WAIT_S)
            assert answer.version == PROTOCOL_VERSION
        finally:
            server.join(WAIT_S)
            link.close()
            peers[0].close()
            listener.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
