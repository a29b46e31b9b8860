"""A router that says what a test tells it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from tests.mover.material import WAIT_S, wait_for
from tests.mover.scripted_engine import MoverProcess
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Ended,
    Hello,
    Load,
    MoverMessage,
    Pong,
    RouterMessage,
    TransferFailed,
    TransferKey,
    Welcome,
    decode_mover_message,
    encode,
)

_T = TypeVar("_T")


class ScriptedRouter:
    """A ROUTER socket; answers ``Hello`` and ``Load`` unless told not to, while a test waits."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.boot_id = os.urandom(16)
        self.heartbeat_s = 0.05
        self.send_snapshot = False
        self.silent = False
        self.hellos: dict[bytes, Hello] = {}
        self.num_hellos = 0
        self.loads: dict[bytes, Load] = {}
        self.uncounted: dict[bytes, int] = {}
        """With its last heartbeat: what a mover says to have sent, less what came here."""
        self._num_heard: dict[bytes, int] = {}
        self._received: dict[bytes, list[MoverMessage]] = {}

    def send(self, mover: MoverProcess | bytes, message: RouterMessage) -> None:
        identity = mover if isinstance(mover, bytes) else mover.boot_id
        self.socket.send_multipart([identity, encode(message)])

    def pump(self, timeout_s: float = 0.0) -> None:
        """Take in what waits, at least one message if one comes within ``timeout_s``."""
        while self.socket.poll(int(timeout_s * 1000)):
            timeout_s = 0.0
            identity, payload = self.socket.recv_multipart()
            self._take(identity, decode_mover_message(payload))

    def _take(self, identity: bytes, message: MoverMessage) -> None:
        heard = self._num_heard.setdefault(identity, 0)
        self._num_heard[identity] = heard + (not isinstance(message, Load))
        if isinstance(message, Hello):
            self.hellos[identity] = message
            self.num_hellos += 1
            if not self.silent:
                welcome = Welcome(
                    PROTOCOL_VERSION, self.boot_id, self.heartbeat_s, self.send_snapshot
                )
                self.send(identity, welcome)
        elif isinstance(message, Load):
            self.loads[identity] = message
            self.uncounted[identity] = message.num_sent - self._num_heard[identity]
            if not self.silent:
                self.send(identity, Pong(self.boot_id))
        else:
            self._received.setdefault(identity, []).append(message)

    def received(self, mover: MoverProcess) -> list[MoverMessage]:
        """What came from a mover and was not expected yet."""
        self.pump()
        return self._received.setdefault(mover.boot_id, [])

    def expect(
        self,
        mover: MoverProcess,
        kind: type[_T],
        key: TransferKey | None = None,
        timeout_s: float = WAIT_S,
    ) -> _T:
        """The next message of this kind; others stay. Fails at once on ``TransferFailed``."""
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = self.received(mover)
            for message in waiting:
                mine = key is None or getattr(message, "key", None) == key
                if isinstance(message, kind) and mine:
                    waiting.remove(message)
                    return message
                failed = isinstance(message, TransferFailed) and mine and key is not None
                if failed and kind is not Ended:
                    raise AssertionError(f"{mover.engine_id}: {message}")
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"timed out: {kind.__name__} from {mover.engine_id}, there is {waiting}"
                )
            self.pump(0.05)

    def expect_load(
        self, mover: MoverProcess, condition: Callable[[Load], bool], what: str
    ) -> Load:
        """A heartbeat with this property."""
        self.loads.pop(mover.boot_id, None)

        def look() -> Load | None:
            self.pump(0.02)
            load = self.loads.get(mover.boot_id)
            return load if load is not None and condition(load) else None

        return wait_for(look, f"{what}: {self.loads.get(mover.boot_id)}")  # type: ignore[return-value]

    def join(self, mover: MoverProcess) -> None:
        """Wait until a mover has registered."""

        def registered() -> bool:
            self.pump(0.02)
            return mover.boot_id in self.hellos

        wait_for(registered, f"Hello of {mover.engine_id}")
        mover.hello = self.hellos[mover.boot_id]

    def count_hellos(self, timeout_s: float) -> int:
        """``pump``, and say how many ``Hello`` came."""
        before = self.num_hellos
        self.pump(timeout_s)
        return self.num_hellos - before

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()
