"""Permission for AMX, which a decode engine that only loads KV gets from nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ASK_THEN_SHOW = """
import ctypes
from vllm_dualpath.connector.amx import permit_amx
permitted = ctypes.c_ulong()
permit_amx()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(permitted)) == 0
print(permitted.value >> 18 & 1)
"""


@pytest.mark.skipif("amx_tile" not in Path("/proc/cpuinfo").read_text(), reason="a CPU without AMX")
def test_a_process_that_asked_may_use_tiles() -> None:
    """The kernel says so itself; a fresh process, since permission cannot be given back."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK_THEN_SHOW], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"
