"""Stores of Full Blocks behind one protocol (``base.BlockStore``)."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.bandwidth import measure_bandwidth
from vllm_dualpath.storage.base import (
    AsyncBlockStore,
    BlockEntry,
    BlockStore,
    Finished,
    ReadBlock,
    WriteBlock,
)
from vllm_dualpath.storage.posix import IoOptions, PosixStore

__all__ = [
    "AsyncBlockStore",
    "BlockEntry",
    "BlockStore",
    "Finished",
    "IoOptions",
    "PosixStore",
    "ReadBlock",
    "WriteBlock",
    "measure_bandwidth",
    "open_store",
]


def open_store(
    uri: str,
    fingerprint: bytes,
    geometry: Geometry,
    manifest_extra: Mapping[str, str] | None = None,
    *,
    create: bool = True,
    io: IoOptions | None = None,
) -> BlockStore:
    """Open one model's store at ``uri``. Raises ``ConfigError`` saying what is wrong with it."""
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return PosixStore(uri, fingerprint, geometry, manifest_extra, create, io)
    raise ConfigError(f"store: expected a file:// URI, found {uri!r}")
