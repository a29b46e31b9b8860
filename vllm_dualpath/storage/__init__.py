"""Stores of Full Blocks behind one protocol (``base.BlockStore``)."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.storage.bandwidth import measure_bandwidth
from vllm_dualpath.storage.base import BlockEntry, BlockStore
from vllm_dualpath.storage.posix import PosixStore

__all__ = ["BlockEntry", "BlockStore", "PosixStore", "measure_bandwidth", "open_store"]


def open_store(
    uri: str,
    fingerprint: bytes,
    geometry: Geometry,
    manifest_extra: Mapping[str, str] | None = None,
    *,
    create: bool = True,
) -> BlockStore:
    """Open one model's store at ``uri``. Raises ``ConfigError`` saying what is wrong with it."""
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return PosixStore(uri, fingerprint, geometry, manifest_extra, create)
    raise ConfigError(f"store: expected a file:// URI, found {uri!r}")
