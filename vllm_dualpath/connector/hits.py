"""Where a request's hits come from: a transfer that the router arranged, or this server's own
store.

Answers are immediate: what is asked here is in shared memory already, or is no hit.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.blocks import Geometry, prompt_digest
from vllm_dualpath.connector.metadata import Claim, DualPathMetadata, PageCopy, StoreLoad
from vllm_dualpath.connector.tracked import Tracked
from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import LegParams, NotCached, Release

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_dualpath.connector.scheduler_mover import SchedulerMover
    from vllm_dualpath.connector.stats import Recorder

logger = init_logger("vllm.dualpath.scheduler")


class HitSource(Protocol):
    """One role's way to hits. Called by the scheduler's hooks."""

    def look(self, tracked: Tracked, num_local_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond the local ones, and whether asynchronously."""

    def taken(self, tracked: Tracked, block_ids: Sequence[int], orders: DualPathMetadata) -> None:
        """VLLM takes the last answer: order the load into ``block_ids``."""

    def turned_down(self, tracked: Tracked) -> None:
        """VLLM does not take a hit of ours; called once a request."""

    def failed(self, tracked: Tracked) -> None:
        """A load failed: its tokens are computed instead."""

    def release(self, tracked: Tracked) -> None:
        """The request ended, or needs the slots no more: release what the worker will not."""


class TransferHits:
    """Shared by both ends of a transfer: claims it, checks it, gives it back."""

    def __init__(self, geometry: Geometry, mover: SchedulerMover, recorder: Recorder) -> None:
        self._geometry = geometry
        self._mover = mover
        self._recorder = recorder

    def failed(self, tracked: Tracked) -> None:
        """The prompt was committed, so the mover stores it all the same."""

    def release(self, tracked: Tracked) -> None:
        claim, tracked.claim = tracked.claim, None
        if claim is not None and not tracked.issued:
            self._mover.connection.send_surely(claim.boot_id, Release(claim.key))

    def _claim(self, tracked: Tracked) -> None:
        """Claim the transfer that the request's parameters name, on the first look only."""
        if tracked.looked:
            return
        tracked.looked = True
        request = tracked.request
        try:
            leg = LegParams.from_params(request.kv_transfer_params)
            problem = None if leg is None else self._try_claim(tracked, leg)
        except ProtocolError as exc:
            logger.warning("request %s: %s", request.request_id, exc)
            problem = "bad_params"
        if problem is not None:
            logger.debug("request %s: no hit: %s", request.request_id, problem)
            self._recorder.count(metrics.LOAD_FAILURES, label=problem)

    def _try_claim(self, tracked: Tracked, leg: LegParams) -> str | None:
        """Claim and check; return why there is no hit, if there is none."""
        view = self._mover.view
        if view is None:
            return "mover_lost"
        if view.boot_id.hex() != leg.boot_id:
            return "boot_mismatch"
        claimed = view.table.claim(leg.key)
        if claimed is None:
            return "not_published"
        tracked.claim = Claim(leg.key, view.boot_id)
        tokens = tracked.request.prompt_token_ids or []
        digest = prompt_digest(tracked.chain.root, tokens)
        if claimed.digest != digest or claimed.num_tokens != len(tokens):
            self.release(tracked)
            return "digest_mismatch"
        enough_slots = len(claimed.slots) >= self._geometry.num_blocks(len(tokens))
        if not enough_slots or claimed.num_cached_blocks > claimed.num_hit_blocks:
            self.release(tracked)
            return "bad_entry"
        tracked.claimed = claimed
        return None

    def _copy(self, tracked: Tracked, first_page: int, block_ids: Sequence[int]) -> PageCopy:
        assert tracked.claim is not None and tracked.claimed is not None
        return page_copy(
            tracked.request.request_id,
            tracked.claim,
            tracked.claimed.slots,
            first_page,
            block_ids,
            self._geometry.pages_per_block,
        )


class PrefillHits(TransferHits):
    """Hit blocks are in the slots and loaded while the forward pass runs; the rest is saved to
    them, and so is what the plan left to the engine's own prefix cache.
    """

    def look(self, tracked: Tracked, num_local_tokens: int) -> tuple[int, bool]:
        if not tracked.may_load:
            return 0, False
        self._claim(tracked)
        if tracked.claimed is None:
            return 0, False
        size = self._geometry.block_tokens
        # One token at least is computed, whatever the entry says.
        num_hit_blocks = min(
            tracked.claimed.num_hit_blocks, (tracked.request.num_prompt_tokens - 1) // size
        )
        tracked.hit_tokens = num_hit_blocks * size
        tracked.answer = max(tracked.hit_tokens - num_local_tokens, 0)
        # The slots have nothing before the cached blocks' end: a gap cannot be closed from them.
        tracked.missed_cache = num_local_tokens < tracked.claimed.num_cached_blocks * size
        if tracked.missed_cache:
            tracked.answer = 0
        return tracked.answer, False

    def taken(self, tracked: Tracked, block_ids: Sequence[int], orders: DualPathMetadata) -> None:
        page = self._geometry.page_tokens
        first = (tracked.hit_tokens - tracked.answer) // page
        blocks = block_ids[first : tracked.hit_tokens // page]
        tracked.issued = True
        orders.sync_loads.append(self._copy(tracked, first, blocks))

    def turned_down(self, tracked: Tracked) -> None:
        if tracked.answer:
            self.release(tracked)
        elif tracked.missed_cache and tracked.claim is not None:
            claim = tracked.claim
            logger.info("request %s: evicted meanwhile, computed", tracked.request.request_id)
            self._mover.connection.send_surely(claim.boot_id, NotCached(claim.key))

    def add_saves(
        self, tracked: Tracked, num_scheduled: int, block_ids: Sequence[int]
    ) -> list[PageCopy]:
        """The prompt pages that this step completes and that no earlier step saved: those before
        and those after the blocks that were read.
        """
        view = self._mover.view
        claim, claimed = tracked.claim, tracked.claimed
        if claim is None or claimed is None or view is None or view.boot_id != claim.boot_id:
            return []
        request = tracked.request
        page, per_block = self._geometry.page_tokens, self._geometry.pages_per_block
        num_tokens = request.num_computed_tokens + num_scheduled
        done = num_tokens >= request.num_prompt_tokens
        end = self._geometry.num_pages(request.num_prompt_tokens) if done else num_tokens // page
        first, tracked.next_save_page = tracked.next_save_page, max(tracked.next_save_page, end)
        cached, hit = (n * per_block for n in (claimed.num_cached_blocks, claimed.num_hit_blocks))
        parts = ((first, min(end, cached)), (max(first, hit), end))
        copies = [self._copy(tracked, a, block_ids[a:b]) for a, b in parts if a < b]
        tracked.issued |= bool(copies)
        return copies


class DecodeHits(TransferHits):
    """The whole prompt is in the slots and loaded before the request is scheduled."""

    def look(self, tracked: Tracked, num_local_tokens: int) -> tuple[int, bool]:
        if not tracked.may_load:
            return 0, False
        self._claim(tracked)
        if tracked.claimed is None:
            return 0, False
        tracked.hit_tokens = tracked.request.num_prompt_tokens
        tracked.answer = max(tracked.hit_tokens - num_local_tokens, 0)
        return tracked.answer, tracked.answer > 0

    def taken(self, tracked: Tracked, block_ids: Sequence[int], orders: DualPathMetadata) -> None:
        geometry = self._geometry
        first = (tracked.hit_tokens - tracked.answer) // geometry.page_tokens
        blocks = block_ids[first : geometry.num_pages(tracked.hit_tokens)]
        tracked.issued = True
        tracked.loading = tuple(blocks)
        # The mover stores the full blocks of a committed prompt itself.
        tracked.next_persist_block = tracked.hit_tokens // geometry.block_tokens
        orders.async_loads.append(self._copy(tracked, first, blocks))

    def turned_down(self, tracked: Tracked) -> None:
        self.release(tracked)


class StoreHits:
    """Without a router: the longest stored prefix, read by the mover when vLLM takes it."""

    def __init__(self, geometry: Geometry, mover: SchedulerMover) -> None:
        self._geometry = geometry
        self._mover = mover

    def look(self, tracked: Tracked, num_local_tokens: int) -> tuple[int, bool]:
        view = self._mover.view
        if not tracked.may_load or view is None or view.index is None:
            return 0, False
        size = self._geometry.block_tokens
        max_blocks = (tracked.request.num_prompt_tokens - 1) // size
        hashes = tracked.chain.hashes(tracked.request, max_blocks)
        tracked.hit_tokens = view.index.longest_prefix(hashes) * size
        tracked.answer = max(tracked.hit_tokens - num_local_tokens, 0)
        return tracked.answer, tracked.answer > 0

    def taken(self, tracked: Tracked, block_ids: Sequence[int], orders: DualPathMetadata) -> None:
        geometry, request = self._geometry, tracked.request
        first_token = tracked.hit_tokens - tracked.answer
        first_page, end_page = (
            tokens // geometry.page_tokens for tokens in (first_token, tracked.hit_tokens)
        )
        num_blocks = tracked.hit_tokens // geometry.block_tokens
        hashes = tracked.chain.hashes(request, num_blocks)[first_token // geometry.block_tokens :]
        tracked.loading = tuple(block_ids[first_page:end_page])
        tracked.next_persist_block = num_blocks
        view = self._mover.view
        orders.store_loads.append(
            StoreLoad(
                request.request_id,
                b"" if view is None else view.boot_id,  # no mover: the worker reports the failure
                os.urandom(16),
                tuple(hashes),
                first_page,
                tracked.loading,
            )
        )

    def turned_down(self, tracked: Tracked) -> None:
        """Nothing is held for an answer."""

    def failed(self, tracked: Tracked) -> None:
        tracked.next_persist_block = 0  # what was bad may be stored anew

    def release(self, tracked: Tracked) -> None:
        """Nothing is held for a request."""


def page_copy(
    request_id: str,
    claim: Claim,
    slots: Sequence[int],
    first_page: int,
    block_ids: Sequence[int],
    pages_per_block: int,
) -> PageCopy:
    """The copy of some pages, with just the slots they lie in. ``slots`` starts at page 0's."""
    last_page = first_page + len(block_ids)
    covered = slots[first_page // pages_per_block : -(-last_page // pages_per_block)]
    return PageCopy(request_id, claim, first_page, tuple(block_ids), tuple(covered))
