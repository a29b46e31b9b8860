"""Movers at work: staging over the decode path beside the read alone, and movers at rest.

The read alone is a local load of the same blocks by a mover without a router: the same storage
queue, the same process, nothing pushed.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover.mover_process import START_S, MoverProcess
from vllm_dualpath.bench.mover.router import ROOT, Router, Transfer
from vllm_dualpath.bench.mover.shapes import Shape, shape_named
from vllm_dualpath.bench.mover.side_storage import FINGERPRINT, Storage, block_hashes
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.messages import (
    End,
    Ended,
    Hello,
    LocalLoad,
    LocalLoadDone,
    LocalLoaded,
    Ready,
)


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
        prefill, decode, router = self._movers["prefill"], self._movers["decode"], self._router
        transfer = Transfer(router, prefill, decode, self._tokens, self._hashes, "decode")
        stages = transfer.reserve()
        start = time.perf_counter()
        transfer.start(stages)
        ready = router.expect(prefill, Ready, transfer.key)
        seconds = time.perf_counter() - start
        self._require(ready.num_hit_blocks)
        for mover in (prefill, decode):
            router.send(mover, End(transfer.key, False, "measured"))
        for mover in (prefill, decode):
            router.expect(mover, Ended, transfer.key)
        router.forget()
        return seconds

    def idle_cpu_share(self, seconds: float) -> float:
        """CPU time of the busier of two movers with nothing to do, as a share of one core."""
        self._router.answer_for(0.5)
        movers = [self._movers[role] for role in ("prefill", "decode")]
        return self._router.busiest_cpu_share(movers, seconds)

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
            (FINGERPRINT, ROOT),
            config,
        )

    def _require(self, num_good: int) -> None:
        if num_good != len(self._hashes):
            raise LaunchError(f"movers: expected {len(self._hashes)} good blocks, found {num_good}")
