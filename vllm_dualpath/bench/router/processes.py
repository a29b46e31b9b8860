"""The processes of the benchmark: the engines, our router and vllm-router, each on its core."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard
from vllm_dualpath.bench.servers import get_json, healthy
from vllm_dualpath.bench.vllm_command import HOST, free_ports
from vllm_dualpath.errors import LaunchError

INSTALL = "pip install --target DIR vllm-router==0.1.17, then --vllm-router-path DIR"
_START_S = 30.0
_POLL_S = 0.05
_PACKAGE = "vllm_router"


@dataclass(frozen=True, slots=True)
class Ports:
    """Everybody's."""

    prefill: int
    decode: int
    ours: int
    control: int
    theirs: int
    metrics: int

    @classmethod
    def free(cls) -> Ports:
        return cls(*free_ports(6))


class Processes:
    """All of them, running; a context manager. Raises ``LaunchError`` if one does not start."""

    def __init__(
        self,
        logs: Path,
        guard: ProcessGuard,
        our_flags: Sequence[str],
        theirs: Mapping[str, str] | None,
        cores: tuple[int, int] | None,
    ) -> None:
        self.ports = Ports.free()
        self._cores = cores
        self._guard = guard
        ours = _our_command(self.ports, our_flags)
        self.ours = ManagedProcess("router", ours, logs / "ours", guard)
        self.theirs: ManagedProcess | None = None
        if theirs is not None:
            command = _their_command(self.ports)
            self.theirs = ManagedProcess("vllm-router", command, logs / "theirs", guard, theirs)
        self._engines: subprocess.Popen[str] | None = None

    def __enter__(self) -> Processes:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        routers = [self.ours, *([self.theirs] if self.theirs else [])]
        with on_core(self._cores[0] if self._cores else None):
            for router in routers:
                router.start()
        with on_core(self._cores[1] if self._cores else None):
            self._engines = self._start_engines()
        _wait_until(self.ours, partial(_has_both_engines, self.ports.ours))
        if self.theirs is not None:
            _wait_until(self.theirs, partial(healthy, f"http://{HOST}:{self.ports.theirs}"))

    def _start_engines(self) -> subprocess.Popen[str]:
        engines = subprocess.Popen(
            [sys.executable, "-m", "vllm_dualpath.bench.router.engines"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert engines.stdin is not None
        assert engines.stdout is not None
        ports = self.ports
        control = f"tcp://{HOST}:{ports.control}"
        spec = {"prefill": ports.prefill, "decode": ports.decode, "control": control}
        engines.stdin.write(json.dumps(spec) + "\n")
        engines.stdin.flush()
        if engines.stdout.readline().strip() != "ready":
            raise LaunchError("the engines that do nothing did not start; see the lines above")
        return engines

    def _stop(self) -> None:
        for router in (self.ours, self.theirs):
            if router is not None:
                router.stop()
        if self._engines is not None:
            self._engines.communicate()


def find_theirs(path: Path | None) -> dict[str, str] | None:
    """The environment in which vllm-router starts; ``None`` where it is not installed."""
    env = dict(os.environ)
    if path is None:
        return env if importlib.util.find_spec(_PACKAGE) is not None else None
    if not (path / _PACKAGE).is_dir():
        return None
    before = env.get("PYTHONPATH")
    env["PYTHONPATH"] = str(path) if before is None else f"{path}{os.pathsep}{before}"
    return env


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """What is started here stays on this core; this thread leaves it again."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(process: ManagedProcess) -> float:
    """CPU time of all its threads, those that ended included, to the nanosecond."""
    # The kernel's id of a process's CPU clock; see clock_getcpuclockid(3).
    return time.clock_gettime((~process.pid << 3) | 2)


def _our_command(ports: Ports, flags: Sequence[str]) -> Sequence[str]:
    addresses = ["--listen", f"{HOST}:{ports.ours}", "--control", f"tcp://{HOST}:{ports.control}"]
    return [sys.executable, "-m", "vllm_dualpath.cli.main", "router", *addresses, *flags]


def _their_command(ports: Ports) -> Sequence[str]:
    flags = {
        "--prefill": f"http://{HOST}:{ports.prefill}",
        "--decode": f"http://{HOST}:{ports.decode}",
        "--host": HOST,
        "--port": str(ports.theirs),
        "--prometheus-port": str(ports.metrics),
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation"]
    return [*command, *(word for flag in flags.items() for word in flag)]


def _has_both_engines(port: int) -> bool:
    """Our router is well with a decode engine alone, and serves requests without a transfer."""
    try:
        return bool(get_json(f"http://{HOST}:{port}/health")["prefill"])
    except OSError:
        return False


def _wait_until(process: ManagedProcess, is_ready: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + _START_S
    while not is_ready():
        if not process.alive or time.monotonic() > ends_s:
            raise LaunchError(f"{process.name} did not start; its log ends:\n{process.log_tail()}")
        time.sleep(_POLL_S)
