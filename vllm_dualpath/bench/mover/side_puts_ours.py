"""Puts by this project's transport: one call a batch, timed until its ``PutDone``.

The transport that a mover starts by default, whatever it does to reach a peer.
"""

from __future__ import annotations

import select
import time
from typing import Any

from vllm_dualpath.bench.mover.side_puts_memory import InitiatorMemory, TargetMemory, make_pieces
from vllm_dualpath.errors import TransportError
from vllm_dualpath.transport import make_transport
from vllm_dualpath.transport.base import NoticeReceived, PutArray, PutDone

_PUT_S = 20.0


class Target(TargetMemory):
    """A transport that only receives: its progress thread does."""

    def __init__(self) -> None:
        super().__init__()
        self._transport = make_transport("auto")
        self._region = self._transport.register(
            self.memory.address, self.memory.num_bytes, fd=self.memory.fd
        )

    def hello(self) -> dict[str, Any]:
        return {
            "transport": self._transport.address,
            "region": self._region.descriptor,
            "address": self.memory.address,
        }

    def collect(self, count: int) -> list[float]:
        """Microseconds from the submission to this poll, of so many notices.

        Both processes read the one monotonic clock of the machine.
        """
        delays: list[float] = []
        while len(delays) < count:
            if not select.select([self._transport.fileno()], [], [], _PUT_S)[0]:
                raise TransportError(f"notices: expected {count}, found {len(delays)}")
            for event in self._transport.poll():
                now_ns = time.monotonic_ns()
                if isinstance(event, NoticeReceived):
                    delays.append((now_ns - int.from_bytes(event.payload, "little")) / 1e3)
        return delays


class Initiator(InitiatorMemory):
    """A transport that puts."""

    def __init__(self) -> None:
        super().__init__()
        self._transport = make_transport("auto")
        self._transport.register(self.memory.address, self.memory.num_bytes, fd=self.memory.fd)
        self._remote_address = 0
        self._peer_id = 0
        self._pieces: dict[int, PutArray] = {}

    def connect(self, hello: dict[str, Any], same_host: bool) -> str:
        self._peer_id = self._transport.connect(
            hello["transport"], hello["region"], same_host=same_host
        )
        self._remote_address = hello["address"]
        return self._transport.name

    def prepare(self, piece_bytes: int, seed: int) -> None:
        self._pieces[piece_bytes] = make_pieces(
            self.memory, self._remote_address, piece_bytes, seed
        )

    def put(self, piece_bytes: int) -> float:
        """Seconds from the call to the outcome that says the bytes are in the target's memory."""
        pieces = self._pieces[piece_bytes]
        start = time.perf_counter()
        put_id = self._transport.put(self._peer_id, pieces, b"")
        deadline = start + _PUT_S
        while time.perf_counter() < deadline:
            select.select([self._transport.fileno()], [], [], _PUT_S)
            for event in self._transport.poll():
                if event == PutDone(put_id, True, ""):
                    return time.perf_counter() - start
                raise TransportError(f"put {put_id}: expected it done, found {event}")
        raise TransportError(f"put {put_id}: no outcome in {_PUT_S} s")

    def ping(self, count: int, gap_s: float) -> None:
        """Tiny puts with a notice that says when; far enough apart that both sides fall asleep."""
        piece = make_pieces(self.memory, self._remote_address, 4096, 0)[:1].copy()
        piece[0, 2] = 64
        for _ in range(count):
            time.sleep(gap_s)
            stamp = time.monotonic_ns().to_bytes(8, "little")
            self._transport.put(self._peer_id, piece, stamp)
            select.select([self._transport.fileno()], [], [], _PUT_S)
            self._transport.poll()
