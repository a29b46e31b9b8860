"""A router, a prefill mover and a decode mover over one store, and a donor for those who ask."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

from tests.mover.material import BLOCKING_IO, WAIT_S, Prompt, wait_for
from tests.mover.scripted_engine import MoverProcess
from tests.mover.scripted_router import ScriptedRouter
from tests.mover.scripted_transfer import Transfer
from vllm_dualpath.control.slot_table import ClaimedTransfer
from vllm_dualpath.messages import Committed, Ended, Ready

NUM_DONOR_SLOTS = 2
DEADLINES = {"stage_s": 1.0, "router_lost_s": 1.2}


class Cluster:
    """Movers are replaced when a test has killed them, so that most tests start none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir()
        self.router = ScriptedRouter()
        self._numbers = itertools.count()
        self._seeds = itertools.count(1)
        self._spares: dict[str, MoverProcess] = {}
        """Started, not attached: so a test that kills a mover costs the next one no wait."""
        self.prefill = self._start("prefill")
        self.decode = self._start("decode")
        self.router.join(self.prefill)
        self.router.join(self.decode)
        self.donor: MoverProcess | None = None

    @property
    def movers(self) -> list[MoverProcess]:
        """All that were started for tests and may be alive."""
        donors = [] if self.donor is None else [self.donor]
        return [self.prefill, self.decode, *donors]

    def need_donor(self) -> MoverProcess:
        """A third mover, registered: that of another prefill engine."""
        if self.donor is None:
            self.donor = self._start("donor")
            self.router.join(self.donor)
        return self.donor

    def _start(self, role: str) -> MoverProcess:
        name = f"{role}{next(self._numbers)}"
        config = {"donor_slots": NUM_DONOR_SLOTS} if role == "donor" else {}
        return MoverProcess(
            self.directory,
            name,
            "prefill" if role == "donor" else role,
            self.router.endpoint,
            self.store,
            deadlines=DEADLINES,
            **BLOCKING_IO,
            **config,
        )

    def refresh(self) -> None:
        """Start again what is dead, and wait until all are registered with this router."""
        for role in ("prefill", "decode", "donor"):
            mover: MoverProcess | None = getattr(self, role)
            if mover is not None and mover.process.poll() is not None:
                mover.close()
                mover = self._spares.pop(role, None) or self._start(role)
                self._spares[role] = self._start(role)
                try:
                    self.router.join(mover)
                except BaseException:
                    mover.close()  # and the next test starts another one
                    raise
                setattr(self, role, mover)
        for mover in self.movers:
            self.router.expect_load(mover, lambda _: True, f"{mover.engine_id} is not alive")
            self.router.received(mover).clear()

    def replace_router(self) -> None:
        """Another router boot id, as a restarted router has one."""
        self.router.boot_id = os.urandom(16)
        self.router.hellos.clear()
        for mover in self.movers:
            self.router.join(mover)

    def prompt(self, num_tokens: int, num_stored: int) -> Prompt:
        """A prompt of which the store has the leading blocks."""
        prompt = Prompt(num_tokens, next(self._seeds))
        prompt.store(self.store, num_stored)
        return prompt

    def transfer(self, num_tokens: int = 37, num_stored: int = 3) -> Transfer:
        prompt = self.prompt(num_tokens, num_stored)
        return Transfer(self.router, self.prefill, self.decode, prompt)

    def donated(self, num_tokens: int = 37, num_stored: int = 4) -> Transfer:
        """A transfer of which the donor reads a part."""
        prompt = self.prompt(num_tokens, num_stored)
        return Transfer(self.router, self.prefill, self.decode, prompt, self.need_donor())

    def claim_ready(self, transfer: Transfer, num_hit_blocks: int) -> ClaimedTransfer:
        """Wait for ``Ready`` and claim at the prefill engine."""
        ready = self.router.expect(self.prefill, Ready, transfer.key)
        assert ready.num_hit_blocks == num_hit_blocks
        claimed = self.prefill.engine.claim(transfer.key)
        assert claimed.num_hit_blocks == num_hit_blocks
        transfer.assert_staged(claimed, self.prefill, num_hit_blocks)
        return claimed

    def claim_committed(self, transfer: Transfer) -> ClaimedTransfer:
        """Wait for ``Committed``, claim at the decode engine and compare every page."""
        self.router.expect(self.decode, Committed, transfer.key)
        claimed = self.decode.engine.claim(transfer.key)
        transfer.assert_whole(claimed, self.decode)
        return claimed

    def commit(self, transfer: Transfer, num_hit_blocks: int) -> None:
        """Go on from ``Stage`` to a committed transfer, claimed at both engines."""
        claimed = self.claim_ready(transfer, num_hit_blocks)
        self.prefill.engine.save_pages(claimed, transfer.prompt)
        self.claim_committed(transfer)

    def finish(self, transfer: Transfer) -> None:
        """From claimed on both sides to ended."""
        transfer.end(self.prefill, drain=True)
        self.prefill.engine.release(transfer.key)
        self.decode.engine.release(transfer.key)
        for mover in (self.prefill, self.decode):
            self.router.expect(mover, Ended, transfer.key)

    def assert_all_free(self) -> None:
        """Every living mover reports that nothing is open, and its log no bug."""
        for mover in self.movers:
            if mover.process.poll() is None:
                self.wait_free(mover)
            mover.assert_clean_log()

    def wait_free(self, mover: MoverProcess) -> None:
        self.router.expect_load(
            mover,
            lambda load: (
                load.stats.open_transfers == 0
                and load.stats.slots_used == 0
                and load.stats.slots_quarantined == 0
                and load.stats.donor_slots_used == 0
                and load.stats.slots_free > 0
            ),
            f"slots of {mover.engine_id} are not all free",
        )

    def kill(self, mover: MoverProcess) -> None:
        mover.kill(signal.SIGKILL)
        mover.process.wait(WAIT_S)

    def exit_code(self, mover: MoverProcess) -> int:
        wait_for(lambda: mover.process.poll() is not None, f"{mover.engine_id} did not end")
        code = mover.process.returncode
        assert code is not None
        return code

    def close(self) -> None:
        for mover in (*self.movers, *self._spares.values()):
            mover.close()
        self.router.close()
