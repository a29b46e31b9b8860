"""Movers whose store answers nothing: what waiting costs.

Every block is a FIFO without a writer, whose open never returns; the threads that read are soon
all stuck in one, and the other transfers wait behind them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover.mover_process import START_S, MoverProcess
from vllm_dualpath.bench.mover.router import ROOT, Router, Transfer
from vllm_dualpath.bench.mover.shapes import PROBE
from vllm_dualpath.bench.mover.side_storage import FINGERPRINT, block_files, block_hashes
from vllm_dualpath.messages import Hello

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
        return self._router.busiest_cpu_share(list(self._movers.values()), seconds)

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
            "donor_slots": 0,
            "store_io": "threads",
            "router": self._router.endpoint,
            "deadlines": {"stage_s": _FAR_S, "stuck_warning_s": _FAR_S},
        }
        self._movers[role] = MoverProcess(
            Path(self._scratch.name),
            role,
            PROBE.geometry,
            len(self._tokens),
            (FINGERPRINT, ROOT),
            config,
        )

    def _stage(self, block_hash: bytes, reader: str) -> None:
        prefill, decode = self._movers["prefill"], self._movers["decode"]
        hashes = (block_hash,)
        transfer = Transfer(self._router, prefill, decode, self._tokens, hashes, reader)
        transfer.start(transfer.reserve())
