"""How fast all nodes together read their stores: what the shaped NICs' sum must stay below.

As a program, ``python -m vllm_dualpath.bench.testbed.reading DIRECTORY SECONDS``, it reads the
files below a directory with direct I/O for so long and prints bytes a second.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

from vllm_dualpath.bench.testbed.layout import TestbedSpec, mount_point
from vllm_dualpath.errors import LaunchError

_SECONDS = 2.0
_THREADS = 4
_PIECE_BYTES = 1 << 20
_LEAST_FILE_BYTES = 1 << 16
_TIMEOUT_S = 60.0


def measure_unshaped_read(spec: TestbedSpec) -> float:
    """Bytes a second that all engine nodes read at once. Raises ``LaunchError``."""
    children = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, mount_point(spec.name, node.name), str(_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in spec.engine_nodes()
    ]
    total = 0.0
    for child in children:
        output, _ = child.communicate(timeout=_TIMEOUT_S)
        if child.returncode:
            raise LaunchError(f"reading the store failed with exit code {child.returncode}")
        total += float(output)
    return total


def read_files(directory: Path, seconds: float) -> float:
    """Read everything below a directory again and again; bytes a second."""
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.stat().st_size >= _LEAST_FILE_BYTES
    ]
    if not files:
        raise LaunchError(f"{directory}: expected files to read, found none")
    start_s = time.monotonic()

    def read_share(thread: int) -> int:
        piece = mmap.mmap(-1, _PIECE_BYTES)
        num_bytes = 0
        for path in islice(cycle(files), thread, None, _THREADS):
            num_bytes += _read(path, piece)
            if time.monotonic() - start_s > seconds:
                break
        return num_bytes

    with ThreadPoolExecutor(_THREADS) as pool:
        num_bytes = sum(pool.map(read_share, range(_THREADS)))
    return num_bytes / (time.monotonic() - start_s)


def _read(path: Path, piece: mmap.mmap) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        offset = 0
        while got := os.preadv(fd, [piece], offset):
            offset += got
        return offset
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(read_files(Path(sys.argv[1]), float(sys.argv[2])))
