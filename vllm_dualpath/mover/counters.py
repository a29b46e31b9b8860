"""What a mover counts, in one mutable place owned by the loop's thread."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Cumulative since start; see ``messages.MoverStats``."""

    storage_read_bytes: int = 0
    donated_bytes: int = 0
    storage_write_bytes: int = 0
    push_to_prefill_bytes: int = 0
    push_to_decode_bytes: int = 0
    blocks_stored: int = 0
    blocks_not_stored: int = 0
    corrupt_blocks: int = 0
    rejected_messages: int = 0
    load_failures: Counter[str] = field(default_factory=Counter)
    stage_seconds: list[float] = field(default_factory=list)
    """Since the last report to the engine."""
