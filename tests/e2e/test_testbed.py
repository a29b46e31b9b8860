"""A testbed on this machine: shaped NICs, a network file system, and a second read path that pays.

Needs root and GlusterFS; skipped with a reason where these are not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench.comparison.measures import RunUse, hit_bytes
from vllm_dualpath.bench.comparison.record import Comparison
from vllm_dualpath.bench.comparison.run import compare
from vllm_dualpath.bench.comparison.settings import ComparisonPlan
from vllm_dualpath.bench.testbed import lifecycle, network
from vllm_dualpath.bench.testbed.commands import missing_requirements
from vllm_dualpath.bench.testbed.counters import Nic, NicCounters
from vllm_dualpath.bench.testbed.layout import TestbedSpec, directory, mount_point
from vllm_dualpath.bench.tiny_model import TinyModel

from .deployment import wait_until

MISSING = missing_requirements()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"a testbed needs {'; '.join(MISSING)}")

NAME = "pytest"
SPEC = TestbedSpec(NAME, 1, 1, 200_000_000, None)
COMMAND = (sys.executable, "-m", "vllm_dualpath.cli", "testbed")
FILE_BYTES = 4 << 20


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing is there before, whatever an earlier run left, nor after."""
    lifecycle.down(NAME)
    yield
    lifecycle.down(NAME)


def leftovers() -> list[str]:
    """Whatever still tells of the testbed: namespaces, mounts, directory, processes."""
    found = [*network.namespaces(NAME), *map(str, lifecycle.mounts(NAME))]
    found += [str(directory(NAME))] if directory(NAME).exists() else []
    mark = f"{directory(NAME)}/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found += [entry.name] if mark in (entry / "cmdline").read_bytes() else []
            except OSError:
                continue  # it has ended
    return found


def test_bytes_cross_the_nics_and_down_leaves_nothing(clean: None) -> None:
    """What one node writes another reads through its own storage NIC; then all of it is gone."""
    lifecycle.up(SPEC)
    counters = NicCounters(SPEC)
    before = counters.read()
    written = os.urandom(FILE_BYTES)
    (mount_point(NAME, "prefill-0") / "file").write_bytes(written)
    assert (mount_point(NAME, "decode-0") / "file").read_bytes() == written
    after = counters.read()
    counters.close()
    sent = after[Nic("prefill-0", "storage")].sent - before[Nic("prefill-0", "storage")].sent
    decode = Nic("decode-0", "storage")
    assert sent >= FILE_BYTES
    assert after[decode].received - before[decode].received >= FILE_BYTES
    status = subprocess.run([*COMMAND, "status", "--name", NAME], capture_output=True, text=True)
    assert status.returncode == 0
    assert "decode-0: namespace dualpath-pytest-decode-0, 1 processes, store mounted" in (
        status.stdout
    )
    _kill_brick()
    broken = subprocess.run([*COMMAND, "status", "--name", NAME], capture_output=True, text=True)
    assert broken.returncode == 1
    assert "no glusterfsd runs" in broken.stderr
    # What somebody deletes by hand: glusterd runs on in a namespace without a name.
    subprocess.run(["ip", "netns", "del", f"dualpath-{NAME}-storage"], check=True)
    assert subprocess.run([*COMMAND, "down", "--name", NAME], capture_output=True).returncode == 0
    assert leftovers() == []
    assert lifecycle.down(NAME) == []


def _kill_brick() -> None:
    pids = network.processes_in(f"dualpath-{NAME}-storage")
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids}
    (brick,) = (pid for pid, name in names.items() if name == "glusterfsd")
    os.kill(brick, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{brick}/ns/net").exists(), "the end of the brick", 10)


def test_up_that_is_told_to_end_leaves_nothing(clean: None) -> None:
    """``timeout`` and systemd send SIGTERM: it undoes what it has made, as on Ctrl-C."""
    up = subprocess.Popen([*COMMAND, "up", "--name", NAME], stderr=subprocess.DEVNULL)
    wait_until(lambda: bool(network.namespaces(NAME)) or up.poll() is not None, "a namespace", 60)
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) != 0
    assert leftovers() == []


def test_down_cleans_up_after_an_up_that_was_killed(clean: None) -> None:
    """Killed while it mounts, ``up`` leaves no state file; ``down`` finds everything even so."""
    up = subprocess.Popen([*COMMAND, "up", "--name", NAME], stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not lifecycle.mounts(NAME) and up.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    up.send_signal(signal.SIGKILL)
    assert up.wait() == -signal.SIGKILL
    assert leftovers() != []
    lifecycle.down(NAME)
    assert leftovers() == []


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Both paths beside one, on NICs so slow that storage is what everybody waits for."""
    plan = ComparisonPlan(
        modes=("prefill_only", "split"),
        repeats=1,
        agents=3,
        turns=2,
        context=1024,
        generate=4,
        num_alone=0,
        storage_rate=SPEC.storage_rate,
        compute_rate=4 * (SPEC.storage_rate or 0),
        model=TinyModel(layers=4, hidden=128, heads=32, kv_heads=32, head_dim=64),
    )
    lifecycle.down("bench")
    return compare(plan, tmp_path_factory.mktemp("logs"), print)


def test_both_paths_are_faster_than_one(comparison: Comparison) -> None:
    """With both nodes' storage NICs the agents are done sooner; twice as fast is the ideal."""
    (ratio,) = comparison.topologies[0].ratios("split")
    assert ratio > 1.25


def test_answers_do_not_depend_on_the_path(comparison: Comparison) -> None:
    """Token by token the same, in float32, and no request failed."""
    assert comparison.exact


def test_every_hit_byte_crossed_the_storage_nic_of_its_reader(comparison: Comparison) -> None:
    """By the kernel's counters: one node's NIC carries all of it, or both half."""
    found = comparison.topologies[0]
    for mode, readers in (("prefill_only", {"prefill-0": 1.0}), ("split", {})):
        (run,) = found.of(mode)
        expected = hit_bytes(comparison.plan, run)
        read = {use.nic.node: use.received_bytes for use in RunUse(run, found.spec).nics("storage")}
        assert sum(read.values()) >= 0.9 * expected
        for node, share in readers.items():
            assert read[node] >= 0.9 * share * expected
        if mode == "split":
            assert min(read.values()) >= 0.3 * expected


def test_pushed_bytes_cross_the_compute_nics(comparison: Comparison) -> None:
    """Namespaces share the machine's memory, and no byte takes that way round the NIC."""
    found = comparison.topologies[0]
    (run,) = found.of("prefill_only")
    sent = {use.nic.node: use.sent_bytes for use in RunUse(run, found.spec).nics("compute")}
    assert sent["prefill-0"] >= 0.9 * hit_bytes(comparison.plan, run)
