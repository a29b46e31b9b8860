"""Whether one process may write another's memory (CMA): the fast path between movers of a host."""

from __future__ import annotations

import subprocess
import sys
from typing import IO

from vllm_dualpath.cli.checks.base import Check

_PROBE = "vllm_dualpath.cli.checks.cma_probe"
_ADVICE = (
    "movers of one host will use TCP: set kernel.yama.ptrace_scope to 0 or 1, and give containers"
    " that share a host the capability SYS_PTRACE and one pid namespace"
)


def check_cma() -> Check:
    """Let a process write a word into a sibling: what two movers do, and the kernel may forbid."""
    target = subprocess.Popen(
        [sys.executable, "-m", _PROBE, "target"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with target:
        address = _pipe(target.stdout).readline().strip()
        writer = subprocess.run(
            [sys.executable, "-m", _PROBE, "write", str(target.pid), address],
            capture_output=True,
            text=True,
            check=False,
        )
        _pipe(target.stdin).close()
        written = _pipe(target.stdout).readline().strip() == "written"
    if writer.returncode == 0 and written:
        return Check("CMA", "ok", "a process can write a sibling's memory")
    reason = writer.stderr.strip().rpartition("\n")[2] or "the word did not arrive"
    return Check("CMA", "warn", reason, _ADVICE)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
