"""``fio``, the storage baseline: the same files, block size, depth and bytes as the store.

It opens and lays out its files before it starts its clock, which the store does not: what is
compared with is the device behind the file system, at its best.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_dualpath.errors import LaunchError

HOW_TO_INSTALL = "fio is not installed: `apt-get install fio`"
_RUN_S = 60.0
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class FioRun:
    """One job: every file is moved once, in one request each."""

    action: Literal["read", "write"]
    directory: Path
    """Where the store's files are; fio's go into a folder of their own."""
    block_bytes: int
    depth: int
    num_blocks: int
    files: Sequence[Path] = ()
    """To read; a write makes files of its own."""

    @property
    def scratch(self) -> Path:
        """Holds what fio writes, and short names of what it reads: it refuses long lists."""
        return self.directory / "fio"

    def command(self) -> list[str]:
        """Direct I/O through io_uring: the page cache flatters nobody."""
        return [
            "fio",
            "--name=dualpath-bench",
            f"--directory={self.scratch}",
            "--filename_format=$filenum",
            f"--rw={self.action}",
            "--direct=1",
            "--ioengine=io_uring",
            f"--bs={self.block_bytes}",
            f"--filesize={self.block_bytes}",
            f"--nrfiles={self.num_blocks}",
            f"--iodepth={self.depth}",
            "--output-format=json",
        ]

    def link_files(self) -> None:
        """Hard links: the very blocks that the store reads."""
        self.scratch.mkdir()
        for idx, path in enumerate(self.files):
            (self.scratch / str(idx)).hardlink_to(path)


def is_installed() -> bool:
    """Whether there is a ``fio`` to compare with."""
    return shutil.which("fio") is not None


def fio_version() -> str:
    """As it says itself."""
    return subprocess.run(
        ["fio", "--version"], capture_output=True, text=True, check=False, timeout=_RUN_S
    ).stdout.strip()


def run_fio(run: FioRun) -> float:
    """Seconds that ``fio`` took. Its scratch files are removed. Raises ``LaunchError``."""
    try:
        run.link_files()
        done = subprocess.run(
            run.command(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_RUN_S,
            cwd=run.scratch,  # it leaves state files where it runs
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LaunchError(f"fio {run.action}: {exc}") from exc
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)
    if done.returncode != 0:
        reason = done.stderr.strip()[:_MAX_REASON]
        raise LaunchError(f"fio {run.action}: exit code {done.returncode}: {reason}")
    return parse_fio(done.stdout, run.action, run.block_bytes * run.num_blocks)


def parse_fio(output: str, action: str, expected_bytes: int) -> float:
    """Seconds from fio's JSON. Raises ``LaunchError`` if it moved anything but all the bytes."""
    try:
        # Warnings may stand before the document.
        job = json.loads(output[output.index("{") :])["jobs"][0]
        moved, milliseconds = job[action]["io_bytes"], job[action]["runtime"]
        error = job["error"]
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise LaunchError(f"fio {action}: expected its JSON, found {output[:200]!r}") from exc
    if error or moved != expected_bytes or milliseconds <= 0:
        raise LaunchError(
            f"fio {action}: expected {expected_bytes} bytes, found {moved} in {milliseconds} ms,"
            f" error {error}"
        )
    return float(milliseconds) / 1e3
