"""A whole cluster on this host: a router, prefill engines, decode engines."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_dualpath.bench.place import LOOPBACK, Place
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard, stop_all
from vllm_dualpath.bench.servers import (
    START_TIMEOUT_S,
    VllmServer,
    get_json,
    healthy,
    pause,
    require_alive,
)
from vllm_dualpath.bench.vllm_command import free_ports
from vllm_dualpath.config import Mode
from vllm_dualpath.errors import ConfigError, LaunchError
from vllm_dualpath.storage.posix import root_of

ROUTER = "router"


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What to start. ``extra_config`` goes into every engine's ``kv_connector_extra_config``."""

    model: Path | str
    store: str
    num_prefill: int = 1
    num_decode: int = 1
    mode: Mode = "dual"
    port: int | None = None
    """The router's; a free one if not given."""
    engine_args: tuple[str, ...] = ()
    router_args: tuple[str, ...] = ()
    extra_config: Mapping[str, object] = field(default_factory=dict)
    log_dir: Path | None = None
    start_timeout_s: float = START_TIMEOUT_S
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where the router (``ROUTER``) and the engines run, by name; this host where not given."""

    def __post_init__(self) -> None:
        if self.num_prefill < 1 or self.num_decode < 1:
            raise ConfigError(
                "a cluster needs a prefill and a decode engine;"
                f" found {self.num_prefill} and {self.num_decode}"
            )

    def roles(self) -> list[tuple[str, str]]:
        """Name and role of each engine."""
        prefill = [(f"prefill-{idx}", "prefill") for idx in range(self.num_prefill)]
        return prefill + [(f"decode-{idx}", "decode") for idx in range(self.num_decode)]

    def place(self, name: str) -> Place:
        """Where an engine or the router runs."""
        return self.places.get(name, LOOPBACK)


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine of the cluster."""

    name: str
    role: str
    server: VllmServer

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def process(self) -> ManagedProcess:
        return self.server.process


class LocalCluster:
    """Starts on entry, is ready inside, stops after. One thread; children die with this process.

    Raises ``ConfigError`` for a configuration that cannot work, before anything is started, and
    ``LaunchError`` with the end of a log when something does not start.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        root_of(spec.store)
        self.spec = spec
        self.log_dir = spec.log_dir or Path(tempfile.mkdtemp(prefix="vllm-dualpath-"))
        self.log_dir.mkdir(parents=True, exist_ok=True)
        roles = spec.roles()
        http, control, *ports = free_ports(2 + len(roles))
        self._http_port = spec.port or http
        self._router_host = spec.place(ROUTER).host
        self._control = f"tcp://{self._router_host}:{control}"
        self.url = f"http://{self._router_host}:{self._http_port}"
        self._guard = ProcessGuard()
        self.router = self._make_router(spec.mode, spec.router_args)
        self.engines = [
            Engine(name, role, self._server(idx, name, role, ports[idx]))
            for idx, (name, role) in enumerate(roles)
        ]

    def _make_router(self, mode: Mode, arguments: Sequence[str]) -> ManagedProcess:
        command = [*self.spec.place(ROUTER).prefix, sys.executable, "-m", "vllm_dualpath.cli"]
        command += ["router", "--listen", f"{self._router_host}:{self._http_port}"]
        command += ["--control", self._control, "--mode", mode, *arguments]
        return ManagedProcess(ROUTER, command, self.log_dir / "router.log", self._guard)

    def restart_router(self, mode: Mode, arguments: Sequence[str] = ()) -> None:
        """Put a router with another mode in the place of this one; engines stay as they are.

        Waits until it lists all of them: a new router knows of the store what is in it now.
        """
        self.router.stop()
        self.router = self._make_router(mode, (*self.spec.router_args, *arguments))
        self.router.start()
        self.wait_ready()

    def _server(self, idx: int, name: str, role: str, port: int) -> VllmServer:
        place = self.spec.place(name)
        extra_config = {
            "role": role,
            "store": self.spec.store,
            "router": self._control,
            "name": name,
            "url": f"http://{place.host}:{port}",
            **self.spec.extra_config,
            **place.extra_config,
        }
        return VllmServer(
            name,
            str(self.spec.model),
            self.log_dir,
            self._guard,
            port=port,
            extra_config=extra_config,
            engine_args=self.spec.engine_args,
            engine_idx=idx,
            num_engines=self.spec.num_prefill + self.spec.num_decode,
            place=place,
        )

    @property
    def processes(self) -> list[ManagedProcess]:
        """The router's and every engine's, as started here."""
        return [self.router, *(engine.process for engine in self.engines)]

    def launch(self) -> None:
        """Start everything at once, without waiting."""
        for process in self.processes:
            process.start()

    def wait_ready(self, cancel: threading.Event | None = None) -> None:
        """Wait until every engine answers and the router lists it; otherwise stop everything."""
        try:
            deadline_s = time.monotonic() + self.spec.start_timeout_s
            while not self._ready():
                pause(cancel)
                if time.monotonic() > deadline_s:
                    raise LaunchError(self._not_ready())
        except BaseException:
            self.stop()
            raise

    def _ready(self) -> bool:
        for process in self.processes:
            require_alive(process)
        return healthy(self.url) and not self._missing() and not self._silent()

    def _silent(self) -> list[str]:
        return [engine.name for engine in self.engines if not healthy(engine.url)]

    def _missing(self) -> list[str]:
        listed = self._listed()
        served = {name for name, engine in listed.items() if engine.get("serving")}
        return [engine.name for engine in self.engines if engine.name not in served]

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The router's engines by id; empty while it does not answer."""
        with contextlib.suppress(OSError, ValueError):
            return {str(engine["engine_id"]): engine for engine in self.status()["engines"]}
        return {}

    def _not_ready(self) -> str:
        missing, silent = self._missing(), self._silent()
        slow = [engine.process for engine in self.engines if engine.name in {*missing, *silent}]
        process = slow[0] if slow else self.router
        return (
            f"the cluster at {self.url} is not ready after {self.spec.start_timeout_s:.0f} s: the"
            f" router does not list {', '.join(missing) or 'none'}, no answer from"
            f" {', '.join(silent) or 'none'}; the end of {process.log_path}:\n{process.log_tail()}"
        )

    def status(self) -> dict[str, Any]:
        """The router's own status. Raises ``OSError`` or ``ValueError``."""
        return get_json(f"{self.url}/dualpath/status")

    def describe(self) -> dict[str, object]:
        """Addresses and process ids, for other programs."""
        listed = self._listed()
        return {
            "router": {"url": self.url, "control": self._control, "pid": self.router.pid},
            "engines": [
                {
                    "name": engine.name,
                    "role": engine.role,
                    "url": engine.url,
                    "pid": engine.process.pid,
                    "mover_pid": listed.get(engine.name, {}).get("pid"),
                }
                for engine in self.engines
            ],
            "log_dir": str(self.log_dir),
        }

    def write_description(self, path: Path) -> None:
        """Write ``describe`` as JSON; a reader never sees half a file."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.describe(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    def dead(self) -> list[ManagedProcess]:
        """Processes that have ended although nobody asked them to."""
        return [process for process in self.processes if not process.alive]

    def stop(self) -> None:
        """Engines first, so that their movers can say goodbye to the router. May be repeated."""
        stop_all(engine.process for engine in self.engines)
        stop_all([self.router])
        self._guard.close()

    def __enter__(self) -> LocalCluster:
        try:
            self.launch()
        except BaseException:
            self.stop()
            raise
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
