"""The mover's end of the control network: registration, heartbeats, and noticing a lost router."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from vllm_dualpath.control.bus import MoverSocket
from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import (
    Goodbye,
    Hello,
    Load,
    MoverMessage,
    MoverStats,
    Ping,
    Pong,
    Refused,
    RouterMessage,
    Welcome,
    decode_router_message,
    encode,
)
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.loop import EventLoop

logger = logging.getLogger(__name__)

_HELLO_RETRY_S = 1.0
_REFUSED_RETRY_S = 30.0


class Registration(NamedTuple):
    """What a ``Hello`` says of the conversation itself."""

    number: int
    registered: bool
    num_sent: int


class RouterPort:
    """Says ``Hello`` until welcomed, then ``Load`` every heartbeat.

    ``on_message`` gets what concerns transfers and the store; ``on_welcome(send_snapshot)`` each
    registration; ``on_lost`` runs when the router was replaced, silent for ``lost_s``, or when a
    message was lost either way: its transfers are over. ``hello`` gets what only this port
    knows.

    A connection that breaks takes what was under way with it, and ZeroMQ makes another without a
    word. So both ends count, and compare with every heartbeat.
    """

    def __init__(
        self,
        socket: MoverSocket,
        loop: EventLoop,
        counters: Counters,
        hello: Callable[[Registration], Hello],
        stats: Callable[[], MoverStats],
        on_message: Callable[[RouterMessage], None],
        on_welcome: Callable[[bool], None],
        on_lost: Callable[[], None],
        lost_s: float,
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._counters = counters
        self._hello = hello
        self._stats = stats
        self._on_message = on_message
        self._on_welcome = on_welcome
        self._on_lost = on_lost
        self._lost_s = lost_s
        self._router_boot_id = b""
        """Empty while not registered."""
        self._registration = 0
        self._num_sent = 0
        self._num_heard = 0
        """Of the router, in this registration."""
        self._heard_s = loop.now_s()
        self._heartbeat_s = _HELLO_RETRY_S
        loop.watch(socket.socket, self._receive)
        self._tick()

    @property
    def registered(self) -> bool:
        return bool(self._router_boot_id)

    def send(self, message: MoverMessage) -> None:
        """Send if registered; what an unknown router would get is of no use to it."""
        if self._router_boot_id:
            self._send(message)

    def say_hello(self) -> None:
        """Register, or register again because what we say of ourselves changed."""
        if not self._router_boot_id:
            self._socket.forget_unsent()
        registration = Registration(
            self._registration, bool(self._router_boot_id), self._num_sent + 1
        )
        self._send(self._hello(registration))

    def close(self, reason: str) -> None:
        self.send(Goodbye(reason))
        self._router_boot_id = b""
        self._loop.unwatch(self._socket.socket)
        self._socket.close()

    def _send(self, message: MoverMessage) -> None:
        self._num_sent += not isinstance(message, Load)
        self._socket.send(encode(message))
        self._loop.want_write(self._socket.socket, self._socket.wants_write)

    def _tick(self) -> None:
        if not self._router_boot_id:
            self.say_hello()
        else:
            self._send_load()
            if self._loop.now_s() - self._heard_s > self._lost_s:
                logger.warning("router silent for %.0f s: its transfers end", self._lost_s)
                self._lose()
        self._loop.call_later(self._heartbeat_s, self._tick)

    def _send_load(self) -> None:
        self.send(Load(self._stats(), self._num_sent))

    def _lose(self) -> None:
        self._router_boot_id = b""
        # The Hello that follows is of another registration.
        self._registration += 1
        self._heartbeat_s = _HELLO_RETRY_S
        self._on_lost()

    def _receive(self) -> None:
        self._socket.flush()
        self._loop.want_write(self._socket.socket, self._socket.wants_write)
        for payload in self._socket.receive():
            try:
                message = decode_router_message(payload)
            except ProtocolError as exc:
                self._num_heard += 1
                self._counters.rejected_messages += 1
                logger.warning("router message rejected: %s", exc)
                continue
            self._heard_s = self._loop.now_s()
            self._num_heard += not isinstance(message, Ping | Pong)
            self._loop.guard(partial(self._handle, message))

    def _handle(self, message: RouterMessage) -> None:
        if isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Refused):
            logger.error("the router refuses this engine: %s", message.reason)
            if self._router_boot_id:
                self._lose()
            self._heartbeat_s = _REFUSED_RETRY_S
        elif isinstance(message, Pong):
            self._ponged(message)
        elif isinstance(message, Ping):
            self._send_load()
        elif self._router_boot_id:
            self._on_message(message)

    def _ponged(self, pong: Pong) -> None:
        if not self._router_boot_id:
            return
        if pong.router_boot_id != self._router_boot_id:
            logger.warning("the router was replaced: registering again")
        elif pong.num_sent not in (0, self._num_heard):
            logger.warning(
                "the router has sent %d messages and %d came: registering again",
                pong.num_sent,
                self._num_heard,
            )
        else:
            return
        self._lose()
        self.say_hello()

    def _welcomed(self, welcome: Welcome) -> None:
        if self._router_boot_id and self._router_boot_id != welcome.router_boot_id:
            # It has taken our last Hello for what it is: another registration would be news to it.
            self._router_boot_id = b""
            self._on_lost()
        if not self._router_boot_id:
            self._num_heard = welcome.num_sent
        self._router_boot_id = welcome.router_boot_id
        self._heartbeat_s = welcome.heartbeat_s
        logger.info("registered with the router")
        self._on_welcome(welcome.send_snapshot)
