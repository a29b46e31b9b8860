"""The states a transfer passes through, and how to bring one there."""

from __future__ import annotations

from collections.abc import Callable

from tests.mover.cluster import Cluster
from tests.mover.material import GEOMETRY
from tests.mover.scripted_transfer import Transfer
from vllm_dualpath.control.slot_table import ClaimedTransfer
from vllm_dualpath.messages import Committed, Ended, Ready, Saved

NUM_HITS = 3
SPLIT = 1


class Run:
    """A transfer in some state, with the claims and releases it has."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.transfer: Transfer = cluster.transfer(num_stored=NUM_HITS)
        self.prefill_claim: ClaimedTransfer | None = None
        self.open_claims: list[str] = []

    def reserved_decode(self) -> None:
        self.transfer.reserve_decode()

    def reserved(self) -> None:
        self.reserved_decode()
        self.transfer.reserve_prefill()

    def staged_prefill(self) -> None:
        self.reserved()
        self.transfer.stage_at(self.cluster.prefill, SPLIT, NUM_HITS)

    def staged_decode(self) -> None:
        self.reserved()
        self.transfer.stage_at(self.cluster.decode, SPLIT, NUM_HITS)

    def staged(self) -> None:
        self.reserved()
        self.transfer.stage(SPLIT, NUM_HITS)

    def ready(self) -> None:
        self.staged()
        self.cluster.router.expect(self.cluster.prefill, Ready, self.transfer.key)

    def claimed(self) -> None:
        self.ready()
        self.prefill_claim = self.cluster.prefill.engine.claim(self.transfer.key)
        self.open_claims.append("prefill")

    def saving(self) -> None:
        self.claimed()
        assert self.prefill_claim is not None
        first = NUM_HITS * GEOMETRY.pages_per_block
        saved = Saved(self.transfer.key, 0, first, self.transfer.prompt.num_pages)
        self.cluster.prefill.engine.worker.send(saved)

    def committed(self) -> None:
        self.claimed()
        assert self.prefill_claim is not None
        self.cluster.prefill.engine.save_pages(self.prefill_claim, self.transfer.prompt)
        self.cluster.router.expect(self.cluster.decode, Committed, self.transfer.key)

    def decode_claimed(self) -> None:
        self.committed()
        self.cluster.decode.engine.claim(self.transfer.key)
        self.open_claims.append("decode")

    def prefill_released(self) -> None:
        self.decode_claimed()
        self.release("prefill")

    def decode_released(self) -> None:
        self.decode_claimed()
        self.release("decode")
        self.cluster.router.expect(self.cluster.decode, Ended, self.transfer.key)

    def release(self, role: str) -> None:
        self.open_claims.remove(role)
        getattr(self.cluster, role).engine.release(self.transfer.key)

    def release_all(self) -> None:
        for role in list(self.open_claims):
            self.release(role)

    def end(self, drain: bool) -> None:
        self.transfer.end(self.cluster.prefill, drain)
        self.transfer.end(self.cluster.decode, drain)

    def assert_ended(self) -> None:
        """Both movers say so, and a leg that arrives late finds nothing."""
        for mover in (self.cluster.prefill, self.cluster.decode):
            self.cluster.router.expect(mover, Ended, self.transfer.key)
            assert mover.engine.table.claim(self.transfer.key) is None


STATES: dict[str, Callable[[Run], None]] = {
    each.__name__: each
    for each in (
        Run.reserved_decode,
        Run.reserved,
        Run.staged_prefill,
        Run.staged_decode,
        Run.staged,
        Run.ready,
        Run.claimed,
        Run.saving,
        Run.committed,
        Run.decode_claimed,
        Run.prefill_released,
        Run.decode_released,
    )
}
