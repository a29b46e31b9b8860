"""Child processes that are stopped in order, leave a log, and never outlive their launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from vllm_dualpath.bench.guard import signal_group, wait_groups_gone
from vllm_dualpath.errors import LaunchError

STOP_GRACE_S = 15.0
"""vLLM gets this long to end after SIGTERM."""

_GROUP_GRACE_S = 5.0
"""What a server left running (a mover, an engine core) gets this long to notice that it is gone."""

_TAIL_LINES = 30
_MAX_TAIL_BYTES = 1 << 16


class ProcessGuard:
    """Owns the guard process; see ``guard``. One for each launcher, not thread-safe."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def watch(self, pgid: int) -> None:
        """End this process group if the launcher dies."""
        self._say(f"+{pgid}\n")

    def forget(self, pgid: int) -> None:
        """The group is gone; its number may soon be another's."""
        self._say(f"-{pgid}\n")

    def close(self) -> None:
        """End the guard, and with it whatever it still watches."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._pipe(self._process).close()
            self._process.wait()
            self._process = None

    def _say(self, line: str) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_dualpath.bench.guard"],
                stdin=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
        try:
            self._pipe(self._process).write(line)
            self._pipe(self._process).flush()
        except BrokenPipeError as exc:
            raise LaunchError("the process that guards this launcher's children is gone") from exc

    @staticmethod
    def _pipe(process: subprocess.Popen[str]) -> IO[str]:
        assert process.stdin is not None
        return process.stdin


class ManagedProcess:
    """One child in a process group of its own; its output is appended to ``log_path``.

    May be started again after it ended. Not thread-safe.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        guard: ProcessGuard,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.log_path = log_path
        self._guard = guard
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def start(self) -> None:
        """Start it. Raises ``LaunchError`` if the program cannot be started."""
        assert not self.alive, f"{self.name} runs already"
        try:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                )
        except OSError as exc:
            raise LaunchError(f"{self.name} cannot be started: {exc}") from exc
        self._stopped = False
        self._guard.watch(self._process.pid)

    @property
    def pid(self) -> int:
        """Of the process started last, alive or not."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs; negative: the signal that ended it."""
        return None if self._process is None else self._process.poll()

    def log_tail(self, num_lines: int = _TAIL_LINES) -> str:
        """The last lines of the log."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def terminate(self) -> None:
        """Ask it to end; does not wait."""
        if self._process is not None and self.alive:
            self._process.terminate()

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Ask it to end, wait, and kill what is left of its process group."""
        if self._process is None or self._stopped:
            return
        self.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            signal_group(self.pid, signal.SIGKILL)
            self._process.wait()
        if wait_groups_gone([self.pid], _GROUP_GRACE_S):
            signal_group(self.pid, signal.SIGKILL)
        self._guard.forget(self.pid)
        self._stopped = True


def stop_all(processes: Iterable[ManagedProcess], grace_s: float = STOP_GRACE_S) -> None:
    """Stop all at once: together they get ``grace_s``."""
    listed = list(processes)
    for process in listed:
        process.terminate()
    deadline_s = time.monotonic() + grace_s
    for process in listed:
        process.stop(max(0.0, deadline_s - time.monotonic()))
