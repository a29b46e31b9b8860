"""Permission for vLLM's CPU kernels to use AMX.

Linux lets a process use the tile registers only after it has asked. vLLM's bfloat16 attention does
not ask: in plain vLLM a matrix multiplication of a prompt has done so before it. A decode engine
that only loads KV computes no prompt, and its first step ends with an illegal instruction (seen
with vLLM 0.32 on a CPU).
"""

from __future__ import annotations

import ctypes
import platform

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def permit_amx() -> bool:
    """Ask for all threads of this process; whether it may. A CPU without AMX refuses."""
    if platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
