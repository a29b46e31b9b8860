"""How many tokens of KV a second the store gives, read as the mover reads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_dualpath.bench.mover.side_storage import Storage
from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.profile import ALPHA_S
from vllm_dualpath.storage.posix import root_of

_NUM_BYTES = 512 << 20
_IN_FLIGHT_BYTES = 64 << 20
_MAX_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, and whether past the page cache."""

    tokens_per_s: float
    bytes_per_s: float
    is_direct: bool


def measure_reading(
    uri: str, geometry: Geometry, advance: Callable[[float], None] = lambda _: None
) -> Reading:
    """Store half a gigabyte beside the store's blocks and read it again and again for 3 s.

    ``advance`` gets the seconds that were spent reading since its last call. Nothing stays behind.
    Raises ``ConfigError`` for a store that cannot be written to, ``StorageError`` if it fails.
    """
    size = geometry.slot_bytes
    num_blocks = max(2, _NUM_BYTES // size)
    depth = max(2, min(_MAX_IN_FLIGHT, _IN_FLIGHT_BYTES // size))
    try:
        with tempfile.TemporaryDirectory(prefix="profile-", dir=root_of(uri)) as directory:
            storage = Storage()
            opened = storage.open_geometry(directory, geometry, num_blocks, depth)
            try:
                num_rounds, seconds = _read_for(ALPHA_S, storage, advance)
            finally:
                storage.close()
    except OSError as exc:
        raise ConfigError(f"store {uri}: {exc}; it must be writable by this user") from exc
    blocks_per_s = num_rounds * num_blocks / seconds
    return Reading(
        blocks_per_s * geometry.block_tokens,
        blocks_per_s * geometry.payload_bytes,
        bool(opened["direct"]),
    )


def _read_for(
    seconds: float, storage: Storage, advance: Callable[[float], None]
) -> tuple[int, float]:
    """(rounds, seconds) of reading every block once a round."""
    start_s, num_rounds = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - start_s) < seconds:
        advance(storage.read())
        num_rounds += 1
    return num_rounds, elapsed_s
