"""The directory tree of a POSIX store: where a block lies, and what lies beside the blocks.

Two levels of 256 directories keep each small up to hundreds of millions of blocks. Raises
``OSError`` unless stated; knows names only, nothing of what is in a block.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import stat
import string
import time
from collections.abc import Iterator
from pathlib import Path

from vllm_dualpath.blocks import HASH_BYTES
from vllm_dualpath.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

STALE_AFTER_S = 3600.0
"""A temporary file this old belongs to a writer that crashed: a write takes seconds."""

MAX_QUARANTINED = 16

_HEX = frozenset(string.hexdigits.lower())


class BlockTree:
    """The tree below one model's ``directory``. Safe from any thread and process."""

    def __init__(self, directory: Path, *, create: bool) -> None:
        self._directory = directory
        self.temporary_dir = directory / "tmp"
        self._quarantine_dir = directory / "quarantine"
        self._device = 0
        # Unique among hosts that share the store, without asking any of them.
        self._writer = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._counter = itertools.count()
        if create:
            self._make_directories()
            self._device = directory.stat().st_dev
        elif not directory.is_dir():
            raise ConfigError(f"store: {directory} does not exist: no store of this model is here")

    def make_again(self) -> bool:
        """Make the directories anew if somebody removed them; False if nothing can be made.

        Only where they were: beneath a store that was unmounted there is another device, which must
        not fill up.
        """
        root = self._directory.parent
        if not root.is_dir() or root.stat().st_dev != self._device:
            return False
        self._make_directories()
        return True

    def _make_directories(self) -> None:
        self.temporary_dir.mkdir(parents=True, exist_ok=True)
        self._quarantine_dir.mkdir(exist_ok=True)

    def path(self, block_hash: bytes) -> Path:
        """Where the block lies. Raises ``ValueError`` for a hash of another length."""
        return Path(self.file_name(block_hash))

    def file_name(self, block_hash: bytes) -> str:
        """The same, without the cost of a ``Path``: for every block that is moved."""
        if len(block_hash) != HASH_BYTES:
            raise ValueError(f"block hash: expected {HASH_BYTES} bytes, found {len(block_hash)}")
        name = block_hash.hex()
        return f"{self._directory}/{name[:2]}/{name[2:4]}/{name}"

    def temporary_name(self) -> str:
        """A file name no other writer uses."""
        return f"{self.temporary_dir}/{self._writer}-{next(self._counter)}"

    def quarantine(self, path: Path) -> None:
        """Take a bad block out of the store, keeping the last few. Never raises ``OSError``.

        Another process may have replaced the block by a good one meanwhile: then a good block is
        lost from the cache, which costs a recompute.
        """
        self._take_away(path, self._quarantine_dir / path.name)

    def _take_away(self, path: Path, target: Path) -> None:
        try:
            if path.is_symlink() or path.exists():
                self._quarantine_dir.mkdir(exist_ok=True)
            path.replace(target)
            self._bound_quarantine()
        except FileNotFoundError:
            return  # another reader was faster, or the whole store is gone
        except OSError as exc:
            logger.warning("bad block %s stays in the store and will fail again: %s", path, exc)

    def quarantine_unless_file(self, path: Path) -> None:
        """Take away a directory, FIFO or link that lies where a block should: it can be neither
        read nor replaced. Never raises ``OSError``.
        """
        try:
            if stat.S_ISREG(path.lstat().st_mode):
                return
        except OSError:
            return  # gone, or not to be seen: then the next read says so
        logger.warning("%s is no file: quarantined", path)
        # A name of its own: a bad block could not be moved to that of a directory.
        name = f"{path.name}-{self._writer}-{next(self._counter)}"
        self._take_away(path, self._quarantine_dir / name)

    def remove_stale_temporaries(self) -> None:
        """Remove what crashed writers left."""
        oldest_s = time.time() - STALE_AFTER_S
        for path in _children(self.temporary_dir):
            try:
                if path.stat().st_mtime < oldest_s:
                    path.unlink()
                    logger.info("removed %s, left by a writer that crashed", path)
            except FileNotFoundError:
                continue  # its writer has just renamed it

    def block_paths(self) -> Iterator[Path]:
        """Every file that is named and placed like a block, in order of its hash.

        A directory within that cannot be listed is left out. Raises ``StorageError`` when the
        model's own cannot.
        """
        try:
            top = _children(self._directory, name_chars=2)
        except OSError as exc:
            raise StorageError(f"store {self._directory}: cannot be listed: {exc}") from exc
        for first in top:
            for second in _children_or_none(first, 2):
                prefix = first.name + second.name
                for path in _children_or_none(second, 2 * HASH_BYTES):
                    if path.name.startswith(prefix):
                        yield path

    def _bound_quarantine(self) -> None:
        # ctime: the rename into quarantine sets it, while mtime is the last use.
        kept = [(path.lstat().st_ctime, path) for path in _children(self._quarantine_dir)]
        for _, path in sorted(kept)[:-MAX_QUARANTINED]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _children_or_none(directory: Path, name_chars: int) -> list[Path]:
    try:
        return _children(directory, name_chars)
    except OSError as exc:
        logger.warning("%s left out of the store: %s", directory, exc)
        return []


def _children(directory: Path, name_chars: int | None = None) -> list[Path]:
    """Sorted children, only those named by ``name_chars`` hex digits if given; [] if it is gone."""
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except FileNotFoundError:
        return []
    if name_chars is not None:
        names = [name for name in names if len(name) == name_chars and _HEX.issuperset(name)]
    return [directory / name for name in names]
