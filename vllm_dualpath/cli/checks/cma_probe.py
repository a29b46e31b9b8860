"""The two processes of the CMA check: ``target``, and ``write PID ADDRESS``."""

from __future__ import annotations

import ctypes
import os
import sys

WORD = b"dualpath"

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def _target() -> None:
    """Print the address of some memory; when told to look, say whether it was written."""
    libc = ctypes.CDLL(None, use_errno=True)
    # As UCX does where Yama asks for it; an error means that there is no Yama to ask.
    libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    memory = ctypes.create_string_buffer(len(WORD))
    print(ctypes.addressof(memory), flush=True)
    sys.stdin.read()
    print("written" if memory.raw == WORD else "unchanged", flush=True)


def _write(pid: int, address: int) -> None:
    """Write ``WORD`` into another process; exit code 1 and the reason if that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    source = ctypes.create_string_buffer(WORD, len(WORD))
    local = _IoVec(ctypes.addressof(source), len(WORD))
    remote = _IoVec(address, len(WORD))
    written = libc.process_vm_writev(
        pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), 0
    )
    if written != len(WORD):
        sys.exit(f"process_vm_writev: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    if sys.argv[1] == "target":
        _target()
    else:
        _write(int(sys.argv[2]), int(sys.argv[3]))
