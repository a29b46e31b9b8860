"""A transfer at the prefill side: hits come in, the engine's new pages go out."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np

from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import NotCached, PagesGood, Peer, Ready, Saved
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.transfer import Transfer
from vllm_dualpath.transport.base import PutArray

logger = logging.getLogger(__name__)


class PrefillTransfer(Transfer):
    """Ready when the hit blocks are good; then pushes what the engine saves."""

    @property
    def _peer_role(self) -> str:
        return "decode"

    def _staged(self) -> None:
        self._good_blocks: set[int] = set()
        self._staged_s = self._ports.loop.now_s()

    def on_saved(self, saved: Saved) -> None:
        """Push pages from the outgoing slots. Raises ``ProtocolError`` for pages out of range."""
        if self._stage is None or not (
            self._saves(saved.first_page, saved.last_page)
            and saved.layer < self._ports.geometry.num_layers
        ):
            raise ProtocolError(f"transfer {self.key}: saved pages out of range: {saved}")
        if self._ending and not self._drain:
            return
        notice = PagesGood(
            self.key, self.peer.boot_id, saved.layer, saved.first_page, saved.last_page
        )
        pieces = self._page_pieces(saved)
        self._open_puts += 1
        num_bytes = int(pieces[:, 2].sum())
        self._ports.peers.put(self.peer, pieces, notice, partial(self._pages_put, num_bytes))

    def on_not_cached(self) -> None:
        """The engine computes what the plan left to its own prefix cache."""
        self._ports.counters.load_failures["not_cached"] += 1
        self._ports.tell_router(NotCached(self.key))

    def _page_pieces(self, saved: Saved) -> PutArray:
        """One piece a block: its pages of a layer are adjacent. A row each: here, there, bytes."""
        geometry = self._ports.geometry
        per_block = geometry.pages_per_block
        first, last = saved.first_page // per_block, -(-saved.last_page // per_block)
        edges = np.arange(first, last + 1, dtype=np.uint64) * np.uint64(per_block)
        edges[0], edges[-1] = saved.first_page, saved.last_page
        page_bytes = np.uint64(geometry.layer_page_bytes[saved.layer])
        offsets = np.full(last - first, geometry.page_offset(saved.layer, 0), np.uint64)
        offsets[0] = geometry.page_offset(saved.layer, saved.first_page - first * per_block)
        pieces = np.empty((last - first, 3), np.uint64)
        sides = (
            (self._ports.staging.address, self._slots),
            (self.peer.staging_address, self.peer.slots),
        )
        for column, (address, slots) in enumerate(sides):
            starts = np.array(slots[first:last], np.uint64) * np.uint64(geometry.slot_bytes)
            pieces[:, column] = starts + np.uint64(address) + offsets
        pieces[:, 2] = np.diff(edges) * page_bytes
        return pieces

    def _pages_put(self, num_bytes: int, outcome: PutOutcome) -> None:
        self._open_puts -= 1
        if outcome is PutOutcome.DONE:
            self._ports.counters.push_to_decode_bytes += num_bytes
        else:
            self._push_failed(self.peer, outcome)
        self._progress()

    def _needs_peer(self) -> bool:
        return True

    def _mark_block(self, block: int) -> None:
        self._good_blocks.add(block)

    def _has_block(self, block: int) -> bool:
        return block in self._good_blocks

    def _mark_pages(self, notice: PagesGood) -> None:
        # Pages travel from prefill to decode only.
        self._ports.counters.rejected_messages += 1
        logger.warning("transfer %s: unexpected %s", self.key, type(notice).__name__)

    def _cut(self) -> None:
        self._good_blocks = {block for block in self._good_blocks if block < self._limit}

    def _check_good(self) -> None:
        if self._cut_owed or len(self._good_blocks) < self._limit - self._num_cached_blocks:
            return
        if self._reader is not None and not self._reader.is_quiet_from(self._limit):
            return
        if self._publish():
            now = self._ports.loop.now_s()
            self._ports.counters.stage_seconds.append(now - self._staged_s)
            self._ports.tell_router(Ready(self.key, self._limit))

    def _planned_writers(self) -> list[Peer]:
        return self._readers(self.peers)
