"""A real mover process and the bare minimum of an engine around it: enough to drive and time it."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vllm_dualpath.bench.cpu_time import thread_seconds
from vllm_dualpath.blocks import Geometry
from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.errors import LaunchError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    EngineMessage,
    GeometrySpec,
    Hello,
    LocalMessage,
    Mapped,
    MoverSpec,
    Peer,
)

START_S = 20.0
ANSWER_S = 20.0
_END_S = 5.0
_T = TypeVar("_T")


class MoverProcess:
    """One ``python -m vllm_dualpath.mover``; ``attach`` makes both sides of an engine to it.

    It ends with its engine's connections, so also when this process dies.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        geometry: Geometry,
        max_model_len: int,
        identity: tuple[bytes, bytes],
        config: dict[str, Any],
    ) -> None:
        self.name = name
        self.hello: Hello | None = None
        """What it told the router; set by the one who plays the router."""
        self._messages: queue.SimpleQueue[LocalMessage] = queue.SimpleQueue()
        self._links: list[EngineLink] = []
        socket_path = directory / f"{name}.sock"
        spec = MoverSpec(
            version=PROTOCOL_VERSION,
            engine_id=name,
            socket_path=str(socket_path),
            config=config,
            url=f"http://{name}",
            model="bench",
            fingerprint=identity[0],
            root=identity[1],
            geometry=GeometrySpec.of(geometry),
            max_model_len=max_model_len,
        )
        spec_path = directory / f"{name}.spec"
        spec_path.write_bytes(msgspec.msgpack.encode(spec))
        # In this process's group, which the benchmark's guard ends as a whole.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_dualpath.mover", "--spec", str(spec_path)],
            stdin=subprocess.DEVNULL,
        )
        self._socket_path = socket_path

    @property
    def pid(self) -> int:
        return self._process.pid

    def attach(self) -> None:
        """Wait until it is up, and be its engine. Raises ``DualPathError``."""
        for kind in ("worker", "scheduler"):
            link = EngineLink(self._socket_path, kind, self._messages.put, _ignore)
            attached, fds = link.connect(START_S)
            self._links.append(link)
            for fd in fds:
                os.close(fd)
        self.boot_id = attached.boot_id
        self.send(Mapped())

    def send(self, message: EngineMessage) -> None:
        """As the engine's worker."""
        self._links[0].send(message)

    def expect(self, kind: type[_T]) -> _T:
        """The next message of this kind to the engine; others are dropped."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as exc:
                raise LaunchError(
                    f"{self.name}: expected {kind.__name__} in {ANSWER_S} s, found none"
                ) from exc
            if isinstance(message, kind):
                return message

    def peer(self, slots: tuple[int, ...] = ()) -> Peer:
        """As the router describes it to another mover."""
        assert self.hello is not None, f"{self.name} has not registered"
        names = ("engine_id", "boot_id", "host_id", "pid", "pid_start", "address", "region")
        fields = {name: getattr(self.hello, name) for name in names}
        return Peer(**fields, staging_address=self.hello.staging_address, slots=slots)

    def end_now(self) -> None:
        """End it by force."""
        self._process.kill()
        self._process.wait()
        for link in self._links:
            link.close()

    def close(self) -> None:
        """End it, by force if it does not go."""
        for link in self._links:
            link.close()
        if not self._links:
            self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _ignore(reason: str) -> None:
    """A mover that goes away is found by the wait that it leaves without an answer."""


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, by the scheduler's own clock."""
    return sum(thread_seconds(pid).values())
