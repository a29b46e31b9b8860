"""Runs one of the connector's timings in a process of its own, and reads its last line.

The connector alone may import vllm: here only the numbers arrive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_dualpath.errors import LaunchError

_MAX_ERROR_CHARS = 2000


def run_timing(
    what: str,
    module: str,
    arguments: Sequence[str],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> Any:
    """The JSON that ``module`` ends its output with. Raises ``LaunchError``, which begins with
    ``what``; ``env`` is added to ours.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=os.environ | (env or {}),
        )
    except subprocess.TimeoutExpired as exc:
        raise LaunchError(f"{what}: expected an end within {timeout_s:.0f} s") from exc
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise LaunchError(
            f"{what}: {' '.join(command)} ended with exit code {done.returncode}:\n"
            f"{done.stderr[-_MAX_ERROR_CHARS:]}"
        )
    return json.loads(lines[-1])
