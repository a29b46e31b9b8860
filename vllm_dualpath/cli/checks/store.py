"""Whether a store can be reached, and how fast one stream to it is."""

from __future__ import annotations

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.bandwidth import measure_bandwidth
from vllm_dualpath.storage.block_io import IoChoice
from vllm_dualpath.storage.posix import root_of
from vllm_dualpath.storage.probe import choose_io

_NUM_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 200e6
"""Below this most models compute a token faster than its KV is read."""


def check_store(uri: str, num_bytes: int = _NUM_BYTES) -> list[Check]:
    """Write and read back ``num_bytes`` in the store's directory; nothing stays there."""
    try:
        directory = root_of(uri)
    except ConfigError as exc:
        return [Check("store", "fail", str(exc), "give --store a directory that is mounted")]
    try:
        choice = choose_io(directory)
        read, write = measure_bandwidth(directory, num_bytes, direct=choice.direct)
    except (ConfigError, OSError) as exc:
        return [Check("store", "fail", f"{uri}: {exc}", "it must be writable by this user")]
    speed = f"one stream reads {read / 1e6:,.0f} MB/s, writes {write / 1e6:,.0f} MB/s"
    slow = read < _SLOW_BYTES_PER_S
    return [
        Check("store", "ok", f"{uri} is there and writable"),
        Check(
            "store bandwidth",
            "warn" if slow else "ok",
            speed,
            "slow storage gains little: compare with recomputing" if slow else "",
        ),
        _check_io(choice),
    ]


def _check_io(choice: IoChoice) -> Check:
    """How blocks will be moved; a WARNING where it is not the fastest way."""
    found = f"{choice.backend}, {'direct' if choice.direct else 'buffered'} I/O"
    if not choice.reason:
        return Check("store I/O", "ok", found)
    advice = (
        "reads go through the page cache and cost CPU"
        if not choice.direct
        else "allow io_uring: seccomp filter of the container, sysctl kernel.io_uring_disabled"
    )
    return Check("store I/O", "warn", f"{found}: {choice.reason}", advice)
