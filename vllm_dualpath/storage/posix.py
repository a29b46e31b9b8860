"""Full Blocks as files: a local directory or a shared POSIX file system.

    <root>/<fingerprint>/MANIFEST.json
    <root>/<fingerprint>/<xx>/<yy>/<hash>       one block, named by its chain hash
    <root>/<fingerprint>/tmp/                   blocks being written
    <root>/<fingerprint>/quarantine/            the last few bad blocks, for somebody to look at
    <root>/<fingerprint>/eviction.{lease,lock}

Blocks are moved by the compiled core (``block_io``), the way the file system takes (``probe``).

No data is fsynced: a block is a cache entry that can be recomputed, and one torn by a power cut is
caught by its size or a CRC. A crash of the writer leaves the whole block or a file in ``tmp``.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import StoreIo
from vllm_dualpath.errors import BlockCorrupt, ConfigError, StorageError
from vllm_dualpath.storage import directio
from vllm_dualpath.storage.base import BlockEntry, Finished, ReadBlock, WriteBlock
from vllm_dualpath.storage.block_io import BlockIo, IoChoice, IoOutcome, IoStatus, storage_error
from vllm_dualpath.storage.format import BlockFormat
from vllm_dualpath.storage.lease import EvictionLease
from vllm_dualpath.storage.manifest import ensure_manifest
from vllm_dualpath.storage.probe import choose_io
from vllm_dualpath.storage.tree import BlockTree

logger = logging.getLogger(__name__)

TOUCH_INTERVAL_S = 60.0

_NO_FILE = (errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO)
"""How reading fails of what is no regular file."""


@dataclass(frozen=True, slots=True)
class IoOptions:
    """How a store moves its blocks; the defaults are those of the configuration."""

    wanted: StoreIo = "auto"
    num_threads: int | None = None
    """A direction; None means the backend's default."""
    depth: int = 64
    """Pieces in flight a direction."""
    direct: bool | None = None
    """None means: if the file system takes it."""


class PosixStore:
    """A ``BlockStore`` in a directory. Safe from any thread; one instance a process is enough.

    The directory that ``uri`` names must exist: a store that is not mounted must not fill the disk
    beneath. ``create`` makes the model's directory in it; without, a missing one is a
    ``ConfigError``.
    """

    def __init__(
        self,
        uri: str,
        fingerprint: bytes,
        geometry: Geometry,
        manifest_extra: Mapping[str, str] | None = None,
        create: bool = True,
        io: IoOptions | None = None,
    ) -> None:
        self._uri = uri
        self._format = BlockFormat(fingerprint, geometry)
        directory = root_of(uri) / fingerprint.hex()
        self._manifest = partial(
            ensure_manifest, directory, fingerprint, geometry, manifest_extra or {}
        )
        try:
            self._tree = BlockTree(directory, create=create)
            self._manifest(create=create)
            if create:
                self._tree.remove_stale_temporaries()
        except OSError as exc:
            raise ConfigError(f"store {uri}: {exc}: the directory must be writable") from exc
        self._lease = EvictionLease(directory)
        self._directory = directory
        self._options = io or IoOptions()
        self._choice = choose_io(
            self._tree.temporary_dir, self._options.wanted, self._options.direct
        )
        logger.info("store %s: %s", uri, self._choice)
        self._io_lock = threading.Lock()
        self._started_io: BlockIo | None = None
        self._open: dict[int, ReadBlock | WriteBlock] = {}
        """Owned by the thread that submits and asks for what has finished."""
        self._headers = directio.AlignedBuffers()

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def io(self) -> IoChoice:
        """How blocks are moved."""
        return self._choice

    def get(self, block_hash: bytes, payload: memoryview, *, verify: bool = True) -> int:
        request = ReadBlock(block_hash, payload, verify)
        path = self._tree.file_name(block_hash)
        return _settled(self._read_ended(request, self._io.read(path, payload, verify=verify)))

    def put(self, block_hash: bytes, parent: bytes, payload: memoryview) -> int:
        header = self._format.header_template(block_hash, parent)
        path, temporary = self._tree.file_name(block_hash), self._tree.temporary_name()
        outcome = self._io.write(path, temporary, payload, header)
        return _settled(self._write_ended(block_hash, outcome))

    def fileno(self) -> int:
        return self._io.fileno()

    def submit(self, request: ReadBlock | WriteBlock) -> int:
        path, payload = self._tree.file_name(request.hash), request.payload
        if isinstance(request, WriteBlock):
            header = self._format.header_template(request.hash, request.parent)
            ticket = self._io.submit_write(path, self._tree.temporary_name(), payload, header)
        else:
            ticket = self._io.submit_read(path, payload, verify=request.verify)
        self._open[ticket] = request
        return ticket

    def cancel(self, ticket: int) -> bool:
        return self._io.cancel(ticket)

    def started_s(self, ticket: int) -> float | None:
        return self._io.started_s(ticket)

    def finished(self) -> list[Finished]:
        return [self._ended(outcome) for outcome in self._io.poll()]

    def contains(self, block_hash: bytes) -> bool:
        try:
            return self._tree.path(block_hash).exists()
        except OSError as exc:
            raise _os_failure("look up", block_hash, exc) from exc

    def remove(self, block_hash: bytes) -> int:
        path = self._tree.path(block_hash)
        try:
            num_bytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise _os_failure("remove", block_hash, exc) from exc
        return num_bytes

    def entries(self) -> Iterator[BlockEntry]:
        num_bad = 0
        for path in self._tree.block_paths():
            try:
                yield self._entry(path)
            except FileNotFoundError:
                continue  # evicted since the directory was listed
            except (BlockCorrupt, OSError) as exc:
                num_bad += 1
                logger.debug("%s left out: %s", path, exc)
        if num_bad:
            logger.warning("store %s: %d unreadable blocks left out", self._uri, num_bad)

    def acquire_eviction_lease(self, owner: str, duration_s: float) -> bool:
        try:
            return self._lease.acquire(owner, duration_s)
        except OSError as exc:
            raise StorageError(
                f"store {self._uri}: eviction lease: {exc}: the file system must support flock"
            ) from exc

    def close(self) -> None:
        self._headers.close()
        with self._io_lock:
            if self._started_io is not None:
                self._started_io.close()

    @property
    def _io(self) -> BlockIo:
        """Its threads start with the first block that is moved: listing a store needs none."""
        with self._io_lock:
            if self._started_io is None:
                self._started_io = self._start_io()
            return self._started_io

    def _start_io(self) -> BlockIo:
        options = self._options
        try:
            return BlockIo(
                self._directory,
                self._format.layout,
                self._choice,
                options.num_threads,
                options.depth,
            )
        except OSError as exc:
            raise StorageError(f"store {self._uri}: I/O cannot be set up: {exc}") from exc

    def _ended(self, outcome: IoOutcome) -> Finished:
        request = self._open.pop(outcome.ticket)
        if isinstance(request, WriteBlock):
            return self._write_ended(request.hash, outcome)
        return self._read_ended(request, outcome)

    def _read_ended(self, request: ReadBlock, outcome: IoOutcome) -> Finished:
        """Check a block that was read, and say what is left to be done about it."""
        if outcome.status is IoStatus.CANCELLED:
            return Finished(outcome.ticket, cancelled=True)
        try:
            outcome.raise_failure("get", request.hash)
            self._check(request, outcome)
        except BlockCorrupt as exc:
            logger.warning("%s: quarantined", exc)
            follow_up = partial(self._tree.quarantine, self._tree.path(request.hash))
            return Finished(outcome.ticket, error=exc, follow_up=follow_up)
        except StorageError as exc:
            if outcome.error not in _NO_FILE:
                return Finished(outcome.ticket, error=exc)
            follow_up = partial(self._tree.quarantine_unless_file, self._tree.path(request.hash))
            return Finished(outcome.ticket, error=exc, follow_up=follow_up)
        if time.time() - outcome.modified_s < TOUCH_INTERVAL_S:
            return Finished(outcome.ticket, outcome.num_bytes)
        touch = partial(self._touch, self._tree.path(request.hash))
        return Finished(outcome.ticket, outcome.num_bytes, follow_up=touch)

    def _write_ended(self, block_hash: bytes, outcome: IoOutcome) -> Finished:
        if outcome.status is IoStatus.CANCELLED:
            return Finished(outcome.ticket, cancelled=True)
        try:
            outcome.raise_failure("put", block_hash)
        except StorageError as exc:
            gone = outcome.error == errno.ENOENT
            return Finished(outcome.ticket, error=exc, follow_up=self._make_again if gone else None)
        return Finished(outcome.ticket, outcome.num_bytes)

    def _make_again(self) -> None:
        """The directories were removed under a running store: the next block is to find them."""
        try:
            if self._tree.make_again():
                self._manifest(create=True)
            else:
                logger.warning("store %s is not there any more: nothing is stored", self._uri)
        except (OSError, ConfigError) as exc:
            logger.warning("store %s: cannot be made again: %s", self._uri, exc)

    def _check(self, request: ReadBlock, outcome: IoOutcome) -> None:
        if outcome.status is IoStatus.WRONG_SIZE:
            self._format.check_size(request.hash, outcome.found_bytes)
            raise BlockCorrupt(f"block {request.hash.hex()}: expected a regular file")
        header = self._format.read_header(outcome.header, request.hash)
        if request.verify:
            self._format.check_layers(header, outcome.crcs)

    def _touch(self, path: Path) -> None:
        """Note the use in mtime, as many mounts keep no atime; rarely, as it writes metadata."""
        try:
            os.utime(path)
        except OSError as exc:
            logger.debug("store %s: last use not noted: %s", self._uri, exc)

    def _entry(self, path: Path) -> BlockEntry:
        block_hash = bytes.fromhex(path.name)
        fd = directio.open_read(path, direct=self._choice.direct)
        try:
            stat = os.fstat(fd)
            self._format.check_size(block_hash, stat.st_size)
            with self._headers.borrow() as buffer:
                directio.read_all(fd, [buffer])
                header = self._format.read_header(buffer, block_hash)
        finally:
            os.close(fd)
        return BlockEntry(block_hash, header.parent, stat.st_size, stat.st_mtime)


def root_of(uri: str) -> Path:
    """The directory of a ``file:///absolute/path`` URI. Raises ``ConfigError`` unless it exists."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(f"store: expected file:///absolute/path, found {uri!r}")
    root = Path(unquote(parts.path))
    if not root.is_dir():
        raise ConfigError(
            f"store {uri}: {root} is not a directory: mount it, or create it with `mkdir -p {root}`"
        )
    return root


def _settled(finished: Finished) -> int:
    """Of a caller that waits: everything at once."""
    if finished.follow_up is not None:
        finished.follow_up()
    if finished.error is not None:
        raise finished.error
    if finished.cancelled:
        raise StorageError("the store was closed meanwhile")
    return finished.num_bytes


def _os_failure(action: str, block_hash: bytes, exc: OSError) -> StorageError:
    message = f"{action} block {block_hash.hex()}: {exc}"
    return storage_error(exc.errno or 0, message, reading=False)
