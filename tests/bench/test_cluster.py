"""The launcher when things do not go well. The router is real; engines are small programs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench import servers
from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.bench.servers import PlainServer
from vllm_dualpath.cli.up import run_cluster, stop_event
from vllm_dualpath.control.host import process_start_ticks
from vllm_dualpath.errors import LaunchError

DIES = "print('no such model'); raise SystemExit(3)"
WAITS = "import time; print('loading', flush=True); time.sleep(60)"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What engines run instead of vLLM: the last element of the list."""
    command = [sys.executable, "-c", WAITS]
    monkeypatch.setattr(servers, "server_command", lambda *_args, **_kw: list(command))
    yield command


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """``stop_event`` takes the signals of its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def cluster_of(tmp_path: Path, start_timeout_s: float = 30.0) -> LocalCluster:
    (tmp_path / "store").mkdir()
    return LocalCluster(
        ClusterSpec(
            "M",
            f"file://{tmp_path}/store",
            log_dir=tmp_path / "logs",
            start_timeout_s=start_timeout_s,
        )
    )


def pids(cluster: LocalCluster) -> list[int]:
    return [process.pid for process in cluster.processes]


def test_an_engine_that_dies_at_start_ends_everything(tmp_path: Path, program: list[str]) -> None:
    """The error has the end of its log; the router and the other engines are stopped."""
    program[-1] = DIES
    cluster = cluster_of(tmp_path)
    with pytest.raises(LaunchError, match=r"(?s)exit code 3.*no such model"), cluster:
        pass
    assert all(process_start_ticks(pid) is None for pid in pids(cluster))


def test_engines_that_never_register_are_named(tmp_path: Path, program: list[str]) -> None:
    """After the deadline the message says who is missing, with the end of a log."""
    assert program[-1] == WAITS
    with (
        pytest.raises(LaunchError, match=r"(?s)does not list prefill-0, decode-0.*loading"),
        cluster_of(tmp_path, start_timeout_s=3.0),
    ):
        pass


def test_starting_can_be_cancelled(tmp_path: Path, program: list[str]) -> None:
    """SIGTERM while starting sets the event: everything ends long before the deadline."""
    assert program[-1] == WAITS
    cluster, stop = cluster_of(tmp_path), threading.Event()
    threading.Timer(0.5, stop.set).start()
    start_s = time.monotonic()
    with pytest.raises(LaunchError, match="cancelled"):
        run_cluster(cluster, None, stop)
    assert time.monotonic() - start_s < 20
    assert all(process_start_ticks(pid) is None for pid in pids(cluster))


class ReadyCluster(LocalCluster):
    """Counts as ready when its processes run: what comes after is under test."""

    def wait_ready(self, cancel: threading.Event | None = None) -> None:
        del cancel


def test_a_later_death_is_a_warning_and_the_exit_code(
    tmp_path: Path, program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One engine dies: said once, the rest goes on until told to stop, exit code 1."""
    assert program[-1] == WAITS
    cluster, stop = ReadyCluster(cluster_of(tmp_path).spec), threading.Event()
    status = tmp_path / "status.json"

    def disturb() -> None:
        while not status.exists():
            time.sleep(0.05)
        cluster.engines[0].process.terminate()
        time.sleep(1.5)
        still_alive.append(cluster.engines[1].process.alive)
        stop.set()

    still_alive: list[bool] = []
    thread = threading.Thread(target=disturb)
    thread.start()
    assert run_cluster(cluster, status, stop) == 1
    thread.join(5)
    assert still_alive == [True]
    captured = capsys.readouterr()
    assert captured.err.count("WARNING: prefill-0") == 1
    assert captured.out.startswith(f"ready: {cluster.url}")
    described = json.loads(status.read_text())
    assert described["router"]["url"] == cluster.url
    assert [engine["role"] for engine in described["engines"]] == ["prefill", "decode"]
    assert described["engines"][1]["pid"] == cluster.engines[1].process.pid


def test_sigterm_ends_the_command_in_order(
    tmp_path: Path, program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to stop with everything alive: no warning, exit code 0, nothing left."""
    assert program[-1] == WAITS
    cluster, stop = ReadyCluster(cluster_of(tmp_path).spec), stop_event()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run_cluster(cluster, None, stop) == 0
    assert "WARNING" not in capsys.readouterr().err
    assert all(process_start_ticks(pid) is None for pid in pids(cluster))


def test_a_plain_server_that_dies_is_reported(tmp_path: Path, program: list[str]) -> None:
    """The same for a server of its own."""
    program[-1] = DIES
    with (
        pytest.raises(LaunchError, match=r"(?s)plain ended.*no such model"),
        PlainServer("M", log_dir=tmp_path),
    ):
        pass
