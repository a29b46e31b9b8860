"""vLLM servers on this host: plain, with our connector, alone or as part of a cluster."""

from __future__ import annotations

import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_dualpath.bench.place import LOOPBACK, Place
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard, stop_all
from vllm_dualpath.bench.vllm_command import (
    device_for,
    free_ports,
    kv_transfer_config,
    server_command,
    server_env,
)
from vllm_dualpath.errors import LaunchError

START_TIMEOUT_S = 300.0

_POLL_S = 0.2
_HTTP_TIMEOUT_S = 5.0


def healthy(url: str) -> bool:
    """Whether ``GET /health`` answers 200 now."""
    return answers(f"{url}/health")


def answers(url: str) -> bool:
    """Whether ``GET url`` answers 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def get_json(url: str) -> dict[str, Any]:
    """The JSON object at ``url``. Raises ``OSError`` or ``ValueError``."""
    with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as response:
        content = json.load(response)
    if not isinstance(content, dict):
        raise ValueError(f"{url}: expected a JSON object, found {type(content).__name__}")
    return content


class VllmServer:
    """One vLLM server: how to start it, and its process."""

    def __init__(
        self,
        name: str,
        model: str,
        log_dir: Path,
        guard: ProcessGuard,
        *,
        port: int,
        extra_config: Mapping[str, object] | None = None,
        engine_args: Sequence[str] = (),
        engine_idx: int = 0,
        num_engines: int = 1,
        place: Place = LOOPBACK,
    ) -> None:
        """With ``extra_config`` it gets our connector. Raises ``ConfigError`` if that is wrong."""
        self.name = name
        self.url = f"http://{place.host}:{port}"
        transfer = None if extra_config is None else kv_transfer_config(extra_config)
        device, device_args = device_for(engine_idx, num_engines)
        command = server_command(
            model,
            port,
            transfer,
            [*device_args, *engine_args],
            on_gpu=device is not None,
            host=place.host,
        )
        command = [*place.prefix, *command]
        log_path = log_dir / f"{name}.log"
        env = {**server_env(model, device), **place.env}
        self.process = ManagedProcess(name, command, log_path, guard, env)

    @property
    def ready(self) -> bool:
        """Whether it answers. Raises ``LaunchError`` with its log's end if it has died."""
        require_alive(self.process)
        return healthy(self.url)


def require_alive(process: ManagedProcess) -> None:
    """Raise ``LaunchError`` with the end of the log if the process has ended."""
    if process.alive:
        return
    raise LaunchError(
        f"{process.name} ended with exit code {process.exit_code}; the end of {process.log_path}:\n"
        f"{process.log_tail()}"
    )


def wait_ready(
    servers: Iterable[VllmServer], timeout_s: float, cancel: threading.Event | None = None
) -> None:
    """Wait until all servers answer.

    Raises ``LaunchError`` on a death, after ``timeout_s``, or when ``cancel`` is set.
    """
    waiting = list(servers)
    deadline_s = time.monotonic() + timeout_s
    while waiting := [server for server in waiting if not server.ready]:
        pause(cancel)
        if time.monotonic() > deadline_s:
            slow = waiting[0].process
            names = ", ".join(server.name for server in waiting)
            raise LaunchError(
                f"{names}: not ready after {timeout_s:.0f} s;"
                f" the end of {slow.log_path}:\n{slow.log_tail()}"
            )


def pause(cancel: threading.Event | None) -> None:
    """Sleep between two looks. Raises ``LaunchError`` when ``cancel`` is set."""
    if cancel is None:
        time.sleep(_POLL_S)
    elif cancel.wait(_POLL_S):
        raise LaunchError("starting was cancelled")


class _LoneServer:
    """A server of its own, as a context manager: started on entry, ready inside, stopped after."""

    _NAME = "server"

    def __init__(
        self,
        model: Path | str,
        *,
        engine_args: Sequence[str] = (),
        extra_config: Mapping[str, object] | None = None,
        port: int | None = None,
        log_dir: Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        place: Place = LOOPBACK,
    ) -> None:
        directory = log_dir or Path(tempfile.mkdtemp(prefix="vllm-dualpath-"))
        directory.mkdir(parents=True, exist_ok=True)
        self._guard = ProcessGuard()
        self._start_timeout_s = start_timeout_s
        self.server = VllmServer(
            self._NAME,
            str(model),
            directory,
            self._guard,
            port=port or free_ports(1)[0],
            extra_config=extra_config,
            engine_args=engine_args,
            place=place,
        )

    @property
    def url(self) -> str:
        """Where it serves."""
        return self.server.url

    def launch(self) -> None:
        """Start without waiting, so that several servers can start together."""
        self.server.process.start()

    def wait_ready(self) -> None:
        """Wait until it answers; stops it and raises ``LaunchError`` if it does not."""
        try:
            wait_ready([self.server], self._start_timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it; may be called again."""
        stop_all([self.server.process])
        self._guard.close()

    def __enter__(self) -> Any:
        self.launch()
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class PlainServer(_LoneServer):
    """vLLM without our connector: what every answer is compared with."""

    _NAME = "plain"

    def __init__(self, model: Path | str, **options: Any) -> None:
        super().__init__(model, extra_config=None, **options)


class SingleEngine(_LoneServer):
    """vLLM with our connector and no router: a persistent KV cache for one server."""

    _NAME = "single"

    def __init__(
        self,
        model: Path | str,
        store: str,
        extra_config: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        config = {"role": "both", "store": store, "name": self._NAME, **(extra_config or {})}
        super().__init__(model, extra_config=config, **options)
