from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_dualpath.bench.mover import fio
from vllm_dualpath.errors import LaunchError

BLOCK_BYTES = 1 << 16


def document(**changes: object) -> str:
    """What fio 3.33 says about a read, cut down."""
    job = {"jobname": "x", "error": 0, "read": {"io_bytes": 4096, "runtime": 250}, **changes}
    return json.dumps({"fio version": "fio-3.33", "jobs": [job]})


def test_seconds_come_from_the_job() -> None:
    """Warnings before the document do not matter."""
    assert fio.parse_fio("note: something\n" + document(), "read", 4096) == 0.25


@pytest.mark.parametrize(
    "output",
    [
        "",
        "fio: failed",
        "{}",
        document(error=5),
        document(read={"io_bytes": 4095, "runtime": 250}),
        document(read={"io_bytes": 4096, "runtime": 0}),
        document(read=None),
    ],
    ids=["nothing", "no document", "no job", "error", "short", "no time", "no figures"],
)
def test_anything_else_is_no_measurement(output: str) -> None:
    """A run that moved other bytes, or says nothing, is an error and no figure."""
    with pytest.raises(LaunchError, match="fio read"):
        fio.parse_fio(output, "read", 4096)


@pytest.mark.skipif(not fio.is_installed(), reason=fio.HOW_TO_INSTALL)
def test_it_reads_the_very_files_and_leaves_nothing(tmp_path: Path) -> None:
    """A real read and a real write move all bytes; scratch files are gone, the blocks are not."""
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        path.write_bytes(os.urandom(BLOCK_BYTES))
    assert fio.run_fio(fio.FioRun("read", tmp_path, BLOCK_BYTES, 2, 2, files)) > 0
    assert fio.run_fio(fio.FioRun("write", tmp_path, BLOCK_BYTES, 2, 2)) > 0
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.skipif(not fio.is_installed(), reason=fio.HOW_TO_INSTALL)
def test_a_failure_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """Fio refuses a block size of no sectors."""
    with pytest.raises(LaunchError, match="fio write: "):
        fio.run_fio(fio.FioRun("write", tmp_path, 1000, 2, 2))
    assert list(tmp_path.iterdir()) == []
