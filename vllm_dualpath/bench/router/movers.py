"""A mover with nothing in its way: over the real control network it says at once what a healthy one
says in the end. It holds no memory and moves nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable

import zmq

from vllm_dualpath.bench.router.prompts import MODEL, STORED, token_ids
from vllm_dualpath.blocks import chain_hashes, chain_root
from vllm_dualpath.control.bus import MoverSocket
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Cut,
    CutDone,
    End,
    Ended,
    GeometrySpec,
    Hello,
    Load,
    Message,
    MoverStats,
    Ping,
    Ready,
    Reserve,
    Reserved,
    SegmentDone,
    SnapshotEnd,
    Stage,
    Stored,
    StoredBlock,
    Welcome,
    decode_router_message,
    encode,
)

BLOCK_TOKENS = 64
MAX_MODEL_LEN = 262_144
STORED_SIZES = (100, 8000)
"""Prompts of these sizes under the number ``STORED`` are hits."""

_ROOT = chain_root(bytes(32))
_GEOMETRY = GeometrySpec(BLOCK_TOKENS, 16, (4096,) * 32, "LBHNC", 1, "bfloat16")
_ADDRESS_BYTES = 512
"""As long as the worker address of UCX that a real mover tells."""


class DoNothingMover:
    """One mover; lives in the running event loop. ``role`` is its engine id too."""

    def __init__(self, role: str, url: str, control: str) -> None:
        self._role = role
        self._url = url
        self._boot_id = secrets.token_bytes(16)
        self._loop = asyncio.get_running_loop()
        self._socket = MoverSocket(control, self._boot_id, None)
        self._fd = int(self._socket.socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._heartbeat: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self.say(self._hello())

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._socket.close()

    def say(self, message: Message) -> None:
        """Send it, now."""
        self._socket.send(encode(message))
        # The descriptor tells of changes only: what came while this one was sent tells nothing.
        if self._soon is None:
            self._soon = self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._soon = None
        self._socket.flush()
        for payload in self._socket.receive():
            for message in self._answers(decode_router_message(payload)):
                self.say(message)

    def _answers(self, message: object) -> Iterable[Message]:
        if isinstance(message, Reserve):
            num_blocks = -(-message.num_tokens // BLOCK_TOKENS)
            yield Reserved(message.key, tuple(range(num_blocks)))
        elif isinstance(message, Stage):
            yield from self._staged(message)
        elif isinstance(message, Cut):
            answer = CutDone if self._role == "decode" else Ready
            yield answer(message.key, message.num_hit_blocks)
        elif isinstance(message, End):
            yield Ended(message.key)
        elif isinstance(message, Ping):
            yield Load(MoverStats())
        elif isinstance(message, Welcome):
            yield from self._snapshot(message)

    def _staged(self, stage: Stage) -> Iterable[Message]:
        for segment in stage.segments:
            if segment.reader == self._role:
                first, last = segment.first_block, segment.last_block
                yield SegmentDone(stage.key, first, last, last, "")
        if stage.pool == "prefill":
            yield Ready(stage.key, stage.num_hit_blocks)

    def _snapshot(self, welcome: Welcome) -> Iterable[Message]:
        if welcome.send_snapshot:
            blocks = [block for size in STORED_SIZES for block in _stored(size)]
            yield Stored(tuple(blocks))
            yield SnapshotEnd(len(blocks))
        if self._heartbeat is None:
            self._beat(welcome.heartbeat_s)

    def _beat(self, interval_s: float) -> None:
        self.say(Load(MoverStats()))
        self._heartbeat = self._loop.call_later(interval_s, self._beat, interval_s)

    def _hello(self) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            engine_id=self._role,
            role=self._role,
            boot_id=self._boot_id,
            url=self._url,
            model=MODEL,
            fingerprint=bytes(32),
            root=_ROOT,
            geometry=_GEOMETRY,
            max_model_len=MAX_MODEL_LEN,
            store="file:///none",
            store_quota_bytes=None,
            host_id="bench",
            pid=os.getpid(),
            pid_start=1,
            address=bytes(_ADDRESS_BYTES),
            region=bytes(64),
            staging_address=4096,
            num_slots=MAX_MODEL_LEN // BLOCK_TOKENS,
        )


def _stored(num_tokens: int) -> list[StoredBlock]:
    ids = token_ids(STORED, num_tokens)
    hashes = [_ROOT, *chain_hashes(_ROOT, ids, BLOCK_TOKENS)]
    return [StoredBlock(hashes[i + 1], hashes[i], 4096, 1.0) for i in range(len(hashes) - 1)]
