"""The store between two runs: the same blocks each time, those of the agents' contexts."""

from __future__ import annotations

import string
import time
from pathlib import Path

from vllm_dualpath.errors import LaunchError

_NAME_CHARS = 64
"""A block's file is named by its SHA-256."""
_HEX = frozenset(string.hexdigits.lower())
_POLL_S = 0.2


class StoredBlocks:
    """The block files below ``directory``, seen through one node's mount.

    Ours, or those that ``pattern`` finds.
    """

    def __init__(self, directory: Path, pattern: str | None = None) -> None:
        self._directory = directory
        self._pattern = pattern
        self._kept: frozenset[Path] = frozenset()

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def wait_for(self, count: int, timeout_s: float) -> None:
        """Wait until so many blocks are stored. Raises ``LaunchError``."""
        deadline_s = time.monotonic() + timeout_s
        while len(found := self._paths()) < count:
            if time.monotonic() > deadline_s:
                raise LaunchError(
                    f"{self._directory}: expected {count} blocks after {timeout_s:.0f} s, found"
                    f" {len(found)}; see the engines' logs"
                )
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """What is there now is what ``reset`` leaves."""
        self._kept = frozenset(self._paths())

    def reset(self) -> None:
        """Remove what was stored since ``keep``. Nobody may be writing."""
        for path in set(self._paths()) - self._kept:
            path.unlink()

    def _paths(self) -> list[Path]:
        if self._pattern is not None:
            return list(self._directory.glob(self._pattern))
        return [path for path in self._directory.glob("*/??/??/*") if _is_block(path.name)]


def _is_block(name: str) -> bool:
    return len(name) == _NAME_CHARS and _HEX.issuperset(name)
