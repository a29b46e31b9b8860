"""Movers at work: staging over the decode path beside the read alone, and movers at rest.

The read alone is a local load of the same blocks by a mover without a router: the same storage
queue, the same process, nothing pushed.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import zmq

from vllm_dualpath.bench.mover.mover_process import (
    ANSWER_S,
    START_S,
    MoverProcess,
    cpu_seconds,
)
from vllm_dualpath.bench.mover.shapes import Shape, shape_named
from vllm_dualpath.bench.mover.side_storage import FINGERPRINT, Storage, block_hashes
from vllm_dualpath.blocks import chain_root, prompt_digest
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    End,
    Ended,
    Hello,
    Load,
    LocalLoad,
    LocalLoadDone,
    LocalLoaded,
    MoverMessage,
    Pong,
    Ready,
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

_ROOT = chain_root(FINGERPRINT)
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


class Movers:
    """A prefill, a decode and a router-less mover over one store. See ``child`` for who calls."""

    def __init__(self) -> None:
        self._router = Router()
        self._movers: dict[str, MoverProcess] = {}

    def open(self, directory: str, shape: str, num_blocks: int) -> None:
        """Store the blocks, then start the movers."""
        storage = Storage()
        storage.open(directory, shape, num_blocks, 4)
        storage.close()
        self._hashes = tuple(block_hashes("kept", num_blocks))
        self._tokens = list(range(num_blocks * shape_named(shape).geometry.block_tokens + 1))
        self._scratch = tempfile.TemporaryDirectory()
        for role in ("prefill", "decode", "both"):
            self._start(role, directory, shape_named(shape))
        for mover in self._movers.values():
            mover.attach()
        for role in ("prefill", "decode"):
            mover = self._movers[role]
            mover.hello = self._router.expect(mover, Hello, None, START_S)

    def read(self) -> float:
        """Seconds of a mover to read every block, checked."""
        mover, load_id = self._movers["both"], os.urandom(16)
        start = time.perf_counter()
        mover.send(LocalLoad(load_id, self._hashes))
        loaded = mover.expect(LocalLoaded)
        seconds = time.perf_counter() - start
        self._require(loaded.num_good)
        mover.send(LocalLoadDone(load_id))
        return seconds

    def stage(self) -> float:
        """Seconds until every block that the decode mover reads is good at the prefill mover."""
        key = TransferKey(os.urandom(16), 0)
        prefill, decode = self._movers["prefill"], self._movers["decode"]
        router, num_tokens = self._router, len(self._tokens)
        router.send(decode, Reserve(key, "decode", num_tokens, prefill.peer()))
        decode_slots = router.expect(decode, Reserved, key).slots
        router.send(prefill, Reserve(key, "prefill", num_tokens, decode.peer(decode_slots)))
        prefill_slots = router.expect(prefill, Reserved, key).slots
        to_prefill = self._stage_message(key, "prefill", decode.peer(decode_slots))
        to_decode = self._stage_message(key, "decode", prefill.peer(prefill_slots))
        start = time.perf_counter()
        router.send(prefill, to_prefill)
        router.send(decode, to_decode)
        ready = router.expect(prefill, Ready, key)
        seconds = time.perf_counter() - start
        self._require(ready.num_hit_blocks)
        for mover in (prefill, decode):
            router.send(mover, End(key, False, "measured"))
        for mover in (prefill, decode):
            router.expect(mover, Ended, key)
        router.forget()
        return seconds

    def idle_cpu_share(self, seconds: float) -> float:
        """CPU time of the busier of two movers with nothing to do, as a share of one core."""
        pids = [self._movers[role].pid for role in ("prefill", "decode")]
        self._router.answer_for(0.5)
        before, start = [cpu_seconds(pid) for pid in pids], time.monotonic()
        self._router.answer_for(seconds)
        used = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        return max(used) / (time.monotonic() - start)

    def close(self) -> None:
        for mover in self._movers.values():
            mover.close()
        self._router.close()
        self._scratch.cleanup()

    def _start(self, role: str, directory: str, shape: Shape) -> None:
        num_slots = 2 * (len(self._hashes) + 1)
        config: dict[str, Any] = {
            "role": role,
            "store": f"file://{directory}",
            "staging_bytes": num_slots * shape.geometry.slot_bytes,
            "persist_slots": 1,
        }
        if role != "both":
            config["router"] = self._router.endpoint
        self._movers[role] = MoverProcess(
            Path(self._scratch.name),
            role,
            shape.geometry,
            len(self._tokens),
            (FINGERPRINT, _ROOT),
            config,
        )

    def _stage_message(self, key: TransferKey, pool: str, peer: Any) -> Stage:
        return Stage(
            key=key,
            pool=pool,
            num_tokens=len(self._tokens),
            num_hit_blocks=len(self._hashes),
            root=_ROOT,
            block_hashes=self._hashes,
            digest=prompt_digest(_ROOT, self._tokens),
            segments=(SegmentSpec("decode", 0, len(self._hashes)),),
            peer=peer,
        )

    def _require(self, num_good: int) -> None:
        if num_good != len(self._hashes):
            raise LaunchError(f"movers: expected {len(self._hashes)} good blocks, found {num_good}")
