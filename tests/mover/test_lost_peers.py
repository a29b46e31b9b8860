"""A mover whose peer is killed or stopped: failures are told, slots wait for proof, then are free."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.mover.cluster import Cluster
from tests.mover.scripted import WAIT_S, MoverProcess, wait_for
from tests.mover.states import STATES, Run
from vllm_dualpath.messages import (
    Ended,
    PeerDied,
    Ready,
    SegmentDone,
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
        cluster.router.expect(cluster.prefill, SegmentDone, timeout_s=0.5)
    except AssertionError:
        failed = cluster.router.expect(cluster.prefill, TransferFailed)
        assert failed.reason == "peer_lost"
    finally:
        run.end(drain=False)
        cluster.decode.kill(signal.SIGCONT)
    run.assert_ended()


def test_peer_that_left(cluster: Cluster) -> None:
    """A peer out of the cluster but alive: the transfer fails, and its word still counts."""
    run = Run(cluster)
    run.ready()
    cluster.router.send(
        cluster.prefill, PeerDied(cluster.decode.engine_id, cluster.decode.boot_id)
    )
    failed = cluster.router.expect(cluster.prefill, TransferFailed)
    assert (failed.key, failed.reason) == (run.transfer.key, "peer_lost")
    run.end(drain=False)
    run.assert_ended()
    again = Run(cluster)
    again.committed()
    again.end(drain=True)
    again.release_all()
    again.assert_ended()


def test_unreachable_peer(cluster: Cluster) -> None:
    """A peer whose address makes no sense fails the transfer that names it, nothing else."""
    run = Run(cluster)
    run.reserved()
    assert cluster.decode.hello is not None
    good = cluster.decode.hello
    try:
        cluster.decode.hello = _replace_address(good, b"nonsense")
        peer = cluster.decode.peer(run.transfer.decode_slots)
        assert peer.address == b"nonsense"
        run.transfer.stage_at(cluster.prefill, 3, 3)
        # The endpoint to this boot id may be open already; a bad region then goes unused.
        done = wait_for(
            lambda: next(
                (
                    each
                    for each in cluster.router.received(cluster.prefill)
                    if isinstance(each, TransferFailed | Ready)
                ),
                None,
            ),
            "an outcome",
        )
        assert done is not None
    finally:
        cluster.decode.hello = good
    run.end(drain=False)
    run.assert_ended()


def _replace_address(hello: object, address: bytes) -> object:
    import msgspec

    return msgspec.structs.replace(hello, address=address)  # type: ignore[type-var]


# --- stalled store -------------------------------------------------------------------------------


def _make_pipe(cluster: Cluster, block_hash: bytes) -> Path:
    """Replace a stored block by a named pipe: opening it for reading blocks."""
    name = block_hash.hex()
    (path,) = cluster.store.glob(f"*/{name[:2]}/{name[2:4]}/{name}")
    path.unlink()
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_stalled_read(cluster: Cluster, role: str) -> None:
    """A read that hangs is reported within ``stage_s``; its slots come back when it returns."""
    transfer = cluster.transfer(num_stored=3)
    pipe = _make_pipe(cluster, transfer.prompt.hashes[1])
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
        os.close(os.open(pipe, os.O_WRONLY))
    for mover in (reader, other):
        cluster.router.expect(mover, Ended, transfer.key, timeout_s=WAIT_S)


def test_queued_reads_are_not_stalled(cluster: Cluster) -> None:
    """Behind hanging reads an ended transfer's queued ones do not wait for their turn."""
    stuck = [cluster.transfer(num_tokens=8, num_stored=1) for _ in range(4)]
    pipes = [_make_pipe(cluster, each.prompt.hashes[0]) for each in stuck]
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
            os.close(os.open(pipe, os.O_WRONLY))
    for transfer in stuck:
        for mover in (cluster.prefill, cluster.decode):
            transfer.end(mover, drain=False)
            cluster.router.expect(mover, Ended, transfer.key)
