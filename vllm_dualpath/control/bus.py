"""The control network between the router and the movers: one ROUTER socket, many DEALERs.

Knows bytes and identities only; ``messages`` has the meaning. ZeroMQ reconnects by itself; its
heartbeats close connections whose other host is gone.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from vllm_dualpath.control.curve import secure_client, secure_server
from vllm_dualpath.errors import ConfigError, PeerLost
from vllm_dualpath.messages import MAX_MESSAGE_BYTES

_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 6000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2000
# Plain numbers: the library's flags are enumerations, whose every "or" and "and" makes an object.
_READABLE = int(zmq.POLLIN)
_AT_ONCE = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
_MESSAGES_A_TURN = 64
"""A flood of messages must not keep the event loop from everything else."""

Take = Callable[[bytes, bytes], None]


def _harden(socket: zmq.Socket[Any]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    # Queues are bounded by the protocol (a few messages a transfer); a full queue must not drop
    # any.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)


class RouterSocket:
    """The router's end, in the running event loop. Nothing here waits: no queue is ever full."""

    def __init__(self, endpoint: str, keys: Path | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _harden(self._socket)
        # An unknown identity is an error, not silence; a reconnecting peer takes over its identity.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._on_readable: Callable[[], None] | None = None
        self._soon: asyncio.Handle | None = None
        self._authenticator = None
        if keys is not None:
            self._authenticator = secure_server(self._context, self._socket, keys)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise ConfigError(
                f"control {endpoint}: cannot listen ({exc}); is another router running there?"
            ) from exc

    async def receive(self, take: Take) -> None:
        """Give every (identity, payload) to ``take`` until cancelled, also what has come before.

        Frames of another shape give an empty payload. Raises what ``take`` or the socket raises.
        """
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()

        def drain() -> None:
            try:
                self._drain(take)
            except Exception as exc:
                if not failed.done():
                    failed.set_exception(exc)

        fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(fd, drain)
        self._on_readable = drain
        self._look_again()
        try:
            await failed
        finally:
            loop.remove_reader(fd)
            self._on_readable = None
            if self._soon is not None:
                self._soon.cancel()

    def send(self, identity: bytes, payload: bytes) -> None:
        """Send to one peer. Raises ``PeerLost`` when no such peer is connected."""
        try:
            self._socket.send(identity, _MORE)
            self._socket.send(payload, _AT_ONCE)
        except zmq.ZMQError as exc:
            if exc.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise PeerLost(f"mover {identity.hex()[:12]} is not connected") from exc
            raise
        self._look_again()

    def close(self, linger_ms: int = 0) -> None:
        """Let go of the endpoint; what was sent last gets ``linger_ms`` to leave."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close(linger_ms)
        self._context.term()

    def _drain(self, take: Take) -> None:
        self._soon = None
        for _ in range(_MESSAGES_A_TURN):
            if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
                return
            frames = self._socket.recv_multipart(_AT_ONCE)
            take(frames[0], frames[1] if len(frames) == 2 else b"")
        self._look_again()

    def _look_again(self) -> None:
        # The descriptor tells of changes only, and sending takes in what has changed.
        if self._soon is None and self._on_readable is not None:
            self._soon = asyncio.get_running_loop().call_soon(self._on_readable)


class MoverSocket:
    """A mover's end, for its poll loop."""

    def __init__(self, endpoint: str, identity: bytes, keys: Path | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        _harden(self.socket)
        self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # Without this, what is sent to a router that is away piles up in a queue out of our reach,
        # ``Hello`` by ``Hello``, and floods it when it is back.
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self._unsent: deque[bytes] = deque()
        if keys is not None:
            secure_client(self.socket, keys)
        self.socket.connect(endpoint)

    def send(self, payload: bytes) -> None:
        """Send, or keep it while there is no connection; never blocks."""
        self._unsent.append(payload)
        self.flush()

    @property
    def wants_write(self) -> bool:
        """Messages wait: the owner polls for writing too, and then calls ``flush``."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what waits, in order, if there is a connection."""
        while self._unsent:
            try:
                self.socket.send(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._unsent.popleft()

    def forget_unsent(self) -> None:
        """Drop what waits for a connection: it was for a router that is no more."""
        self._unsent.clear()

    def receive(self) -> list[bytes]:
        """Every message that waits."""
        payloads = []
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            payloads.append(self.socket.recv(zmq.NOBLOCK))
        return payloads

    def close(self) -> None:
        self.socket.close(200)
        self._context.term()
