"""Transfers that go well, between two real mover processes over UCX."""

from __future__ import annotations

import pytest

from tests.mover.cluster import Cluster
from tests.mover.material import GEOMETRY, block_payload, open_test_store, wait_for
from vllm_dualpath.messages import (
    Ended,
    NotCached,
    Reserved,
    Saved,
    SegmentDone,
    Stored,
    TransferFailed,
)
from vllm_dualpath.storage.directio import aligned_buffer


@pytest.mark.parametrize(
    ("split", "num_hits"),
    [(3, 3), (0, 3), (1, 3), (0, 0)],
    ids=["prefill", "decode", "split", "none"],
)
def test_plans(cluster: Cluster, split: int, num_hits: int) -> None:
    """Whoever reads the hits, both engines get every byte, and nothing stays in use."""
    transfer = cluster.transfer(num_stored=num_hits)
    transfer.reserve()
    transfer.stage(split, num_hits)
    if split:
        done = cluster.router.expect(cluster.prefill, SegmentDone, transfer.key)
        assert (done.first_block, done.good_until, done.error) == (0, split, "")
    if split < num_hits:
        done = cluster.router.expect(cluster.decode, SegmentDone, transfer.key)
        assert (done.first_block, done.good_until, done.error) == (split, num_hits, "")
    cluster.commit(transfer, num_hits)
    cluster.finish(transfer)


@pytest.mark.parametrize(("cached", "split"), [(1, 2), (2, 2), (1, 1), (3, 3)])
def test_blocks_that_the_prefill_engine_holds_itself(
    cluster: Cluster, cached: int, split: int
) -> None:
    """Nobody reads them; they are saved like new pages, and the decode engine gets every byte."""
    transfer = cluster.transfer(num_stored=3)
    transfer.num_cached = cached
    transfer.reserve()
    transfer.stage(split, 3)
    cluster.commit(transfer, 3)
    cluster.finish(transfer)
    done = cluster.router.received(cluster.prefill) + cluster.router.received(cluster.decode)
    read = [each for each in done if isinstance(each, SegmentDone)]
    assert sum(each.last_block - each.first_block for each in read) == 3 - cached


def test_an_engine_that_holds_them_no_more(cluster: Cluster) -> None:
    """The router hears of it, and the transfer goes on: every page that is missed is computed."""
    transfer = cluster.transfer(num_stored=3)
    transfer.num_cached = 2
    transfer.reserve()
    transfer.stage(2, 3)
    claimed = cluster.claim_ready(transfer, 3)
    cluster.prefill.engine.scheduler.send(NotCached(transfer.key))
    cluster.router.expect(cluster.prefill, NotCached, transfer.key)
    cluster.prefill.engine.save_pages(claimed, transfer.prompt)
    cluster.claim_committed(transfer)
    cluster.finish(transfer)


def test_pages_that_were_read_are_not_saved_over(cluster: Cluster) -> None:
    """Nor is a plan taken whose cached blocks reach past the hit."""
    transfer = cluster.transfer(num_stored=3)
    transfer.num_cached = 1
    transfer.reserve()
    transfer.stage(2, 3)
    claimed = cluster.claim_ready(transfer, 3)
    per_block = GEOMETRY.pages_per_block
    for pages in ((0, per_block + 1), (per_block, 2 * per_block)):
        cluster.prefill.engine.worker.send(Saved(transfer.key, 0, *pages))
    cluster.router.expect_load(
        cluster.prefill, lambda load: load.stats.rejected_messages >= 2, "both are rejected"
    )
    cluster.prefill.engine.save_pages(claimed, transfer.prompt)
    cluster.claim_committed(transfer)
    cluster.finish(transfer)
    wrong = cluster.transfer(num_stored=0)
    wrong.num_cached = 1
    wrong.reserve()
    wrong.stage_at(cluster.prefill, 0, 0)
    cluster.router.expect(cluster.prefill, TransferFailed, wrong.key)
    for mover in (cluster.prefill, cluster.decode):
        wrong.end(mover, drain=False)
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.expect(mover, Ended, wrong.key)


def test_new_blocks_are_stored(cluster: Cluster) -> None:
    """The prompt's full blocks reach the store once, and a fresh store reads them back."""
    transfer = cluster.transfer(num_tokens=37, num_stored=1)
    transfer.reserve()
    transfer.stage(1, 1)
    cluster.commit(transfer, 1)
    stored = set()
    while len(stored) < 3:
        stored |= {each.hash for each in cluster.router.expect(cluster.decode, Stored).blocks}
    assert stored == set(transfer.prompt.hashes[1:])
    store = open_test_store(cluster.store)
    for block_hash in transfer.prompt.hashes:
        buffer = aligned_buffer(GEOMETRY.slot_bytes)
        store.get(block_hash, buffer)
        assert (
            bytes(buffer)[: GEOMETRY.payload_bytes]
            == (block_payload(block_hash)[: GEOMETRY.payload_bytes])
        )
    store.close()
    cluster.finish(transfer)


def test_chunked_saves(cluster: Cluster) -> None:
    """Pages saved in pieces, twice, and out of order commit once all are there."""
    transfer = cluster.transfer(num_stored=1)
    transfer.reserve()
    transfer.stage(0, 1)
    claimed = cluster.claim_ready(transfer, 1)
    engine = cluster.prefill.engine
    engine.save_pages(claimed, transfer.prompt, first_page=5)
    assert cluster.decode.engine.table.claim(transfer.key) is None
    engine.save_pages(claimed, transfer.prompt)
    engine.save_pages(claimed, transfer.prompt, first_page=4)
    cluster.claim_committed(transfer)
    cluster.finish(transfer)


def test_several_releases(cluster: Cluster) -> None:
    """With n requests the decode slots are freed, early, after the n-th release."""
    transfer = cluster.transfer()
    transfer.reserve()
    transfer.stage(3, 3, num_releases=3)
    cluster.commit(transfer, 3)
    engine = cluster.decode.engine
    for _ in range(2):
        assert engine.table.claim(transfer.key) is not None
    for _ in range(2):
        engine.release(transfer.key)
    cluster.router.expect_load(
        cluster.decode, lambda load: load.stats.slots_used == 5, "slots are held by one claim"
    )
    engine.release(transfer.key)
    cluster.router.expect(cluster.decode, Ended, transfer.key)
    assert engine.table.claim(transfer.key) is None
    transfer.end(cluster.decode, drain=True)
    cluster.router.expect(cluster.decode, Ended, transfer.key)
    transfer.end(cluster.prefill, drain=True)
    cluster.prefill.engine.release(transfer.key)
    cluster.router.expect(cluster.prefill, Ended, transfer.key)


def test_reservations_are_first_come_first_served(cluster: Cluster) -> None:
    """A large reservation waits and holds back a smaller one behind it; both are granted."""
    first = cluster.transfer(num_tokens=64, num_stored=0)
    second = cluster.transfer(num_tokens=64, num_stored=0)
    third, fourth = (cluster.transfer(num_tokens=64, num_stored=0) for _ in range(2))
    small = cluster.transfer(num_tokens=8, num_stored=0)
    # 20 decode slots: two prompts of 8 blocks fit, the third waits, and so does the small one.
    first.reserve_decode()
    second.reserve_decode()
    third.ask_decode()
    small.ask_decode()
    fourth.ask_decode()
    cluster.router.expect_load(
        cluster.decode, lambda load: load.stats.open_transfers == 5, "three reservations wait"
    )
    assert not cluster.router.received(cluster.decode)
    fourth.end(cluster.decode, drain=False)
    cluster.router.expect(cluster.decode, Ended, fourth.key)
    first.end(cluster.decode, drain=False)
    order = [cluster.router.expect(cluster.decode, Reserved).key for _ in range(2)]
    assert order == [third.key, small.key]
    for transfer in (second, third, small):
        transfer.end(cluster.decode, drain=False)
        cluster.router.expect(cluster.decode, Ended, transfer.key)


def test_impossible_requests_are_refused(cluster: Cluster) -> None:
    """What can never be granted or executed is answered with ``TransferFailed``, and counted."""
    too_long = cluster.transfer(num_tokens=65, num_stored=0)
    too_long.ask_decode()
    cluster.router.expect(cluster.decode, TransferFailed, too_long.key)
    unknown = cluster.transfer(num_stored=0)
    unknown.decode_slots = unknown.prefill_slots = tuple(range(5))
    unknown.stage_at(cluster.decode, 0, 0)
    cluster.router.expect(cluster.decode, TransferFailed, unknown.key)
    gap = cluster.transfer(num_stored=0)
    gap.reserve()
    gap.prefill_slots = gap.prefill_slots[:-1]
    gap.stage_at(cluster.decode, 3, 3)
    cluster.router.expect(cluster.decode, TransferFailed, gap.key)
    for mover in (cluster.prefill, cluster.decode):
        gap.end(mover, drain=False)
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.expect(mover, Ended, gap.key)


def test_ended_keys_stay_ended(cluster: Cluster) -> None:
    """A key that has ended can be neither reserved nor staged again."""
    transfer = cluster.transfer(num_stored=0)
    transfer.end(cluster.decode, drain=False)
    cluster.router.expect(cluster.decode, Ended, transfer.key)
    transfer.ask_decode()
    cluster.router.expect(cluster.decode, TransferFailed, transfer.key)


def test_many_transfers_at_once(cluster: Cluster) -> None:
    """Transfers that share both movers do not disturb each other."""
    transfers = [cluster.transfer(num_tokens=37, num_stored=3) for _ in range(4)]
    for transfer in transfers:
        transfer.reserve()
    for split, transfer in enumerate(transfers):
        transfer.stage(split, 3)
    for transfer in reversed(transfers):
        cluster.commit(transfer, 3)
    for transfer in transfers:
        cluster.finish(transfer)
    wait_for(lambda: cluster.decode.engine.table.claim(transfers[0].key) is None, "entry is gone")
