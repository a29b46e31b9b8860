"""The worker side: carries out each step's copies between vLLM's cache and the staging memory.

Called by vLLM's forward thread, which it keeps only where right answers need it: copies run beside
the forward pass, what follows them on threads of ours, messages in the link's. Knows pages and
slots, not tokens: what to copy was decided by the scheduler side.

What orders copies and the forward pass:

* a layer's attention waits for the loads of that layer (``wait_for_layer``);
* saves read pages that stay as they are while a request holds them, and vLLM holds the pages of a
  finished one until we report it (``delayed_frees``); pages can change hands without that only
  between two steps, so each step begins behind every copy of the last one (``fence``);
* a slot is given back, a page reported as saved, a mapping let go only when its copy is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.connector.amx import permit_amx
from vllm_dualpath.connector.batches import Batch, Batches, LayerSaves
from vllm_dualpath.connector.copies import CopyEngine, CopyThread, Mark, copy_engine
from vllm_dualpath.connector.loads import NO_KEY, AsyncLoads
from vllm_dualpath.connector.metadata import BlockSave, Claim, DualPathMetadata, PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.connector.reports import Reports
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.stats import DualPathStats, Recorder
from vllm_dualpath.connector.worker_mover import WorkerMover
from vllm_dualpath.errors import ConfigError, SyncLoadFailed
from vllm_dualpath.messages import (
    LocalLoaded,
    LocalMessage,
    Persist,
    Release,
    ReturnPersistSlots,
    Saved,
)

logger = init_logger("vllm.dualpath.worker")


class WorkerSide:
    """Hooks of one worker. ``guard.GuardedWorker`` stands between them and vLLM."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self.recorder = Recorder()
        self._layer_of: dict[str, int] = {}
        self.step = DualPathMetadata()
        self._loading: list[PageCopy] = []
        """This step's loads that its forward pass reads."""
        self.load_marks: list[Sequence[Mark]] = []
        """Of each batch of them, by layer."""
        self._layer_waits: list[float] = []
        self._saves: list[LayerSaves] | None = None
        self._saved_layers: set[int] = set()
        self._fence: Mark = None
        self._owed: dict[str, Claim] = {}
        self._delayed: set[str] = set()
        self._sent: list[str] = []
        self._invalid: set[int] = set()
        self._started = False

    # --- start and end ---------------------------------------------------------------------------

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn the caches, start the mover and wait until it is there. Raises ``ConfigError``."""
        if self._started:
            raise ConfigError("KV caches: expected them to be registered once, found a second time")
        setup = self._setup
        names = setup.identity.layer_names
        geometry = setup.identity.geometry
        caches = PagedCaches(
            [kv_caches[name] for name in names],
            setup.num_cache_blocks,
            geometry.layer_page_bytes,
            geometry.layout,
        )
        if caches.pages_split > 1:
            geometry = replace(geometry, layout=f"{geometry.layout}/{caches.pages_split}")
        self._geometry = geometry
        self._layer_of = {name: layer for layer, name in enumerate(names)}
        if caches.device.type == "cpu":
            permit_amx()
        self._engine: CopyEngine = copy_engine(caches.device)
        self._reports = Reports(self._engine)
        self._thread = CopyThread()
        self._mover = WorkerMover(
            setup.mover_spec(geometry),
            geometry,
            caches,
            self._engine,
            self._received,
            lambda: self._loads.mover_lost(),
        )
        self._batches = Batches(self._mover, self._reports)
        self._loads = AsyncLoads(
            self._mover,
            self._engine,
            self._thread,
            geometry,
            self.recorder,
            setup.config.deadlines.stage_s,
        )
        self._started = True
        self._mover.connection.start()
        try:
            self._mover.connection.wait_attached(setup.config.deadlines.attach_s)
        except ConfigError:
            self.shutdown()
            raise

    def shutdown(self) -> None:
        """Finish copies under way, disconnect, let the mover end."""
        if self._started:
            self._started = False
            with ExitStack() as ending:
                ending.callback(self._engine.close)
                ending.callback(self._mover.close)
                ending.callback(self._thread.close)
                ending.callback(self._reports.close)
                ending.callback(self._release_saves)  # of a step that did not come to its end

    # --- one step --------------------------------------------------------------------------------

    def bind(self, step: DualPathMetadata) -> None:
        """Take a step's orders; blocks to store are copied before anything can change them."""
        self.step = step
        if self._saves is not None:
            self._release_saves()  # of a step that did not come to its end
        if self._saved_layers:
            self._saved_layers.clear()
        if self.load_marks:
            self._loading = []
            self.load_marks.clear()
        self._mover.begin_step(step.scheduler_boot, step.boot_ids())
        self._delayed |= step.delayed_frees
        for copy in (*step.sync_loads, *step.saves):
            self._owed[copy.request_id] = copy.claim
        if step.persists:
            self._persist(step.persists)

    def start_loads(self) -> None:
        """Start this step's loads; those that this step's forward pass reads come layer by
        layer. Raises ``SyncLoadFailed``.
        """
        step = self.step
        if step.failed_blocks:
            self._fail_blocks(step.failed_blocks, "not_ordered")
        self._loading, step.sync_loads = step.sync_loads, []
        for batch in self._batches.each(self._loading, self._fail_gone):
            self._load_layers(batch)
        self._loads.start(step)

    def wait_for_layer(self, layer_name: str) -> None:
        """Order what the forward pass does next behind the copies of this layer."""
        if not self.load_marks:
            return
        layer = self._layer_of.get(layer_name)
        if layer is not None:
            for marks in self.load_marks:
                if waited_s := self._engine.hold_forward(marks[layer]):
                    self._layer_waits.append(waited_s)

    def save_layer(self, layer_name: str) -> None:
        """Copy out this layer's new pages, and say so once they are there."""
        if not self.step.saves:
            return
        layer = self._layer_of.get(layer_name)
        if layer is None or layer in self._saved_layers:
            return
        if self._saves is None:
            batches = self._batches.each(self.step.saves, self._drop_saves)
            self._saves = [self._batches.layer_saves(each, self._report_saved) for each in batches]
        self._saved_layers.add(layer)
        for saves in self._saves:
            self._fence = saves.start(layer)

    def finish_saves(self) -> None:
        """End the step: copy layers whose hook did not fire.

        Copies go on; before anything changes their pages, vLLM calls ``fence``.
        """
        if not self.step.saves and not self._layer_waits:
            return
        try:
            if self.step.saves and len(self._saved_layers) < len(self._layer_of):
                for name in self._layer_of:
                    self.save_layer(name)
        finally:
            self._release_saves()
            self.step.saves = []
        if self._layer_waits:
            self.recorder.observe(metrics.LAYER_WAIT_SECONDS, self._layer_waits)
            self._layer_waits = []

    def fence(self) -> None:
        """Let the forward pass wait for every copy of earlier steps.

        vLLM calls this before it touches the cache in a step: here preempted requests' pages, and
        those of requests that ended with nothing more to copy, get another owner.
        """
        if self._fence is not None:
            mark, self._fence = self._fence, None
            if waited_s := self._engine.hold_forward(mark):
                self.recorder.observe(metrics.FENCE_WAIT_SECONDS, [waited_s])

    def fail_step(self) -> None:
        """A load went wrong where none should: report those of this step as failed.

        Those under way come to their end before anything fills their pages anew (``fence``).
        Raises ``SyncLoadFailed``.
        """
        loading, self._loading = [*self._loading, *self.step.sync_loads], []
        self.load_marks.clear()
        self.step.sync_loads = []
        self._loads.fail_all(self.step)
        self._fail_sync(loading, "hook_error")

    # --- results ---------------------------------------------------------------------------------

    def results(self, finished_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Requests whose sends, receives ended, and whose receives failed, since the last call."""
        self._mover.end_step()
        if finished_ids:
            self._finish(finished_ids)
        sent: set[str] = set()
        while self._sent:
            sent.add(self._sent.pop())
        received, failed, bad_blocks = self._loads.take_results()
        self._invalid |= bad_blocks
        return sent, received, failed

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that loads should have filled and did not."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_stats(self) -> DualPathStats | None:
        """What happened since the last call."""
        return self.recorder.take()

    # --- inside ----------------------------------------------------------------------------------

    def _received(self, message: LocalMessage) -> None:
        if isinstance(message, LocalLoaded):
            self._loads.loaded(message)

    def _load_layers(self, batch: Batch) -> None:
        try:
            marks = self._engine.submit_layers(batch.rows, load=True)
            self._fence = marks[-1]
            self.load_marks.append(marks)
        finally:
            self._batches.release(batch)

    def _release_saves(self) -> None:
        of_step, self._saves = self._saves, None
        for saves in of_step or ():
            self._batches.release(saves.batch)

    def _report_saved(self, copies: Sequence[PageCopy], layer: int) -> None:
        messages = [Saved(c.claim.key, layer, c.first_page, c.last_page) for c in copies]
        self._mover.connection.send(copies[0].claim.boot_id, *messages)

    def _persist(self, blocks: list[BlockSave]) -> None:
        """Copy whole blocks to persist slots, all in one copy, and have them stored."""
        claims = {block.boot_id: Claim(NO_KEY, block.boot_id) for block in blocks}
        copies = [PageCopy("", claims[b.boot_id], 0, b.block_ids, (b.slot,)) for b in blocks]

        def gone(copies: Sequence[PageCopy]) -> None:
            self.recorder.count(metrics.BLOCKS_NOT_STORED, len(copies))
            slots = tuple(copy.slots[0] for copy in copies)
            self._mover.connection.send(copies[0].claim.boot_id, ReturnPersistSlots(slots))

        def copied(batch: Batch, done: bool) -> None:
            batch.staging.release()
            if not done:
                gone(batch.copies)
                return
            boot_id = batch.staging.boot_id
            mine = [block for block in blocks if block.boot_id == boot_id]
            messages = [Persist(block.slot, block.hash, block.parent) for block in mine]
            self._mover.connection.send(boot_id, *messages)

        for batch in self._batches.each(copies, gone):
            report = partial(copied, batch)
            try:
                self._fence = self._batches.save(batch, self._geometry.num_layers, report)
            except Exception:
                report(False)
                raise

    def _finish(self, request_ids: set[str]) -> None:
        """Give up claims and report sends once every copy ordered so far has ended."""
        owed = [self._owed.pop(each) for each in request_ids & self._owed.keys()]
        delayed = request_ids & self._delayed
        self._delayed -= delayed

        def end(_done: bool) -> None:
            for claim in owed:
                self._mover.connection.send_surely(claim.boot_id, Release(claim.key))
            self._sent.extend(delayed)

        if owed or delayed:
            self._reports.after_all(end)

    def _fail_gone(self, copies: Sequence[PageCopy]) -> None:
        """Their memory is gone, which the life of a mapping is there to prevent."""
        self._fail_sync(copies, "mover_lost")

    def _fail_sync(self, copies: Sequence[PageCopy], reason: str) -> None:
        blocks: set[int] = set()
        for copy in copies:
            logger.error("request %s: its KV could not be loaded (%s)", copy.request_id, reason)
            blocks.update(copy.block_ids)
        if blocks:
            self._fail_blocks(blocks, reason)

    def _fail_blocks(self, blocks: Set[int], reason: str) -> None:
        """The forward pass reads blocks that were not filled: vLLM must not use what it computes.

        vLLM recomputes blocks that are reported as invalid, but with asynchronous scheduling it
        has ordered the next step by then, and accepts that step's token (docs/decisions/0007).
        """
        self.recorder.count(metrics.LOAD_FAILURES, label=reason)
        self._invalid |= blocks
        # Nor must the decode side: what is computed anew is not saved again, so it commits nothing
        # of this step's prompts.
        self.step.saves = []
        if self._setup.async_scheduling:
            raise SyncLoadFailed(
                f"{len(blocks)} blocks that this step reads could not be loaded ({reason}; the"
                " log says why): vLLM with asynchronous scheduling would answer with tokens"
                " computed from them, so this engine ends; start it again, and with"
                " --no-async-scheduling if it happens again"
            )

    def _drop_saves(self, copies: Sequence[PageCopy]) -> None:
        self.recorder.count(metrics.LOAD_FAILURES, len(copies), "mover_lost")
