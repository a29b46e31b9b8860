"""A mover whose router goes silent, is replaced or vanishes ends its transfers itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mover.cluster import Cluster
from tests.mover.material import WAIT_S, wait_for
from tests.mover.scripted_engine import MoverProcess
from tests.mover.scripted_router import ScriptedRouter
from tests.mover.states import STATES, Run
from vllm_dualpath.messages import Ended, Pong, TransferFailed, Welcome

STATES_OF_INTEREST = [
    "reserved_decode",
    "reserved",
    "staged_prefill",
    "staged_decode",
    "ready",
    "saving",
    "decode_claimed",
]


@pytest.mark.parametrize("state", STATES_OF_INTEREST)
def test_replaced_router(cluster: Cluster, state: str) -> None:
    """The next ``Pong`` has another boot id: everything ends, and the mover says ``Hello`` again.

    A mover that was granted slots but never staged asks its peer whether it writes (``StopQuery``).
    """
    run = Run(cluster)
    STATES[state](run)
    cluster.replace_router()
    run.release_all()
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)
        assert mover.engine.table.claim(run.transfer.key) is None


@contextmanager
def _silence(cluster: Cluster) -> Iterator[None]:
    """The router is there but says nothing, as when it hangs."""
    cluster.router.silent = True
    try:
        yield
    finally:
        cluster.router.silent = False


def test_silent_router(cluster: Cluster) -> None:
    """After ``router_lost_s`` without a word transfers end, also one that waits for slots."""
    run = Run(cluster)
    run.claimed()
    waiting = [cluster.transfer(num_tokens=64, num_stored=0) for _ in range(3)]
    with _silence(cluster):
        for transfer in waiting:
            transfer.ask_decode()
        cluster.router.expect_load(
            cluster.decode, lambda load: load.stats.open_transfers == 4, "three more reservations"
        )
        cluster.router.hellos.clear()
        # Unregistered, they say Hello again and again.
        for mover in (cluster.prefill, cluster.decode):
            cluster.router.join(mover)
    run.release_all()
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)
        assert mover.engine.table.claim(run.transfer.key) is None


def _is_published(run: Run) -> bool:
    """Claim and release at once: looking must not keep the entry open."""
    engine = run.cluster.prefill.engine
    claimed = engine.table.claim(run.transfer.key) is not None
    if claimed:
        engine.release(run.transfer.key)
    return claimed


def test_vanished_router(cluster: Cluster) -> None:
    """Without a router a mover ends its transfers; the next one gets one ``Hello``, not a flood."""
    run = Run(cluster)
    run.ready()
    endpoint = cluster.router.endpoint
    cluster.router.close()
    try:
        wait_for(lambda: not _is_published(run), "the published entry is still there")
        time.sleep(3)
    finally:
        cluster.router = ScriptedRouter(endpoint)
    num_hellos = 0

    def registered() -> bool:
        nonlocal num_hellos
        num_hellos += cluster.router.count_hellos(0.02)
        return len(cluster.router.hellos) == len(cluster.movers)

    wait_for(registered, "both movers register again")
    assert num_hellos <= 2 * len(cluster.movers)
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)


def test_same_router_again(cluster: Cluster) -> None:
    """A ``Pong`` or ``Welcome`` of the known router changes nothing."""
    run = Run(cluster)
    run.ready()
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.send(mover, Pong(cluster.router.boot_id))
        cluster.router.send(mover, Welcome(1, cluster.router.boot_id, 0.05, False))
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.expect_load(
            mover, lambda load: load.stats.slots_used == 5, "the transfer goes on"
        )
        waiting = cluster.router.received(mover)
        assert not any(isinstance(each, Ended | TransferFailed) for each in waiting)
    run.end(drain=False)
    run.assert_ended()


def test_a_message_that_was_lost(cluster: Cluster) -> None:
    """A ``Pong`` counts more messages than came: everything ends, and the mover registers anew."""
    run = Run(cluster)
    run.ready()
    before = {boot_id: hello.registration for boot_id, hello in cluster.router.hellos.items()}
    cluster.router.hellos.clear()
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.send(mover, Pong(cluster.router.boot_id, 1 << 40))
        cluster.router.join(mover)
        found = cluster.router.hellos[mover.boot_id].registration
        assert found == before[mover.boot_id] + 1
    run.release_all()
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)
        assert mover.engine.table.claim(run.transfer.key) is None


def test_a_mover_counts_what_it_sends(cluster: Cluster) -> None:
    """From one heartbeat to another the number grows by as many messages as came."""
    before = {mover.boot_id: _uncounted(cluster, mover) for mover in cluster.movers}
    run = Run(cluster)
    run.ready()
    run.end(drain=False)
    run.assert_ended()
    assert {mover.boot_id: _uncounted(cluster, mover) for mover in cluster.movers} == before


def _uncounted(cluster: Cluster, mover: MoverProcess) -> int:
    """What a mover has sent, less what this router has heard of it."""
    cluster.router.expect_load(mover, lambda _load: True, "a heartbeat")
    return cluster.router.uncounted[mover.boot_id]


def test_messages_of_the_old_router(cluster: Cluster) -> None:
    """The old router's transfers are unknown: ``End`` is confirmed, ``Stage`` refused."""
    run = Run(cluster)
    run.reserved()
    cluster.replace_router()
    for mover in (cluster.prefill, cluster.decode):
        cluster.wait_free(mover)
    run.transfer.stage(0, 0)
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.expect(mover, TransferFailed, run.transfer.key, timeout_s=WAIT_S)
    run.end(drain=False)
    run.assert_ended()
