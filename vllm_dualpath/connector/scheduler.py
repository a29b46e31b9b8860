"""The scheduler side: answers vLLM's questions about hits and orders each step's copies.

Never waits: what it needs of the mover is in shared memory, what it tells the mover goes to a
queue.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_dualpath import metrics
from vllm_dualpath.blocks import chain_root
from vllm_dualpath.connector.hits import DecodeHits, HitSource, PrefillHits, StoreHits
from vllm_dualpath.connector.metadata import DualPathMetadata
from vllm_dualpath.connector.persist import Persister
from vllm_dualpath.connector.scheduler_mover import SchedulerMover
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.stats import DualPathStats, Recorder
from vllm_dualpath.connector.tracked import HashChain, Tracked

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.dualpath.scheduler")

_REPORT_S = 2.0
"""The engine is kept stepping at most this long after activity, so that ``/metrics`` is
complete.
"""
_STEP_PACE_S = 0.002
_Scheduled = tuple[Tracked, int, Callable[[], list[int]]]
"""A request of a step, its tokens in that step, and how to get its block table."""
_NORMAL_ENDS = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SchedulerSide:
    """Hooks of the scheduler. ``guard.GuardedScheduler`` stands between them and vLLM."""

    def __init__(self, setup: EngineSetup) -> None:
        self.recorder = Recorder()
        self._geometry = geometry = setup.identity.geometry
        self._root = setup.identity.root
        self._epoch = 0
        self._mover = SchedulerMover(setup.socket_path, self.recorder)
        self._tracked: dict[str, Tracked] = {}
        self._orders = DualPathMetadata()
        self._activity_s = -_REPORT_S
        self._cache_manager: KVCacheManager | None = None
        self._hits: HitSource
        self._persister: Persister | None = Persister(geometry, self._mover, self.recorder)
        self._prefill: PrefillHits | None = None
        if setup.config.role == "prefill":
            self._hits = self._prefill = PrefillHits(geometry, self._mover, self.recorder)
            self._persister = None
        elif setup.config.role == "decode":
            self._hits = DecodeHits(geometry, self._mover, self.recorder)
        else:
            self._hits = StoreHits(geometry, self._mover)
        self._mover.connection.start()

    def bind_cache_manager(self, manager: KVCacheManager) -> None:
        """Learn of the prefix cache, from which blocks of failed loads are evicted."""
        self._cache_manager = manager

    def shutdown(self) -> None:
        """Disconnect."""
        self._mover.connection.close()

    # --- one request -----------------------------------------------------------------------------

    def matched(self, request: Request, num_local_tokens: int) -> tuple[int, bool]:
        """How many tokens beyond the local ones can be loaded, and whether asynchronously."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._track(request)
        return self._hits.look(tracked, num_local_tokens)

    def allocated(self, request: Request, block_ids: Sequence[int], num_external: int) -> None:
        """VLLM allocated blocks; with ``num_external`` > 0 it takes our last answer."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.settled:
            return
        tracked.settled = True
        if num_external:
            self._hits.taken(tracked, block_ids, self._orders)
            # A decode engine loads what the prefill engine has read or computed: counted there.
            if not isinstance(self._hits, DecodeHits):
                self.recorder.count(metrics.HIT_TOKENS, num_external)
        else:
            self._hits.turned_down(tracked)
        self._note_activity()

    def fail_load(self, request: Request, block_ids: Sequence[int]) -> None:
        """A load that vLLM counts on could not be ordered: have the worker say so."""
        if self._prefill is not None:
            self._orders.failed_blocks.update(block_ids)
        else:
            self._orders.failed_loads.append((request.request_id, tuple(block_ids)))

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """The request ended; returns whether vLLM must hold its blocks until they are copied."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False  # a notice for a request that never was scheduled, or another's parameters
        self._hits.release(tracked)
        if tracked.loading:
            return False  # vLLM holds the blocks of an unfinished load by itself
        # Copies may still run when the step that ordered them has ended.
        delayed = tracked.issued and self._prefill is not None
        if self._persister is not None and tracked.epoch == self._epoch:
            if request.status in _NORMAL_ENDS:
                saves = self._persister.orders(tracked, block_ids)
                self._orders.persists += saves
                delayed = delayed or bool(saves)
            self._persister.count_left(tracked)
        if delayed:
            self._orders.delayed_frees.add(request.request_id)
        return delayed

    # --- one step --------------------------------------------------------------------------------

    def take_orders(self) -> DualPathMetadata:
        """What was ordered since the last step: loads, and blocks of requests that ended."""
        orders, self._orders = self._orders, DualPathMetadata()
        view = self._mover.view
        orders.scheduler_boot = None if view is None else view.boot_id
        return orders

    def add_saves(self, orders: DualPathMetadata, output: SchedulerOutput) -> None:
        """Add the new prompt pages that this step computes or finds in the prefix cache."""
        if self._prefill is None:
            return
        for tracked, num_scheduled, block_ids in self._scheduled(output):
            if tracked.claim is not None:
                copies = self._prefill.add_saves(tracked, num_scheduled, block_ids())
                if copies:
                    orders.saves += copies
                    self._note_activity()

    def add_persists(self, orders: DualPathMetadata, output: SchedulerOutput) -> None:
        """Add the Full Blocks that have become safe to store."""
        if self._persister is None or not self._persister.has_room:
            return
        for tracked, _, block_ids in self._scheduled(output):
            if tracked.epoch == self._epoch and self._persister.has_work(tracked):
                saves = self._persister.orders(tracked, block_ids())
                if saves:
                    orders.persists += saves
                    self._note_activity()

    def update(self, output: KVConnectorOutput) -> None:
        """Results of a step: loads that ended, blocks that failed."""
        failed_blocks: set[int] = set()
        for request_id in output.finished_recving or ():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            loading, tracked.loading = set(tracked.loading), ()
            bad = (
                loading
                if request_id in output.failed_recving
                else loading & output.invalid_block_ids
            )
            if bad:
                failed_blocks |= bad
                self._hits.failed(tracked)
        if failed_blocks and self._cache_manager is not None:
            self._cache_manager.evict_blocks(failed_blocks)

    # --- the rest --------------------------------------------------------------------------------

    def has_pending_work(self) -> bool:
        """Whether the engine shall go on stepping although it has no request."""
        if time.monotonic() - self._activity_s > _REPORT_S:
            return False
        if not self.recorder.is_empty:
            return True
        if self._mover.idle:
            return False
        # vLLM's loop would step a thousand times a second for numbers that are not there yet, which
        # takes a quarter of a core. A request that comes meanwhile starts so much later at most.
        time.sleep(_STEP_PACE_S)
        return True

    def reset(self) -> None:
        """Weights or caches were reset: what was stored is another model's from now on."""
        self._root = os.urandom(32)
        self._epoch += 1
        self._mover.change_root(self._root)
        for request_id, tracked in list(self._tracked.items()):
            if tracked.settled:
                tracked.claimed = None  # its next pages are another model's: none is saved
            else:
                # What it was told of hits is over: it is tracked anew when it is asked about again.
                self._hits.release(tracked)
                del self._tracked[request_id]
        logger.info("cache reset: earlier blocks of the store are not used any more")

    def take_stats(self) -> DualPathStats | None:
        """What happened since the last call."""
        return self.recorder.take()

    def _track(self, request: Request) -> Tracked:
        salt = request.cache_salt
        root = self._root if salt is None else chain_root(self._root, salt)
        tracked = Tracked.of(request, HashChain(root, self._geometry.block_tokens), self._epoch)
        self._tracked[request.request_id] = tracked
        self.recorder.count(metrics.PROMPT_TOKENS, request.num_prompt_tokens)
        return tracked

    def _scheduled(self, output: SchedulerOutput) -> Iterable[_Scheduled]:
        state = output.kv_connector_block_state
        assert state is not None
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                yield tracked, num_scheduled, partial(_block_ids, state, request_id)

    def _note_activity(self) -> None:
        self._activity_s = time.monotonic()
        self._mover.idle = self._mover.view is None


def _block_ids(state: KVConnectorBlockState, request_id: str) -> list[int]:
    """The request's block table: resolved only where it is needed, since that copies it."""
    (block_ids,) = state.resolve_block_ids(request_id)
    return block_ids
