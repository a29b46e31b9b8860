"""Movers whose store answers nothing: what waiting costs.

Every block is a FIFO without a writer, whose open never returns; the threads that read are soon
all stuck in one, and the other transfers wait behind them.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover.mover_process import START_S, MoverProcess, cpu_seconds
from vllm_dualpath.bench.mover.shapes import PROBE
from vllm_dualpath.bench.mover.side_movers import Router
from vllm_dualpath.bench.mover.side_storage import FINGERPRINT, block_files, block_hashes
from vllm_dualpath.blocks import chain_root, prompt_digest
from vllm_dualpath.messages import (
    Hello,
    Reserve,
    Reserved,
    SegmentSpec,
    Stage,
    TransferKey,
)

_ROOT = chain_root(FINGERPRINT)
_SETTLE_S = 1.0
_FAR_S = 3600.0
"""No deadline ends a transfer while it is looked at."""


class StalledMovers:
    """A prefill and a decode mover, each with half of the reads. See ``child`` for who calls."""

    def __init__(self) -> None:
        self._router = Router()
        self._scratch = tempfile.TemporaryDirectory()
        self._movers: dict[str, MoverProcess] = {}

    def open(self, num_transfers: int) -> None:
        """Start the movers and all transfers; return when nothing is left to be done."""
        directory = Path(self._scratch.name) / "store"
        hashes = block_hashes("stalled", num_transfers)
        for file in block_files(directory, hashes):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(file)
        self._tokens = list(range(PROBE.geometry.block_tokens + 1))
        for role in ("prefill", "decode"):
            self._start(role, directory, num_transfers)
        for mover in self._movers.values():
            mover.attach()
        for mover in self._movers.values():
            mover.hello = self._router.expect(mover, Hello, None, START_S)
        for idx, block_hash in enumerate(hashes):
            self._stage(block_hash, ("prefill", "decode")[idx % 2])
        self._router.answer_for(_SETTLE_S)

    def cpu_share(self, seconds: float) -> float:
        """CPU time of the busier of the two movers, as a share of one core."""
        pids = [mover.pid for mover in self._movers.values()]
        before, start = [cpu_seconds(pid) for pid in pids], time.monotonic()
        self._router.answer_for(seconds)
        used = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        return max(used) / (time.monotonic() - start)

    def close(self) -> None:
        for mover in self._movers.values():
            mover.end_now()  # it would wait for reads that never return
        self._router.close()
        self._scratch.cleanup()

    def _start(self, role: str, directory: Path, num_transfers: int) -> None:
        config: dict[str, Any] = {
            "role": role,
            "store": f"file://{directory}",
            # A Full Block and the rest of the prompt each.
            "staging_bytes": (2 * num_transfers + 2) * PROBE.geometry.slot_bytes,
            "persist_slots": 1,
            "store_io": "threads",
            "router": self._router.endpoint,
            "deadlines": {"stage_s": _FAR_S, "stuck_warning_s": _FAR_S},
        }
        self._movers[role] = MoverProcess(
            Path(self._scratch.name),
            role,
            PROBE.geometry,
            len(self._tokens),
            (FINGERPRINT, _ROOT),
            config,
        )

    def _stage(self, block_hash: bytes, reader: str) -> None:
        key = TransferKey(os.urandom(16), 0)
        prefill, decode = self._movers["prefill"], self._movers["decode"]
        router, num_tokens = self._router, len(self._tokens)
        router.send(decode, Reserve(key, "decode", num_tokens, prefill.peer()))
        decode_slots = router.expect(decode, Reserved, key).slots
        router.send(prefill, Reserve(key, "prefill", num_tokens, decode.peer(decode_slots)))
        prefill_slots = router.expect(prefill, Reserved, key).slots
        for mover, pool, peer in (
            (prefill, "prefill", decode.peer(decode_slots)),
            (decode, "decode", prefill.peer(prefill_slots)),
        ):
            stage = Stage(
                key=key,
                pool=pool,
                num_tokens=num_tokens,
                num_hit_blocks=1,
                root=_ROOT,
                block_hashes=(block_hash,),
                digest=prompt_digest(_ROOT, self._tokens),
                segments=(SegmentSpec(reader, 0, 1),),
                peer=peer,
            )
            router.send(mover, stage)
