"""The mover as a process: start, refusal, idleness, and its end with its engine."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.control.routers import CurveRouter
from tests.mover.cluster import Cluster
from tests.mover.material import GEOMETRY, WAIT_S, open_test_store, wait_for
from tests.mover.scripted_engine import MoverProcess
from tests.mover.states import Run
from vllm_dualpath.control.curve import create_keys
from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.errors import DualPathError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Evict,
    Goodbye,
    LocalLoad,
    LocalStats,
    Persist,
    PersistSlots,
    ReturnPersistSlots,
    SnapshotEnd,
    Stored,
    Welcome,
)

FAST = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_idle_mover_sleeps(cluster: Cluster) -> None:
    """With heartbeats, and after transfers, an idle mover uses no CPU to speak of."""
    pids = [each.process.pid for each in (cluster.prefill, cluster.decode)]
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.send(mover, Welcome(PROTOCOL_VERSION, cluster.router.boot_id, 0.5, False))
    time.sleep(0.6)
    cluster.router.pump()
    before = [_cpu_seconds(pid) for pid in pids]
    started = time.monotonic()
    while time.monotonic() - started < 2:
        cluster.router.pump(0.25)
    used = [_cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    for mover in (cluster.prefill, cluster.decode):
        cluster.router.send(mover, Welcome(PROTOCOL_VERSION, cluster.router.boot_id, 0.05, False))
    # CPU times have a resolution of 10 ms.
    assert max(used) <= 0.04, used


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_engine_sees_counters(cluster: Cluster) -> None:
    """The scheduler side gets the counters after activity, the last report saying ``idle``."""
    before = cluster.router.expect_load(cluster.prefill, lambda _: True, "heartbeat").stats
    run = Run(cluster)
    run.decode_claimed()
    run.end(drain=True)
    run.release_all()
    run.assert_ended()

    def is_last(report: LocalStats) -> bool:
        """Not one of the mover's start, or of an earlier test."""
        return report.idle and report.stats.storage_read_bytes > before.storage_read_bytes

    stats = cluster.prefill.engine.expect(LocalStats, is_last).stats
    assert stats.push_to_decode_bytes > before.push_to_decode_bytes
    assert stats.slots_used == 0


def test_persist_slots(cluster: Cluster) -> None:
    """Filled slots are stored and granted again; slots the engine does not hold are refused."""
    engine = cluster.decode.engine
    fresh = engine.expect(PersistSlots).slots
    assert len(fresh) == 4
    prompt = cluster.prompt(16, 0)
    before = cluster.router.expect_load(cluster.decode, lambda _: True, "heartbeat").stats
    for slot, block_hash in zip(fresh, prompt.hashes, strict=False):
        start = slot * GEOMETRY.slot_bytes
        engine.staging[start : start + GEOMETRY.slot_bytes] = bytes([slot]) * GEOMETRY.slot_bytes
        engine.worker.send(Persist(slot, block_hash, bytes(32)))
    again = engine.expect(PersistSlots).slots
    assert set(again) == set(fresh[:2])
    stored = [cluster.router.expect(cluster.decode, Stored).blocks[0].hash for _ in range(2)]
    assert set(stored) == set(prompt.hashes)
    for bad in (0, 19, 1000):
        engine.worker.send(Persist(bad, prompt.hashes[0], bytes(32)))
    engine.worker.send(ReturnPersistSlots((fresh[0], fresh[0])))
    engine.worker.send(ReturnPersistSlots((0,)))
    cluster.router.expect_load(
        cluster.decode,
        lambda load: load.stats.rejected_messages == before.rejected_messages + 5,
        "bad slots are not counted",
    )
    # Given back, they are granted again: the engine always holds every free one.
    engine.worker.send(ReturnPersistSlots(again))
    assert set(engine.expect(PersistSlots).slots) == set(again)


def test_store_errors_are_counted(cluster: Cluster) -> None:
    """A block that cannot be written is counted, not reported as stored, and frees its slots."""
    transfer = cluster.transfer(num_tokens=37, num_stored=0)
    before = cluster.router.expect_load(cluster.decode, lambda _: True, "heartbeat").stats
    # A file where the fan-out directory of a block belongs: its rename fails.
    name = transfer.prompt.hashes[2].hex()
    (model_dir,) = (path for path in cluster.store.iterdir() if path.is_dir())
    (model_dir / name[:2]).mkdir(exist_ok=True)
    obstacle = model_dir / name[:2] / name[2:4]
    obstacle.write_text("in the way")
    transfer.reserve()
    transfer.stage(0, 0)
    cluster.commit(transfer, 0)
    cluster.finish(transfer)
    cluster.router.expect_load(
        cluster.decode,
        lambda load: (
            load.stats.blocks_stored == before.blocks_stored + 3
            and load.stats.blocks_not_stored == before.blocks_not_stored + 1
        ),
        "three of four blocks stored",
    )
    obstacle.unlink()


def test_snapshot(cluster: Cluster) -> None:
    """Asked by ``Welcome``, a mover sends all that the store holds, then the count."""
    cluster.prompt(64, 8)
    cluster.router.send(
        cluster.prefill, Welcome(PROTOCOL_VERSION, cluster.router.boot_id, 0.05, True)
    )
    end = cluster.router.expect(cluster.prefill, SnapshotEnd)
    blocks = [
        block
        for message in cluster.router.received(cluster.prefill)
        if isinstance(message, Stored)
        for block in message.blocks
    ]
    store = open_test_store(cluster.store)
    assert {block.hash for block in blocks} == {entry.hash for entry in store.entries()}
    assert end.num_blocks == len(blocks) >= 8
    store.close()


def test_evict(cluster: Cluster) -> None:
    """Blocks that the router evicts leave the store; others stay."""
    prompt = cluster.prompt(40, 5)
    store = open_test_store(cluster.store)
    cluster.router.send(cluster.decode, Evict((*prompt.hashes[3:], bytes(32))))
    wait_for(lambda: not any(map(store.contains, prompt.hashes[3:])), "blocks are still there")
    assert all(map(store.contains, prompt.hashes[:3]))
    store.close()


# --- bad input -----------------------------------------------------------------------------------


def _rejected(cluster: Cluster, mover: MoverProcess) -> int:
    return cluster.router.expect_load(mover, lambda _: True, "alive").stats.rejected_messages


def test_garbage_from_the_router(cluster: Cluster) -> None:
    """Random bytes on the control network are counted; the mover goes on."""
    before = _rejected(cluster, cluster.prefill)
    num_sent = 0

    @FAST
    @given(st.binary(max_size=200))
    def send(payload: bytes) -> None:
        nonlocal num_sent
        num_sent += 1
        cluster.router.socket.send_multipart([cluster.prefill.boot_id, payload])

    send()
    cluster.router.expect_load(
        cluster.prefill,
        lambda load: load.stats.rejected_messages == before + num_sent,
        f"{num_sent} bad messages",
    )


def test_garbage_from_the_engine(cluster: Cluster) -> None:
    """Random frames on an attached connection are counted; the connection and the mover stay."""
    before = _rejected(cluster, cluster.decode)
    num_sent = 0

    @FAST
    @given(st.binary(max_size=200))
    def send(payload: bytes) -> None:
        nonlocal num_sent
        num_sent += 1
        link = cluster.decode.engine.worker
        link._outgoing.append(payload)  # the link itself encodes only whole messages
        link._wake()

    send()
    cluster.decode.engine.worker.send(LocalLoad(bytes(16), (bytes(32),)))
    cluster.router.expect_load(
        cluster.decode,
        lambda load: load.stats.rejected_messages == before + num_sent + 1,
        f"{num_sent} bad messages and a local load where a router plans",
    )


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff" * 64, b"\0\0\0\0" * 10, (1 << 31).to_bytes(4, "little") + b"x", b"\5\0\0\0abc"],
    ids=["closed", "huge", "empty frames", "too long", "cut off"],
)
def test_garbage_before_attach(cluster: Cluster, payload: bytes) -> None:
    """A stranger on the socket that does not attach changes nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(str(cluster.decode.socket_path))
        stranger.sendall(payload)
    _rejected(cluster, cluster.decode)
    assert cluster.decode.engine.worker.is_open


def test_second_worker_is_refused(cluster: Cluster) -> None:
    """A second worker side gets no memory; the first keeps its connection."""
    second = EngineLink(cluster.decode.socket_path, "worker", lambda _: None, lambda _: None)
    with pytest.raises(DualPathError):
        second.connect(WAIT_S)
    assert cluster.decode.engine.worker.is_open
    _rejected(cluster, cluster.decode)


# --- start and end -------------------------------------------------------------------------------


def test_end_with_the_engine(cluster: Cluster) -> None:
    """When the engine closes its socket, the mover finishes its stores and exits 0."""
    run = Run(cluster)
    run.decode_claimed()
    mover = cluster.decode
    store = open_test_store(cluster.store)
    mover.engine.close()
    assert cluster.exit_code(mover) == 0
    assert not mover.socket_path.exists()
    assert all(map(store.contains, run.transfer.prompt.hashes))
    assert "engine" in mover.log.read_text()
    store.close()
    cluster.router.expect(mover, Goodbye)
    run.transfer.end(cluster.prefill, drain=False)
    run.release("prefill")


def test_sigterm(cluster: Cluster) -> None:
    """SIGTERM ends an idle mover in order and at once."""
    mover = cluster.prefill
    before = time.monotonic()
    mover.kill(signal.SIGTERM)
    assert cluster.exit_code(mover) == 0
    assert time.monotonic() - before < 5
    cluster.router.expect(mover, Goodbye)
    assert wait_for(mover.engine.closed.get, "the engine hears of it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"staging_bytes": GEOMETRY.slot_bytes}, "staging_bytes"),
        ({"listen": "192.0.2.1", "insecure": True}, "192.0.2.1"),
        ({"transport": "carrier pigeon"}, "transport"),
    ],
    ids=["staging", "listen", "transport"],
)
def test_bad_configuration(
    tmp_path: Path, store_dir: Path, change: dict[str, object], message: str
) -> None:
    """What cannot work is refused at start with exit code 2 and a reason."""
    mover = MoverProcess(tmp_path, "bad", "prefill", "tcp://127.0.0.1:9", store_dir, **change)
    assert mover.process.wait(WAIT_S) == 2
    assert message in mover.log.read_text()
    mover.assert_clean_log()


def test_nobody_attaches(tmp_path: Path, store_dir: Path) -> None:
    """Without an engine in ``attach_s`` the mover ends by itself, and its spec file is gone."""
    mover = MoverProcess(
        tmp_path, "alone", "prefill", "tcp://127.0.0.1:9", store_dir, deadlines={"attach_s": 0.2}
    )
    assert mover.process.wait(WAIT_S) == 0
    assert not mover.socket_path.exists()
    assert not (tmp_path / "alone.spec").exists()


def test_keys(tmp_path: Path, store_dir: Path) -> None:
    """With keys on both sides a mover registers over CURVE."""
    create_keys(tmp_path / "keys")
    with CurveRouter(tmp_path / "keys") as router:
        mover = MoverProcess(
            tmp_path, "curve", "prefill", router.endpoint, store_dir, keys=str(tmp_path / "keys")
        )
        _ = mover.engine
        identity, _ = router.recv(WAIT_S)
        assert identity == mover.boot_id
        mover.close()
        assert mover.process.returncode == 0


def test_evict_by_another_mover_of_the_router(cluster: Cluster) -> None:
    """Whichever mover the router asks removes the blocks: the lease is the router's."""
    prompt = cluster.prompt(40, 5)
    store = open_test_store(cluster.store)
    for mover, block_hash in (
        (cluster.decode, prompt.hashes[4]),
        (cluster.prefill, prompt.hashes[3]),
    ):
        cluster.router.send(mover, Evict((block_hash,)))
        wait_for(lambda block=block_hash: not store.contains(block), "block is still there")
    store.close()
