"""Limits of this host: locked memory, files, shared memory, ports."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.config import EngineConfig

_MIN_OPEN_FILES = 4096
"""Two sockets a peer and a file a read add up on a node with many engines."""

_DEFAULT_STAGING_BYTES: int = EngineConfig.model_fields["staging_bytes"].default


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.3g} GiB"


def check_memlock(staging_bytes: int = _DEFAULT_STAGING_BYTES) -> Check:
    """RDMA and CUDA pin staging memory; the kernel counts that against this limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= staging_bytes:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else _gib(soft)
        return Check("locked memory", "ok", shown)
    return Check(
        "locked memory",
        "warn",
        f"{_gib(soft)}, one engine stages in {_gib(staging_bytes)}",
        "for RDMA or a GPU: ulimit -l unlimited (containers: --ulimit memlock=-1)",
    )


def check_open_files() -> Check:
    """The soft limit is what a process gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _MIN_OPEN_FILES:
        return Check("open files", "ok", str(soft))
    return Check(
        "open files",
        "warn",
        f"{soft}, the hard limit is {hard}",
        f"ulimit -n {_MIN_OPEN_FILES} or more before starting",
    )


def check_shared_memory(staging_bytes: int = _DEFAULT_STAGING_BYTES) -> Check:
    """Staging is a memfd: it needs memory, not /dev/shm; vLLM and UCX use /dev/shm."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as exc:
        return Check("/dev/shm", "fail", str(exc), "mount a tmpfs at /dev/shm")
    free = stat.f_bavail * stat.f_frsize
    if free < (64 << 20):
        return Check(
            "/dev/shm", "warn", f"{_gib(free)} free", "containers: --shm-size 1g, or --ipc=host"
        )
    available = _available_memory_bytes()
    if available < staging_bytes:
        return Check(
            "/dev/shm",
            "warn",
            f"{_gib(free)} free; memory for one engine's staging: {_gib(available)} available,"
            f" {_gib(staging_bytes)} wanted",
            "give engines a smaller staging_bytes",
        )
    return Check("/dev/shm", "ok", f"{_gib(free)} free, {_gib(available)} of memory available")


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def check_port(port: int) -> Check:
    """Whether a server can listen on ``port`` of loopback now."""
    name = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as exc:
            return Check(
                name,
                "warn",
                f"cannot be bound: {getattr(exc, 'strerror', exc)}",
                "stop who has it, or choose another",
            )
    return Check(name, "ok", "free")
