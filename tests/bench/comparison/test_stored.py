"""The store has the same blocks before each run."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dualpath.bench.comparison.stored import StoredBlocks
from vllm_dualpath.errors import LaunchError


def _block(root: Path, letter: str) -> Path:
    path = root / "model" / (letter * 2) / (letter * 2) / (letter * 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"block")
    return path


def test_reset_removes_what_came_since_and_nothing_else(tmp_path: Path) -> None:
    """Kept blocks and files that are no blocks stay."""
    kept = _block(tmp_path, "a")
    manifest = tmp_path / "model" / "MANIFEST.json"
    manifest.write_text("{}")
    stored = StoredBlocks(tmp_path)
    stored.keep()
    new = _block(tmp_path, "b")
    stored.reset()
    assert (kept.exists(), manifest.exists(), new.exists()) == (True, True, False)
    assert stored.num_kept == 1


def test_blocks_that_never_come_are_an_error(tmp_path: Path) -> None:
    """It says how many were expected and found."""
    _block(tmp_path, "a")
    with pytest.raises(LaunchError, match="expected 2 blocks after 0 s, found 1"):
        StoredBlocks(tmp_path).wait_for(2, 0.0)
