"""Starts the mover process beside the worker, and starts it again when it dies.

The process is a child of ours in a session of its own. It inherits no pipes, so it can keep
nobody's output open, and it ends by itself when our connection closes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from vllm.logger import init_logger

from vllm_dualpath.errors import ConfigError, PeerLost
from vllm_dualpath.messages import MoverSpec

logger = init_logger("vllm.dualpath.supervisor")

MOVER_COMMAND = (sys.executable, "-m", "vllm_dualpath.mover")

_CONFIG_ERROR_EXIT = 2
_END_S = 5.0
_LOG_TAIL_BYTES = 2000


class MoverProcess:
    """At most one running mover for one engine. Owned by the worker's attach thread."""

    def __init__(self, spec: MoverSpec, command: Sequence[str] = MOVER_COMMAND) -> None:
        socket_path = Path(spec.socket_path)
        self._spec = spec
        self._command = command
        self._spec_path = socket_path.with_suffix(f".{os.getpid()}.spec")
        self._lock_path = socket_path.with_suffix(".lock")
        self._log_path = socket_path.with_suffix(".log")
        self._lock_fd = -1
        self._process: subprocess.Popen[bytes] | None = None

    def ensure_running(self) -> None:
        """Start a mover unless one runs.

        Raises ``PeerLost``, once, when the last one ended, so that the caller backs off before the
        next; ``ConfigError`` if it refused its spec.
        """
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            self._raise_config_error(status)
            raise PeerLost(f"mover ended with status {status}; see {self._log_path}")
        if self._lock():
            self._start()

    def stop(self, *, was_attached: bool) -> None:
        """Wait for the mover to end by itself, as it does when a connection closed; then insist."""
        process, self._process = self._process, None
        if process is not None:
            if not was_attached:
                process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                logger.warning("mover %d did not end in %.0f s: killing it", process.pid, _END_S)
                process.kill()
                process.wait()
        self._spec_path.unlink(missing_ok=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _lock(self) -> bool:
        """Whether the mover of this engine is ours to start; somebody else's is attached to."""
        if self._lock_fd >= 0:
            return True
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def _start(self) -> None:
        self._spec_path.unlink(missing_ok=True)
        fd = os.open(self._spec_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.msgpack.encode(self._spec))
        # Why the last one ended stands in its log.
        with contextlib.suppress(FileNotFoundError):
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        command = [*self._command, "--spec", str(self._spec_path)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        log_fd = os.open(self._log_path, flags, 0o600)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                close_fds=True,
                start_new_session=True,
            )
        except OSError as exc:
            raise PeerLost(f"mover: starting {command[0]} failed: {exc}") from exc
        finally:
            os.close(log_fd)
        logger.info("started mover %d, log in %s", self._process.pid, self._log_path)

    def _raise_config_error(self, status: int) -> None:
        if status == _CONFIG_ERROR_EXIT:
            tail = self._log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
            raise ConfigError(f"mover: {tail.strip()}")
