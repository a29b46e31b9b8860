"""A benchmark's child process: calls go in, answers come out, and none of it waits for ever.

Messages are msgpack over a socket pair, not over standard output, where libraries write what they
like. A call names a method of the child's role (``child``).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from vllm_dualpath.bench.guard import signal_group
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.errors import LaunchError

CALL_S = 30.0
"""Default deadline of one call."""

_END_S = 2.0
_MAX_LOG_BYTES = 4096


class Child:
    """One child process and its role. Not thread-safe.

    Args:
        role: a name in ``child.ROLES``.
        log_path: takes what the child and its libraries print.
        guard: ends the child if this process dies.
        core: the CPU it is pinned to; None: any.
        environment: changes to this process's environment.

    Raises ``LaunchError`` if it cannot be started.
    """

    def __init__(
        self,
        role: str,
        log_path: Path,
        guard: ProcessGuard,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.role = role
        self._log_path = log_path
        self._guard = guard
        ours, theirs = socket.socketpair()
        with ours, theirs, log_path.open("ab") as log:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "vllm_dualpath.bench.mover.child", role, str(fd)]
            try:
                self._process = subprocess.Popen(
                    [*command, *([] if core is None else [str(core)])],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    pass_fds=(fd,),
                    start_new_session=True,
                )
            except OSError as exc:
                raise LaunchError(f"{role} cannot be started: {exc}") from exc
            self._connection = Connection(ours.detach())
        self._guard.watch(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any, timeout_s: float = CALL_S) -> Any:
        """Call a method of the role. Raises ``LaunchError`` if it fails or does not answer."""
        self.send(method, *arguments)
        return self.receive(timeout_s)

    def send(self, method: str, *arguments: Any) -> None:
        """Begin a call; ``receive`` ends it."""
        try:
            self._connection.send_bytes(msgspec.msgpack.encode((method, arguments)))
        except OSError as exc:
            raise self._failure(f"does not listen ({exc})") from exc

    def receive(self, timeout_s: float = CALL_S) -> Any:
        """The answer to the call begun last."""
        try:
            if not self._connection.poll(timeout_s):
                raise self._failure(f"did not answer in {timeout_s:g} s")
            ok, value = msgspec.msgpack.decode(self._connection.recv_bytes())
        except (EOFError, OSError) as exc:
            raise self._failure("ended") from exc
        if not ok:
            raise self._failure(value)
        return value

    def pause(self) -> None:
        """Stop it where it is: what others measure now is not disturbed by its threads."""
        signal_group(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End ``pause``."""
        signal_group(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, by force if it does not go. Closing twice is fine."""
        if self._connection.closed:
            return
        self.resume()
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            signal_group(self.pid, signal.SIGKILL)
            self._process.wait()
        self._guard.forget(self.pid)

    def _failure(self, what: str) -> LaunchError:
        log = self._log_path.read_bytes()[-_MAX_LOG_BYTES:].decode("utf-8", "replace").strip()
        return LaunchError(f"{self.role}: {what}" + (f"; its log ends:\n{log}" if log else ""))


def close_all(children: list[Child]) -> None:
    """Close every child, each whatever happens to the others."""
    deadline = time.monotonic() + _END_S * len(children) + CALL_S
    failures = []
    for child in children:
        try:
            child.close()
        except Exception as exc:  # the rest must still be ended
            failures.append(f"{child.role}: {exc}")
    if failures or time.monotonic() > deadline:
        raise LaunchError("children did not end in order: " + "; ".join(failures))
