"""A mover whose peer is killed or stopped: slots wait for proof, then are free."""

from __future__ import annotations

import signal
import time

import msgspec
import pytest

from tests.mover.cluster import Cluster
from tests.mover.material import WAIT_S, make_pipe, release_pipe
from tests.mover.scripted_engine import MoverProcess
from tests.mover.states import STATES, Run
from vllm_dualpath.messages import (
    Ended,
    PeerDied,
    Ready,
    TransferFailed,
)


@pytest.mark.parametrize(
    ("state", "role"),
    [
        ("reserved", "decode"),
        ("ready", "prefill"),
        ("saving", "decode"),
        ("saving", "prefill"),
        ("decode_claimed", "prefill"),
        ("prefill_released", "decode"),
    ],
)
def test_killed_peer(cluster: Cluster, state: str, role: str) -> None:
    """The survivor says ``peer_lost`` unless it needs the peer no more, and frees its slots."""
    run = Run(cluster)
    STATES[state](run)
    victim: MoverProcess = getattr(cluster, role)
    other = cluster.decode if role == "prefill" else cluster.prefill
    cluster.kill(victim)
    if (state, role) == ("decode_claimed", "prefill"):
        # Every page is there: the death of the side that wrote them changes nothing.
        cluster.router.send(other, PeerDied(victim.engine_id, victim.boot_id))
        cluster.router.expect_load(other, lambda load: load.stats.slots_used == 5, "still in use")
        waiting = cluster.router.received(other)
        assert not any(isinstance(each, TransferFailed) for each in waiting)
    else:
        failed = cluster.router.expect(other, TransferFailed)
        assert (failed.key, failed.reason) == (run.transfer.key, "peer_lost")
    run.transfer.end(other, drain=False)
    other_role = "decode" if role == "prefill" else "prefill"
    if other_role in run.open_claims:
        run.release(other_role)
    cluster.router.expect(other, Ended, run.transfer.key)


@pytest.mark.parametrize("proof", ["resumed", "killed"])
def test_stopped_writer(cluster: Cluster, proof: str) -> None:
    """Slots that a stopped peer may still write to are in quarantine until it goes on, or dies."""
    run = Run(cluster)
    run.reserved()
    cluster.decode.kill(signal.SIGSTOP)
    try:
        run.transfer.stage(0, 3)
        run.transfer.end(cluster.prefill, drain=False)
        run.transfer.end(cluster.decode, drain=False)
        cluster.router.expect_load(
            cluster.prefill,
            lambda load: load.stats.slots_quarantined == 5 and load.stats.slots_used == 0,
            "slots in quarantine",
        )
        waiting = cluster.router.received(cluster.prefill)
        assert not any(isinstance(each, Ended) for each in waiting)
        if proof == "killed":
            cluster.kill(cluster.decode)
    finally:
        if proof == "resumed":
            cluster.decode.kill(signal.SIGCONT)
    cluster.router.expect(cluster.prefill, Ended, run.transfer.key)


def test_stopped_target(cluster: Cluster) -> None:
    """A peer that takes no data for ``stage_s`` is reported; all is free when it goes on."""
    run = Run(cluster)
    run.reserved()
    cluster.decode.kill(signal.SIGSTOP)
    try:
        run.transfer.stage(3, 3)
        # Ready needs no answer of the peer, but its silence is noticed.
        cluster.router.expect(cluster.prefill, Ready, run.transfer.key)
        failed = cluster.router.expect(cluster.prefill, TransferFailed)
        assert (failed.key, failed.reason) == (run.transfer.key, "peer_lost")
    finally:
        run.end(drain=False)
        cluster.decode.kill(signal.SIGCONT)
    run.assert_ended()


def test_peer_that_left(cluster: Cluster) -> None:
    """A peer out of the cluster but alive: the transfer fails, and its word still counts."""
    run = Run(cluster)
    run.ready()
    cluster.router.send(cluster.prefill, PeerDied(cluster.decode.engine_id, cluster.decode.boot_id))
    failed = cluster.router.expect(cluster.prefill, TransferFailed)
    assert (failed.key, failed.reason) == (run.transfer.key, "peer_lost")
    run.end(drain=False)
    run.assert_ended()
    again = Run(cluster)
    again.committed()
    again.end(drain=True)
    again.release_all()
    again.assert_ended()


def staged_with_nonsense(cluster: Cluster) -> Run:
    """A transfer whose plan gives the prefill side a peer at an address that makes no sense."""
    run = Run(cluster)
    run.reserved()
    nonsense = msgspec.structs.replace(
        cluster.decode.peer(run.transfer.decode_slots), address=b"nonsense", boot_id=bytes(16)
    )
    run.transfer.stage_at(cluster.prefill, 3, 3, peer=nonsense)
    failed = cluster.router.expect(cluster.prefill, TransferFailed)
    assert (failed.key, failed.reason) == (run.transfer.key, "peer_lost")
    return run


def test_unreachable_peer(cluster: Cluster) -> None:
    """A peer whose address makes no sense fails the transfer that names it, nothing else."""
    run = staged_with_nonsense(cluster)
    run.end(drain=False)
    run.assert_ended()


def test_a_peer_that_asks_is_answered_where_it_says(cluster: Cluster) -> None:
    """Whatever the plan said of it: it asks while the other side's part is still open."""
    run = staged_with_nonsense(cluster)
    run.transfer.end(cluster.decode, drain=False)
    time.sleep(0.5)  # it asks by a notice, which nothing here can see
    run.transfer.end(cluster.prefill, drain=False)
    run.assert_ended()


# --- stalled store -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_stalled_read(cluster: Cluster, role: str) -> None:
    """A read that hangs is reported within ``stage_s``; its slots come back when it returns."""
    transfer = cluster.transfer(num_stored=3)
    pipe = make_pipe(cluster.store, transfer.prompt.hashes[1])
    reader: MoverProcess = getattr(cluster, role)
    other = cluster.decode if role == "prefill" else cluster.prefill
    try:
        transfer.reserve()
        transfer.stage(3 if role == "prefill" else 0, 3)
        failed = cluster.router.expect(reader, TransferFailed)
        assert (failed.key, failed.reason) == (transfer.key, "stalled")
        for mover in (reader, other):
            transfer.end(mover, drain=False)
        cluster.router.expect_load(
            reader, lambda load: load.stats.slots_used == 5, "the slots of the hanging read"
        )
        assert not any(isinstance(each, Ended) for each in cluster.router.received(reader))
    finally:
        release_pipe(pipe)
    for mover in (reader, other):
        cluster.router.expect(mover, Ended, transfer.key, timeout_s=WAIT_S)


def test_queued_reads_are_not_stalled(cluster: Cluster) -> None:
    """Behind hanging reads an ended transfer's queued ones do not wait for their turn."""
    stuck = [cluster.transfer(num_tokens=8, num_stored=1) for _ in range(4)]
    pipes = [make_pipe(cluster.store, each.prompt.hashes[0]) for each in stuck]
    queued = cluster.transfer(num_stored=3)
    try:
        for transfer in (*stuck, queued):
            transfer.reserve()
            transfer.stage(len(transfer.prompt.hashes[:3]), len(transfer.prompt.hashes[:3]))
        for mover in (cluster.prefill, cluster.decode):
            queued.end(mover, drain=False)
            cluster.router.expect(mover, Ended, queued.key)
    finally:
        for pipe in pipes:
            release_pipe(pipe)
    for transfer in stuck:
        for mover in (cluster.prefill, cluster.decode):
            transfer.end(mover, drain=False)
            cluster.router.expect(mover, Ended, transfer.key)
