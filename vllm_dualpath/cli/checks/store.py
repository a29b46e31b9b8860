"""Whether a store can be reached, and how fast one stream to it is."""

from __future__ import annotations

from vllm_dualpath.cli.checks.base import Check
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.bandwidth import measure_bandwidth
from vllm_dualpath.storage.directio import supports_direct_io
from vllm_dualpath.storage.posix import root_of

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
        read, write = measure_bandwidth(directory, num_bytes)
        direct, reason = supports_direct_io(directory)
    except OSError as exc:
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
        Check(
            "store direct I/O",
            "ok" if direct else "warn",
            "yes" if direct else reason,
            "" if direct else "reads go through the page cache and cost CPU",
        ),
    ]
