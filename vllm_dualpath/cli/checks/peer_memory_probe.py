"""The processes of the check: ``target``, ``write PID ADDRESS`` and ``map PID FD``."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

WORD = b"dualpath"

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def _target() -> None:
    """Print address and descriptor of some memory; when told to look, say if it was written."""
    libc = ctypes.CDLL(None, use_errno=True)
    # As UCX does where Yama asks for it; an error means that there is no Yama to ask.
    libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    fd = os.memfd_create("dualpath-probe")
    os.ftruncate(fd, mmap.PAGESIZE)
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), fd, flush=True)
    sys.stdin.read()
    print("written" if memory[: len(WORD)] == WORD else "unchanged", flush=True)


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


def _map(pid: int, remote_fd: int) -> None:
    """Write ``WORD`` through a mapping; exit code 1 and the reason if that is refused."""
    try:
        fd = os.open(f"/proc/{pid}/fd/{remote_fd}", os.O_RDWR)
        mmap.mmap(fd, mmap.PAGESIZE)[: len(WORD)] = WORD
    except OSError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    if sys.argv[1] == "target":
        _target()
    elif sys.argv[1] == "map":
        _map(int(sys.argv[2]), int(sys.argv[3]))
    else:
        _write(int(sys.argv[2]), int(sys.argv[3]))
