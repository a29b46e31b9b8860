"""However and whenever a transfer ends, every slot is free afterwards."""

from __future__ import annotations

import pytest

from tests.mover.cluster import Cluster
from tests.mover.material import GEOMETRY, block_path
from tests.mover.scripted_engine import MoverProcess
from tests.mover.states import STATES, Run
from vllm_dualpath.messages import (
    Cut,
    CutDone,
    Ended,
    Saved,
    SegmentDone,
    TransferFailed,
)


@pytest.mark.parametrize("drain", [True, False], ids=["drain", "drop"])
@pytest.mark.parametrize("state", STATES)
def test_end_in_every_state(cluster: Cluster, state: str, drain: bool) -> None:
    """``End`` frees everything, once open claims are released, and nothing can be claimed."""
    run = Run(cluster)
    STATES[state](run)
    run.end(drain)
    for role in run.open_claims:
        mover: MoverProcess = getattr(cluster, role)
        assert not any(isinstance(each, Ended) for each in cluster.router.received(mover))
    run.release_all()
    run.assert_ended()


@pytest.mark.parametrize("state", ["ready", "claimed", "committed"])
def test_end_twice(cluster: Cluster, state: str) -> None:
    """A second, harder ``End`` takes over from a draining one; each is answered in the end."""
    run = Run(cluster)
    STATES[state](run)
    run.end(drain=True)
    run.end(drain=False)
    run.release_all()
    run.assert_ended()


def test_drain_still_pushes(cluster: Cluster) -> None:
    """After ``End(drain)`` at the prefill side pages that its engine saves still arrive."""
    run = Run(cluster)
    run.claimed()
    assert run.prefill_claim is not None
    run.transfer.end(cluster.prefill, drain=True)
    cluster.prefill.engine.save_pages(run.prefill_claim, run.transfer.prompt)
    run.release_all()
    cluster.claim_committed(run.transfer)
    run.open_claims.append("decode")
    run.release_all()
    run.transfer.end(cluster.decode, drain=True)
    run.assert_ended()


def test_dropped_pages_are_not_pushed(cluster: Cluster) -> None:
    """After ``End`` without drain what the engine saves goes nowhere."""
    run = Run(cluster)
    run.claimed()
    assert run.prefill_claim is not None
    before = cluster.router.expect_load(cluster.prefill, lambda _: True, "heartbeat").stats
    run.end(drain=False)
    cluster.router.expect(cluster.decode, Ended, run.transfer.key)
    cluster.prefill.engine.save_pages(run.prefill_claim, run.transfer.prompt)
    run.release_all()
    cluster.router.expect(cluster.prefill, Ended, run.transfer.key)
    after = cluster.router.expect_load(cluster.prefill, lambda _: True, "heartbeat").stats
    assert after.push_to_decode_bytes == before.push_to_decode_bytes


def test_release_without_a_claim(cluster: Cluster) -> None:
    """A release too many is rejected and counted; the transfer still ends."""
    run = Run(cluster)
    run.claimed()
    rejected = cluster.router.expect_load(cluster.prefill, lambda _: True, "heartbeat")
    run.release("prefill")
    cluster.prefill.engine.release(run.transfer.key)
    cluster.router.expect_load(
        cluster.prefill,
        lambda load: load.stats.rejected_messages == rejected.stats.rejected_messages + 1,
        "the surplus release is not counted",
    )
    run.end(drain=False)
    run.assert_ended()


def test_saved_pages_out_of_range(cluster: Cluster) -> None:
    """Pages of hits, beyond the prompt or of no layer are rejected, counted, and not pushed."""
    run = Run(cluster)
    run.claimed()
    before = cluster.router.expect_load(cluster.prefill, lambda _: True, "heartbeat").stats
    bad = [(0, 0, 1), (0, 6, 11), (GEOMETRY.num_layers, 6, 7), (0, 7, 7), (0, 8, 7)]
    for layer, first, last in bad:
        cluster.prefill.engine.worker.send(Saved(run.transfer.key, layer, first, last))
    cluster.router.expect_load(
        cluster.prefill,
        lambda load: load.stats.rejected_messages == before.rejected_messages + len(bad),
        "bad pages are not counted",
    )
    run.end(drain=True)
    run.release_all()
    run.assert_ended()


# --- cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "corrupt", "short"])
@pytest.mark.parametrize(
    ("split", "bad"), [(2, 0), (2, 1), (1, 2), (0, 0), (4, 3), (1, 1)], ids=str
)
def test_bad_block(cluster: Cluster, damage: str, split: int, bad: int) -> None:
    """A bad block ends the hit there; the engine computes the rest and both sides agree."""
    num_hits = 4
    transfer = cluster.transfer(num_tokens=37, num_stored=num_hits)
    _damage(cluster, transfer.prompt.hashes[bad], damage)
    reader = cluster.prefill if bad < split else cluster.decode
    before = cluster.router.expect_load(reader, lambda _: True, "heartbeat").stats
    transfer.reserve()
    transfer.stage(split, num_hits)
    done = cluster.router.expect(reader, SegmentDone, transfer.key)
    assert done.good_until == bad
    assert done.error.startswith("missing" if damage == "missing" else "corrupt")
    for mover in (cluster.decode, cluster.prefill):
        cluster.router.send(mover, Cut(transfer.key, bad))
        assert cluster.router.expect(mover, CutDone, transfer.key).num_hit_blocks == bad
    cluster.commit(transfer, bad)
    after = cluster.router.expect_load(reader, lambda _: True, "heartbeat").stats
    assert after.corrupt_blocks - before.corrupt_blocks == (damage != "missing")
    cluster.finish(transfer)


def test_a_cut_ends_where_the_cached_blocks_do(cluster: Cluster) -> None:
    """The first block that was read is bad: the engine has those before it all the same."""
    transfer = cluster.transfer(num_stored=3)
    transfer.num_cached = 1
    _damage(cluster, transfer.prompt.hashes[1], "corrupt")
    transfer.reserve()
    transfer.stage(3, 3)
    done = cluster.router.expect(cluster.prefill, SegmentDone, transfer.key)
    assert (done.first_block, done.good_until) == (1, 1)
    for mover in (cluster.decode, cluster.prefill):
        cluster.router.send(mover, Cut(transfer.key, 1))
        cluster.router.expect(mover, CutDone, transfer.key)
    cluster.commit(transfer, 1)
    cluster.finish(transfer)


def test_cut_again(cluster: Cluster) -> None:
    """A second, lower cut holds, and repeating one does no harm."""
    transfer = cluster.transfer(num_tokens=37, num_stored=4)
    for block in (1, 2):
        _damage(cluster, transfer.prompt.hashes[block], "missing")
    transfer.reserve()
    transfer.stage(2, 4)
    for cut in (2, 1, 1):
        for mover in (cluster.decode, cluster.prefill):
            cluster.router.send(mover, Cut(transfer.key, cut))
    cluster.commit(transfer, 1)
    cluster.finish(transfer)


def _damage(cluster: Cluster, block_hash: bytes, damage: str) -> None:
    path = block_path(cluster.store, block_hash)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[4096 + 100] ^= 1
        path.write_bytes(content)


def test_early_notices(cluster: Cluster) -> None:
    """Everything from one side may arrive before the other side is staged."""
    transfer = cluster.transfer(num_stored=0)
    transfer.reserve()
    transfer.stage_at(cluster.prefill, 0, 0)
    claimed = cluster.claim_ready(transfer, 0)
    cluster.prefill.engine.save_pages(claimed, transfer.prompt)
    transfer.stage_at(cluster.decode, 0, 0)
    cluster.claim_committed(transfer)
    cluster.finish(transfer)
    assert not any(
        isinstance(each, TransferFailed) for each in cluster.router.received(cluster.decode)
    )
