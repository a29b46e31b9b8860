"""Which Full Blocks of a request are safe to store, and when.

A block is safe when every token in it is known for good and its KV has been computed by a step
whose output was processed: steps in flight may still fail, be rewound, or sample another token.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_dualpath import metrics
from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.metadata import BlockSave
from vllm_dualpath.connector.scheduler_mover import MoverView, SchedulerMover
from vllm_dualpath.connector.stats import Recorder
from vllm_dualpath.connector.tracked import Tracked

_MAX_RECENT = 1 << 16


class Persister:
    """Orders copies of new Full Blocks into persist slots. Owned by the scheduler's thread."""

    def __init__(self, geometry: Geometry, mover: SchedulerMover, recorder: Recorder) -> None:
        self._geometry = geometry
        self._mover = mover
        self._recorder = recorder
        self._recent: dict[bytes, None] = {}
        """Hashes stored lately: prompts share prefixes, and without an index nothing else tells."""

    @property
    def has_room(self) -> bool:
        """Whether a block could be stored now."""
        view = self._mover.view
        return view is not None and bool(view.persist_slots)

    def has_work(self, tracked: Tracked) -> bool:
        """Whether some block is safe and was not looked at yet. Costs no copy of the block
        table.
        """
        return self._num_safe_blocks(tracked) > tracked.next_persist_block

    def orders(self, tracked: Tracked, block_ids: Sequence[int]) -> list[BlockSave]:
        """Blocks to store now. Those for which no slot is free are left for a later call."""
        end = self._num_safe_blocks(tracked)
        view = self._mover.view
        if tracked.next_persist_block >= end or view is None:
            return []
        chain = tracked.chain
        hashes = chain.hashes(tracked.request, end)
        per_block = self._geometry.pages_per_block
        saves = []
        for block in range(tracked.next_persist_block, end):
            if not self._is_stored(view, hashes[block]):
                if not view.persist_slots:
                    break
                pages = tuple(block_ids[block * per_block : (block + 1) * per_block])
                slot = view.persist_slots.popleft()
                saves.append(
                    BlockSave(view.boot_id, slot, hashes[block], chain.parent(block), pages)
                )
                self._remember(hashes[block])
            tracked.next_persist_block = block + 1
        return saves

    def count_left(self, tracked: Tracked) -> None:
        """Count the blocks of a request that ended without having been stored."""
        left = self._num_safe_blocks(tracked) - tracked.next_persist_block
        self._recorder.count(metrics.BLOCKS_NOT_STORED, max(0, left))

    def _num_safe_blocks(self, tracked: Tracked) -> int:
        request = tracked.request
        if tracked.excluded or tracked.loading or request.num_stale_output_tokens:
            return 0
        num_processed = request.num_computed_tokens - request.num_in_flight_tokens
        # The last known token was sampled, but nothing has computed its KV.
        return min(num_processed, request.num_tokens - 1) // self._geometry.block_tokens

    def _is_stored(self, view: MoverView, block_hash: bytes) -> bool:
        return block_hash in (self._recent if view.index is None else view.index)

    def _remember(self, block_hash: bytes) -> None:
        self._recent[block_hash] = None
        if len(self._recent) > _MAX_RECENT:
            del self._recent[next(iter(self._recent))]
