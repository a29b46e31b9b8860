"""Full Blocks as files: a local directory or a shared POSIX file system.

    <root>/<fingerprint>/MANIFEST.json
    <root>/<fingerprint>/<xx>/<yy>/<hash>       one block, named by its chain hash
    <root>/<fingerprint>/tmp/                   blocks being written
    <root>/<fingerprint>/quarantine/            the last few bad blocks, for somebody to look at
    <root>/<fingerprint>/eviction.{lease,lock}

No data is fsynced: a block is a cache entry that can be recomputed, and one torn by a power cut is
caught by its size or a CRC. A crash of the writer leaves the whole block or a file in ``tmp``.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vllm_dualpath import native
from vllm_dualpath.blocks import ALIGNMENT_BYTES, Geometry
from vllm_dualpath.errors import BlockCorrupt, BlockNotFound, ConfigError, StorageError, StoreFull
from vllm_dualpath.storage import directio
from vllm_dualpath.storage.base import BlockEntry
from vllm_dualpath.storage.format import BlockFormat
from vllm_dualpath.storage.lease import EvictionLease
from vllm_dualpath.storage.manifest import ensure_manifest
from vllm_dualpath.storage.tree import BlockTree

logger = logging.getLogger(__name__)

TOUCH_INTERVAL_S = 60.0


class PosixStore:
    """A ``BlockStore`` in a directory. Safe from any thread; one instance a process is enough.

    The directory that ``uri`` names must exist: a store that is not mounted must not fill the disk
    beneath. ``create`` makes the model's directory in it; without, a missing one is a
    ``ConfigError``. ``direct_io`` None means: probed once.
    """

    def __init__(
        self,
        uri: str,
        fingerprint: bytes,
        geometry: Geometry,
        manifest_extra: Mapping[str, str] | None = None,
        create: bool = True,
        direct_io: bool | None = None,
    ) -> None:
        self._uri = uri
        self._format = BlockFormat(fingerprint, geometry)
        directory = root_of(uri) / fingerprint.hex()
        try:
            self._tree = BlockTree(directory, create=create)
            ensure_manifest(directory, fingerprint, geometry, manifest_extra or {}, create=create)
            if create:
                self._tree.remove_stale_temporaries()
        except OSError as exc:
            raise ConfigError(f"store {uri}: {exc}: the directory must be writable") from exc
        self._lease = EvictionLease(directory)
        self._headers = directio.AlignedBuffers()
        self._direct_io = self._probe() if direct_io is None else direct_io

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def direct_io(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._direct_io

    def get(self, block_hash: bytes, payload: memoryview, *, verify: bool = True) -> int:
        self._require_slot(payload)
        path = self._tree.path(block_hash)
        try:
            with self._headers.borrow() as header:
                self._load(path, [header, payload])
                parsed = self._format.read_header(header, block_hash)
            if verify:
                self._format.check_payload(parsed, payload)
        except BlockCorrupt as exc:
            logger.warning("%s: quarantined", exc)
            self._tree.quarantine(path)
            raise
        except OSError as exc:
            raise _translated(exc, "get", block_hash) from exc
        return self._format.file_bytes

    def put(self, block_hash: bytes, parent: bytes, payload: memoryview) -> int:
        self._require_slot(payload)
        path = self._tree.path(block_hash)
        temporary = self._tree.temporary_path()
        try:
            if path.exists():
                return 0
            with self._headers.borrow() as header:
                self._format.write_header(header, block_hash, parent, payload)
                self._write(temporary, [header, payload])
            # Renamed, not linked: whichever of two writers comes last, the block stays whole, and
            # file systems without hard links serve as well.
            self._tree.publish(temporary, path)
        except OSError as exc:
            raise _translated(exc, "put", block_hash) from exc
        finally:
            temporary.unlink(missing_ok=True)
        return self._format.file_bytes

    def contains(self, block_hash: bytes) -> bool:
        try:
            return self._tree.path(block_hash).exists()
        except OSError as exc:
            raise _translated(exc, "look up", block_hash) from exc

    def remove(self, block_hash: bytes) -> int:
        path = self._tree.path(block_hash)
        try:
            num_bytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise _translated(exc, "remove", block_hash) from exc
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

    def _probe(self) -> bool:
        supported, reason = directio.supports_direct_io(self._tree.temporary_dir)
        if not supported:
            logger.info("store %s: buffered I/O, direct I/O failed: %s", self._uri, reason)
        return supported

    def _require_slot(self, payload: memoryview) -> None:
        expected = self._format.geometry.slot_bytes
        if payload.nbytes != expected:
            raise ValueError(f"payload: expected {expected} bytes, found {payload.nbytes}")
        if native.buffer_address(payload) % ALIGNMENT_BYTES:
            raise ValueError(f"payload: expected memory aligned to {ALIGNMENT_BYTES} bytes")

    def _load(self, path: Path, buffers: list[memoryview]) -> None:
        """Read one block file into ``buffers`` and note its use."""
        fd = directio.open_read(path, direct=self._direct_io)
        try:
            stat = os.fstat(fd)
            self._require_size(path, stat.st_size)
            num_bytes = directio.read_all(fd, buffers)
            if num_bytes != stat.st_size:
                raise OSError(errno.EIO, f"read {num_bytes} of {stat.st_size} bytes")
            self._touch(fd, stat.st_mtime)
        finally:
            os.close(fd)

    def _write(self, temporary: Path, buffers: list[memoryview]) -> None:
        fd = directio.open_new(temporary, direct=self._direct_io)
        try:
            directio.write_all(fd, buffers)
        finally:
            os.close(fd)  # network file systems report a full disk here

    def _require_size(self, path: Path, found_bytes: int) -> None:
        if found_bytes != self._format.file_bytes:
            raise BlockCorrupt(
                f"block {path.name}: file size: expected {self._format.file_bytes} bytes,"
                f" found {found_bytes}"
            )

    def _touch(self, fd: int, last_used_s: float) -> None:
        """Note the use in mtime, as many mounts keep no atime; rarely, as it writes metadata."""
        if time.time() - last_used_s < TOUCH_INTERVAL_S:
            return
        try:
            os.utime(fd)
        except OSError as exc:
            logger.debug("store %s: last use not noted: %s", self._uri, exc)

    def _entry(self, path: Path) -> BlockEntry:
        block_hash = bytes.fromhex(path.name)
        fd = directio.open_read(path, direct=self._direct_io)
        try:
            stat = os.fstat(fd)
            self._require_size(path, stat.st_size)
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


def _translated(exc: OSError, action: str, block_hash: bytes) -> StorageError:
    message = f"{action} block {block_hash.hex()}: {exc}"
    if action == "get" and exc.errno in (errno.ENOENT, errno.ESTALE):
        return BlockNotFound(message)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{message}: free space, or set store_quota_bytes")
    return StorageError(message)
