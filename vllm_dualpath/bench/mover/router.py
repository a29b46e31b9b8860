"""A router's part in transfers between movers that are measured: as little of it as they need."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import zmq

from vllm_dualpath.bench.mover.mover_process import ANSWER_S, MoverProcess, cpu_seconds
from vllm_dualpath.bench.mover.side_storage import FINGERPRINT
from vllm_dualpath.blocks import chain_root, prompt_digest
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Hello,
    Load,
    MoverMessage,
    Peer,
    Pong,
    Reserve,
    Reserved,
    RouterMessage,
    SegmentSpec,
    Stage,
    TransferFailed,
    TransferKey,
    Welcome,
    decode_mover_message,
    encode,
)

ROOT = chain_root(FINGERPRINT)
_HEARTBEAT_S = 2.0  # the router's default
_T = TypeVar("_T")


class Router:
    """As much of a router as a transfer needs."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._boot_id = os.urandom(16)
        self._waiting: list[tuple[bytes, MoverMessage]] = []

    def send(self, mover: MoverProcess, message: RouterMessage) -> None:
        self._socket.send_multipart([mover.boot_id, encode(message)])

    def expect(
        self, mover: MoverProcess, kind: type[_T], key: TransferKey | None, wait_s: float = ANSWER_S
    ) -> _T:
        """The next such message; others wait for their turn, heartbeats are answered at once."""
        deadline = time.monotonic() + wait_s
        while True:
            for idx, (identity, message) in enumerate(self._waiting):
                if identity != mover.boot_id or getattr(message, "key", None) != key:
                    continue
                if isinstance(message, TransferFailed):
                    raise LaunchError(f"{mover.name}: {message.reason}")
                if isinstance(message, kind):
                    del self._waiting[idx]
                    return message
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._socket.poll(int(left_s * 1000) + 1):
                raise LaunchError(f"{mover.name}: expected {kind.__name__} in {wait_s} s")
            self._take()

    def forget(self) -> None:
        """Drop what nobody waits for: progress reports of a transfer that is over."""
        self._waiting.clear()

    def answer_for(self, seconds: float) -> None:
        """Be a router with nothing to do."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(left_s * 1000) + 1):
                self._take()

    def busiest_cpu_share(self, movers: Sequence[MoverProcess], seconds: float) -> float:
        """Be one for ``seconds``: CPU time of the busiest mover then, as a share of one core."""
        before, start = [cpu_seconds(mover.pid) for mover in movers], time.monotonic()
        self.answer_for(seconds)
        used = [cpu_seconds(mover.pid) - was for mover, was in zip(movers, before, strict=True)]
        return max(used) / (time.monotonic() - start)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def _take(self) -> None:
        identity, payload = self._socket.recv_multipart()
        message = decode_mover_message(payload)
        if isinstance(message, Hello):
            welcome = Welcome(PROTOCOL_VERSION, self._boot_id, _HEARTBEAT_S, False)
            self._socket.send_multipart([identity, encode(welcome)])
        elif isinstance(message, Load):
            self._socket.send_multipart([identity, encode(Pong(self._boot_id))])
            return
        self._waiting.append((identity, message))


@dataclass(frozen=True, slots=True)
class Transfer:
    """One prompt that both movers get; ``reader`` is the one that reads its blocks."""

    router: Router
    prefill: MoverProcess
    decode: MoverProcess
    tokens: Sequence[int]
    block_hashes: tuple[bytes, ...]
    reader: str
    key: TransferKey = field(default_factory=lambda: TransferKey(os.urandom(16), 0))

    def reserve(self) -> tuple[Stage, Stage]:
        """Reserve slots, decode first; what then starts the prefill and the decode mover."""
        decode_peer = self._reserve("decode", self.decode, self.prefill.peer())
        prefill_peer = self._reserve("prefill", self.prefill, decode_peer)
        return self._stage("prefill", decode_peer), self._stage("decode", prefill_peer)

    def start(self, stages: tuple[Stage, Stage]) -> None:
        """Send what ``reserve`` returned."""
        self.router.send(self.prefill, stages[0])
        self.router.send(self.decode, stages[1])

    def _reserve(self, pool: str, mover: MoverProcess, peer: Peer) -> Peer:
        """How the other mover shall see this one, with its slots."""
        self.router.send(mover, Reserve(self.key, pool, len(self.tokens), peer))
        return mover.peer(self.router.expect(mover, Reserved, self.key).slots)

    def _stage(self, pool: str, peer: Peer) -> Stage:
        return Stage(
            key=self.key,
            pool=pool,
            num_tokens=len(self.tokens),
            num_hit_blocks=len(self.block_hashes),
            root=ROOT,
            block_hashes=self.block_hashes,
            digest=prompt_digest(ROOT, self.tokens),
            segments=(SegmentSpec(self.reader, 0, len(self.block_hashes)),),
            peer=peer,
        )
