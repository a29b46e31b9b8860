"""The control network: delivery, identities, and who is let in."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
import zmq

from tests.control.routers import CurveRouter, free_endpoint
from vllm_dualpath.control.bus import MoverSocket, RouterSocket
from vllm_dualpath.control.curve import create_keys
from vllm_dualpath.errors import ConfigError, PeerLost

WAIT_S = 10.0
REFUSED_S = 0.7


def receive(mover: MoverSocket) -> bytes:
    """The next message at a mover."""
    assert mover.socket.poll(int(WAIT_S * 1000)), "nothing came"
    return mover.receive()[0]


def send(mover: MoverSocket, payload: bytes) -> None:
    """Send, and wait for the connection if there is none yet."""
    mover.send(payload)
    deadline = time.monotonic() + WAIT_S
    while mover.wants_write and time.monotonic() < deadline:
        mover.socket.poll(50, zmq.POLLOUT)
        mover.flush()


def test_both_ways(tmp_path: Path) -> None:
    """Messages arrive whole, in order, under the mover's identity; odd frames as b''."""
    with CurveRouter(None) as router:
        mover = MoverSocket(router.endpoint, b"m" * 16, None)
        payloads = [b"a", b"", os.urandom(3 << 20)]
        for payload in payloads:
            send(mover, payload)
        assert [router.recv(WAIT_S) for _ in payloads] == [(b"m" * 16, each) for each in payloads]
        mover.socket.send_multipart([b"one", b"two"])
        assert router.recv(WAIT_S) == (b"m" * 16, b"")
        router.send(b"m" * 16, b"answer")
        assert receive(mover) == b"answer"
        mover.close()


def test_unknown_identity() -> None:
    """Sending to somebody who is not connected is an error, not silence."""
    with CurveRouter(None) as router, pytest.raises(PeerLost):
        router.send(b"x" * 16, b"hello?")


def test_endpoint_in_use() -> None:
    """A second router on one endpoint says so."""
    with CurveRouter(None) as router, pytest.raises(ConfigError, match="another router"):
        router._runner.run(_open(router.endpoint))


async def _open(endpoint: str) -> RouterSocket:
    return RouterSocket(endpoint, None)


def test_unsent_messages_wait_for_a_connection() -> None:
    """Without a router messages wait in order and can be forgotten; none is sent twice."""
    endpoint = free_endpoint()
    mover = MoverSocket(endpoint, b"m" * 16, None)
    mover.send(b"old")
    assert mover.wants_write
    mover.forget_unsent()
    mover.send(b"one")
    mover.send(b"two")
    router = CurveRouter(None, endpoint)
    send(mover, b"three")
    assert [router.recv(WAIT_S)[1] for _ in range(3)] == [b"one", b"two", b"three"]
    assert not mover.wants_write
    mover.close()
    router.__exit__(None, None, None)


def test_a_mover_that_reconnects_keeps_its_identity() -> None:
    """A second connection of an identity takes over from a dead first one."""
    with CurveRouter(None) as router:
        first = MoverSocket(router.endpoint, b"m" * 16, None)
        send(first, b"first")
        router.recv(WAIT_S)
        second = MoverSocket(router.endpoint, b"m" * 16, None)
        send(second, b"second")
        router.recv(WAIT_S)
        router.send(b"m" * 16, b"to the second")
        assert receive(second) == b"to the second"
        first.close()
        second.close()


def test_curve(tmp_path: Path) -> None:
    """With the cluster's keys messages pass; without, or with another cluster's, nothing does."""
    own, other = tmp_path / "own", tmp_path / "other"
    create_keys(own)
    create_keys(other)
    with CurveRouter(own) as router:
        for keys in (None, other):
            stranger = MoverSocket(router.endpoint, b"s" * 16, keys)
            stranger.send(b"let me in")
            with pytest.raises(TimeoutError):
                router.recv(REFUSED_S)
            stranger.close()
        mover = MoverSocket(router.endpoint, b"m" * 16, own)
        send(mover, b"hello")
        assert router.recv(WAIT_S) == (b"m" * 16, b"hello")
        router.send(b"m" * 16, b"welcome")
        assert receive(mover) == b"welcome"
        mover.close()


def test_wrong_client_key(tmp_path: Path) -> None:
    """Knowing the server's public key is not enough: only the cluster's client key is let in."""
    own, mixed = tmp_path / "own", tmp_path / "mixed"
    create_keys(own)
    create_keys(mixed)
    (mixed / "server.key").write_bytes((own / "server.key").read_bytes())
    with CurveRouter(own) as router:
        stranger = MoverSocket(router.endpoint, b"s" * 16, mixed)
        stranger.send(b"let me in")
        with pytest.raises(TimeoutError):
            router.recv(REFUSED_S)
        stranger.close()


def test_key_files(tmp_path: Path) -> None:
    """Secret halves are private, keys are never overwritten, missing ones are named."""
    files = create_keys(tmp_path / "keys")
    for path in files:
        secret = path.suffix == ".key_secret"
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if secret else 0o644)
    assert len(files) == 4
    with pytest.raises(ConfigError, match="already"):
        create_keys(tmp_path / "keys")
    (tmp_path / "keys" / "client.key_secret").unlink()
    with pytest.raises(ConfigError, match="client"):
        MoverSocket(free_endpoint(), b"m" * 16, tmp_path / "keys")
