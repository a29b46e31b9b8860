"""Listing what a store holds, a chunk at a time, off the loop's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice

from vllm_dualpath.messages import StoredBlock
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.storage_queue import IoTask

logger = logging.getLogger(__name__)

_CHUNK_BLOCKS = 4096


def scan_store(
    ports: Ports,
    on_chunk: Callable[[tuple[StoredBlock, ...]], None],
    on_end: Callable[[int], None],
) -> None:
    """Call ``on_chunk`` on the loop with all that is stored, then ``on_end`` with its size."""
    entries = ports.store.entries()
    num_blocks = 0

    def next_chunk() -> None:
        chunk: list[StoredBlock] = []

        def read() -> int:
            chunk.extend(
                StoredBlock(entry.hash, entry.parent, entry.num_bytes, entry.last_used_s)
                for entry in islice(entries, _CHUNK_BLOCKS)
            )
            return 0

        def done(task: IoTask) -> None:
            nonlocal num_blocks
            if task.error is not None:
                logger.error("store scan ended early: %s", task.error)
            num_blocks += len(chunk)
            if chunk:
                on_chunk(tuple(chunk))
            if task.error is None and len(chunk) == _CHUNK_BLOCKS:
                next_chunk()
            else:
                on_end(num_blocks)

        ports.storage.submit_write(IoTask(read, done))

    next_chunk()
