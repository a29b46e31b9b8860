"""Whether two processes can share memory: the fast way between movers of a host."""

from __future__ import annotations

import subprocess
import sys
from typing import IO

from vllm_dualpath.cli.checks.base import Check

_NAME = "shared memory"
_PROBE = "vllm_dualpath.cli.checks.peer_memory_probe"
_ADVICE = (
    "movers of one host will use TCP: run them as one user, and give containers that share a host"
    " one PID namespace"
)


def check_peer_memory() -> Check:
    """Let a process write a word into a sibling: what two movers do, and the kernel may forbid."""
    mapping = _try("map")
    if not mapping:
        return Check(_NAME, "ok", "a process can map a sibling's memory")
    by_call = _try("write")
    if not by_call:
        return Check(
            _NAME,
            "warn",
            f"a process can write a sibling's memory by CMA, but not map it: {mapping}",
            "pushes between movers of one host cost a system call a piece; " + _ADVICE,
        )
    return Check(_NAME, "warn", f"no mapping ({mapping}), no CMA ({by_call})", _ADVICE)


def _try(way: str) -> str:
    """Why it does not work; empty if it does."""
    target = subprocess.Popen(
        [sys.executable, "-m", _PROBE, "target"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with target:
        address, fd = _pipe(target.stdout).readline().split()
        where = fd if way == "map" else address
        writer = subprocess.run(
            [sys.executable, "-m", _PROBE, way, str(target.pid), where],
            capture_output=True,
            text=True,
            check=False,
        )
        _pipe(target.stdin).close()
        written = _pipe(target.stdout).readline().strip() == "written"
    if writer.returncode == 0 and written:
        return ""
    return writer.stderr.strip().rpartition("\n")[2] or "the word did not arrive"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
