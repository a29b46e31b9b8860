"""A mover that reads for a transfer between two others, as a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.mover.cluster import NUM_DONOR_SLOTS, Cluster
from tests.mover.material import GEOMETRY, block_path, make_pipe, release_pipe
from tests.mover.scripted_engine import MoverProcess
from tests.mover.scripted_transfer import Transfer
from vllm_dualpath.messages import (
    Cut,
    CutDone,
    Ended,
    Load,
    MoverStats,
    PeerDied,
    Ready,
    SegmentDone,
    TransferFailed,
)

NUM_HITS = 4


def stats_of(cluster: Cluster, mover: MoverProcess) -> MoverStats:
    return cluster.router.expect_load(mover, lambda _: True, "heartbeat").stats


def expect_stats(
    cluster: Cluster, mover: MoverProcess, condition: Callable[[MoverStats], bool], what: str
) -> None:
    def check(load: Load) -> bool:
        return condition(load.stats)

    cluster.router.expect_load(mover, check, what)


@pytest.mark.parametrize(("split", "donated"), [(0, 0), (1, 2), (2, 2), (0, 3)])
def test_a_donor_reads(cluster: Cluster, split: int, donated: int) -> None:
    """Every byte it reads gets to both engines, through fewer slots than blocks."""
    donor = cluster.need_donor()
    before = stats_of(cluster, donor)
    transfer = cluster.donated(num_stored=NUM_HITS)
    transfer.reserve()
    transfer.stage_donated(split, donated, NUM_HITS)
    done = cluster.router.expect(donor, SegmentDone, transfer.key)
    assert (done.first_block, done.good_until, done.error) == (donated, NUM_HITS, "")
    cluster.router.expect(donor, Ended, transfer.key)
    cluster.commit(transfer, NUM_HITS)
    cluster.finish(transfer)
    after = stats_of(cluster, donor)
    num_bytes = (NUM_HITS - donated) * GEOMETRY.payload_bytes
    read_bytes = after.storage_read_bytes - before.storage_read_bytes
    assert after.donated_bytes - before.donated_bytes == read_bytes > num_bytes
    assert after.push_to_prefill_bytes - before.push_to_prefill_bytes == num_bytes
    assert after.push_to_decode_bytes - before.push_to_decode_bytes == num_bytes


def test_many_donations_at_once(cluster: Cluster) -> None:
    """Transfers that share a donor's few slots all get their blocks."""
    transfers = [cluster.donated(num_stored=NUM_HITS) for _ in range(4)]
    for transfer in transfers:
        transfer.reserve()
    for transfer in transfers:
        transfer.stage_donated(0, 0, NUM_HITS)
    for transfer in transfers:
        cluster.commit(transfer, NUM_HITS)
    for transfer in transfers:
        cluster.finish(transfer)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_bad_block(cluster: Cluster, bad: int) -> None:
    """Whoever meets it, the hit ends there, and both engines agree."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    block_path(cluster.store, transfer.prompt.hashes[bad]).unlink()
    donor = cluster.need_donor()
    transfer.reserve()
    transfer.stage_donated(1, 2, NUM_HITS)
    reader = cluster.prefill if bad == 0 else donor
    assert cluster.router.expect(reader, SegmentDone, transfer.key).good_until == bad
    for mover in (cluster.decode, donor, cluster.prefill):
        cluster.router.send(mover, Cut(transfer.key, bad))
        assert cluster.router.expect(mover, CutDone, transfer.key).num_hit_blocks == bad
    cluster.commit(transfer, bad)
    cluster.finish(transfer)


def test_impossible_donations(cluster: Cluster) -> None:
    """A used key, another's segment or too few slots are refused and counted."""
    donor = cluster.need_donor()
    before = stats_of(cluster, donor).rejected_messages
    transfer = cluster.donated(num_stored=NUM_HITS)
    transfer.reserve()
    transfer.donor_reads_from = 0
    slots, transfer.decode_slots = transfer.decode_slots, ()
    transfer.donate(NUM_HITS)
    cluster.router.expect(donor, TransferFailed, transfer.key)
    transfer.decode_slots = slots
    transfer.end(donor, drain=False)
    cluster.router.expect(donor, Ended, transfer.key)
    transfer.donate(NUM_HITS)
    cluster.router.expect(donor, TransferFailed, transfer.key)
    expect_stats(cluster, donor, lambda s: s.rejected_messages == before + 2, "both are counted")
    _end(cluster, transfer, cluster.prefill, cluster.decode)


def _end(cluster: Cluster, transfer: Transfer, *movers: MoverProcess) -> None:
    for mover in movers:
        transfer.end(mover, drain=False)
    for mover in movers:
        cluster.router.expect(mover, Ended, transfer.key)


# --- what can break ------------------------------------------------------------------------------


def test_a_killed_donor(cluster: Cluster) -> None:
    """Both sides say ``peer_lost``; its death is the proof that frees their slots."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[3])
    transfer.reserve()
    transfer.stage_donated(0, 0, NUM_HITS)
    expect_stats(cluster, donor, lambda s: s.donor_slots_used > 0, "a slot in use")
    cluster.kill(donor)
    pipe.unlink()
    for mover in (cluster.prefill, cluster.decode):
        failed = cluster.router.expect(mover, TransferFailed)
        assert (failed.key, failed.reason) == (transfer.key, "peer_lost")
    _end(cluster, transfer, cluster.prefill, cluster.decode)


def test_a_donor_killed_after_its_part(cluster: Cluster) -> None:
    """Nobody misses it: the transfer goes on."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    transfer.reserve()
    transfer.stage_donated(0, 0, NUM_HITS)
    cluster.router.expect(donor, Ended, transfer.key)
    cluster.router.expect(cluster.prefill, Ready, transfer.key)
    cluster.kill(donor)
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.send(mover, PeerDied(donor.engine_id, donor.boot_id))
    claimed = cluster.prefill.engine.claim(transfer.key)
    cluster.prefill.engine.save_pages(claimed, transfer.prompt)
    cluster.claim_committed(transfer)
    cluster.finish(transfer)


@pytest.mark.parametrize("proof", ["resumed", "killed"])
def test_a_stopped_donor(cluster: Cluster, proof: str) -> None:
    """Slots that it may still write to are in quarantine until it goes on, or dies."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    transfer.reserve()
    donor.kill(signal.SIGSTOP)
    try:
        transfer.stage_donated(0, 0, NUM_HITS)
        for mover in (cluster.prefill, cluster.decode):
            transfer.end(mover, drain=False)
        for mover in (cluster.prefill, cluster.decode):
            expect_stats(cluster, mover, lambda s: s.slots_quarantined == 5, "quarantine")
            waiting = cluster.router.received(mover)
            assert not any(isinstance(each, Ended) for each in waiting)
        if proof == "killed":
            cluster.kill(donor)
    finally:
        if proof == "resumed":
            donor.kill(signal.SIGCONT)
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.expect(mover, Ended, transfer.key)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_target(cluster: Cluster, role: str) -> None:
    """A donor whose target is dead says so and gives its slots back."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[2])
    transfer.reserve()
    transfer.stage_donated(0, 0, NUM_HITS)
    expect_stats(cluster, donor, lambda s: s.donor_slots_used == 1, "one read hangs")
    victim = cluster.prefill if role == "prefill" else cluster.decode
    cluster.kill(victim)
    failed = cluster.router.expect(donor, TransferFailed)
    assert (failed.key, failed.reason) == (transfer.key, "peer_lost")
    survivors = [mover for mover in (cluster.prefill, cluster.decode) if mover is not victim]
    for mover in (donor, *survivors):
        transfer.end(mover, drain=False)
    release_pipe(pipe)
    for mover in (donor, *survivors):
        cluster.router.expect(mover, Ended, transfer.key)


def test_a_stalled_store(cluster: Cluster) -> None:
    """A donor's read that hangs is reported; both sides end at once, its slot when it returns."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[1])
    try:
        transfer.reserve()
        transfer.stage_donated(0, 0, NUM_HITS)
        failed = cluster.router.expect(donor, TransferFailed)
        assert (failed.key, failed.reason) == (transfer.key, "stalled")
        transfer.end(donor, drain=False)
        _end(cluster, transfer, cluster.prefill, cluster.decode)
        expect_stats(cluster, donor, lambda s: s.donor_slots_used == 1, "the hanging read's slot")
        assert not any(isinstance(each, Ended) for each in cluster.router.received(donor))
    finally:
        release_pipe(pipe)
    cluster.router.expect(donor, Ended, transfer.key)


def test_a_donor_that_stops_in_order(cluster: Cluster) -> None:
    """Both sides have its word before it is gone: between hosts its death would be no proof."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[1])
    try:
        transfer.reserve()
        transfer.stage_donated(0, 0, NUM_HITS)
        expect_stats(cluster, donor, lambda s: s.donor_slots_used == 1, "one read hangs")
        donor.kill(signal.SIGTERM)
        _end(cluster, transfer, cluster.prefill, cluster.decode)
        assert donor.process.poll() is None
    finally:
        release_pipe(pipe)
    assert cluster.exit_code(donor) == 0


def test_a_stuck_window(cluster: Cluster) -> None:
    """With every slot in a hanging read the next donation fails at once, and the router is told."""
    donor = cluster.need_donor()
    stuck = [cluster.donated(num_tokens=8, num_stored=1) for _ in range(NUM_DONOR_SLOTS)]
    pipes = [make_pipe(cluster.store, each.prompt.hashes[0]) for each in stuck]
    late = cluster.donated(num_stored=NUM_HITS)
    try:
        for transfer in stuck:
            transfer.reserve()
            transfer.stage_donated(0, 0, 1)
        expect_stats(cluster, donor, lambda s: s.donor_slots_stuck, "every slot is stuck")
        late.reserve()
        late.stage_donated(0, 0, NUM_HITS)
        failed = cluster.router.expect(donor, TransferFailed)
        while failed.key != late.key:
            failed = cluster.router.expect(donor, TransferFailed)
        assert failed.reason == "stalled"
        _end(cluster, late, donor, cluster.prefill, cluster.decode)
    finally:
        for pipe in pipes:
            release_pipe(pipe)
    for transfer in stuck:
        _end(cluster, transfer, donor, cluster.prefill, cluster.decode)
    expect_stats(cluster, donor, lambda s: not s.donor_slots_stuck, "no slot is stuck")


def test_a_lost_donation(cluster: Cluster) -> None:
    """A donor that was never told to start is asked by both sides, and answers."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    donor = cluster.need_donor()
    transfer.reserve()
    transfer.donor_reads_from = 0
    transfer.stage(0, NUM_HITS)
    _end(cluster, transfer, cluster.prefill, cluster.decode)
    transfer.donate(NUM_HITS)
    failed = cluster.router.expect(donor, TransferFailed)
    assert (failed.key, failed.reason) == (transfer.key, "key already used")


@pytest.mark.parametrize("staged", [True, False])
def test_router_lost(cluster: Cluster, staged: bool) -> None:
    """A donor ends with its router; sides that were never staged learn from it that it has."""
    transfer = cluster.donated(num_stored=NUM_HITS)
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[1])
    donor = cluster.need_donor()
    transfer.reserve()
    transfer.donor_reads_from = 0
    if staged:
        transfer.stage(0, NUM_HITS)
    transfer.donate(NUM_HITS)
    expect_stats(cluster, donor, lambda s: s.donor_slots_used == 1, "one read hangs")
    cluster.replace_router()
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)
    release_pipe(pipe)
    for mover in cluster.movers:
        cluster.wait_free(mover)
