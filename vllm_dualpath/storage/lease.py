"""The eviction lease: a file in the store that says who evicts, and until when.

It keeps two evictors from deleting twice what one would delete; it protects no data. Expiry is
wall-clock time, so hosts whose clocks differ may overlap: that evicts too much, never wrongly,
because a block gone is a short hit.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_LOCK_TRIES = 50
_LOCK_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class _Lease:
    owner: str
    expires_s: float


class EvictionLease:
    """The lease in ``directory``. Raises ``OSError``; safe from any thread and process."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "eviction.lease"
        self._lock_path = directory / "eviction.lock"

    def acquire(self, owner: str, duration_s: float) -> bool:
        """Take or extend the lease; False while another's has not run out, or it is being taken."""
        with self._locked() as locked:
            if not locked:
                return False
            current, now_s = self._read(), time.time()
            if current is not None and current.owner != owner and current.expires_s > now_s:
                return False
            self._write(_Lease(owner, now_s + duration_s))
            return True

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock file; yields False when a stopped process keeps it, rather than wait."""
        # The lock has its own file: the lease file is replaced, and a lock follows the inode.
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield _try_lock(fd)
        finally:
            os.close(fd)

    def _read(self) -> _Lease | None:
        try:
            values = json.loads(self._path.read_text())
            return _Lease(str(values["owner"]), float(values["expires_s"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as exc:
            logger.warning("%s is not a lease (%s): taken as run out", self._path, exc)
            return None

    def _write(self, lease: _Lease) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
        try:
            temporary.write_text(json.dumps(asdict(lease)))
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)


def _try_lock(fd: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False
