"""The control network between the router and the movers: one ROUTER socket, many DEALERs.

Knows bytes and identities only; ``messages`` has the meaning. ZeroMQ reconnects by itself; its
heartbeats close connections whose other host is gone.
"""

from __future__ import annotations

import errno
from collections import deque
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from vllm_dualpath.control.curve import secure_client, secure_server
from vllm_dualpath.errors import ConfigError, PeerLost
from vllm_dualpath.messages import MAX_MESSAGE_BYTES

_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 6000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 2000


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
    """The router's end, for asyncio."""

    def __init__(self, endpoint: str, keys: Path | None) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _harden(self._socket)
        # An unknown identity is an error, not silence; a reconnecting peer takes over its identity.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._authenticator = None
        if keys is not None:
            self._authenticator = secure_server(
                zmq.Context.shadow(self._context.underlying), self._socket, keys
            )
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise ConfigError(
                f"control {endpoint}: cannot listen ({exc}); is another router running there?"
            ) from exc

    async def recv(self) -> tuple[bytes, bytes]:
        """The next (identity, payload); frames of another shape give an empty payload."""
        frames = await self._socket.recv_multipart()
        return frames[0], frames[1] if len(frames) == 2 else b""

    async def send(self, identity: bytes, payload: bytes) -> None:
        """Send to one peer. Raises ``PeerLost`` when no such peer is connected."""
        try:
            await self._socket.send_multipart([identity, payload])
        except zmq.ZMQError as exc:
            if exc.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise PeerLost(f"mover {identity.hex()[:12]} is not connected") from exc
            raise

    def close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close(0)
        self._context.term()


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
