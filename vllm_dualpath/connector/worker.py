"""The worker side: carries out each step's copies between vLLM's cache and the staging memory.

Called by vLLM's forward thread, which it keeps only where right answers need it: copies run beside
the forward pass, what follows them on the copy thread, messages in the link's. Knows pages and
slots, not tokens: what to copy was decided by the scheduler side.

What orders copies and the forward pass:

* a layer's attention waits for the loads of that layer (``wait_for_layer``);
* saves read pages that stay as they are while a request holds them, and vLLM holds the pages of a
  finished one until we report it (``delayed_frees``); pages can change hands without that only
  between two steps, so each step begins behind every copy of the last one (``fence``);
* a slot is given back, a page reported as saved, a mapping let go only when its copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.connector.copies import CopyEngine, CopyThread, Mark, Rows, copy_engine
from vllm_dualpath.connector.loads import NO_KEY, AsyncLoads
from vllm_dualpath.connector.metadata import BlockSave, Claim, DualPathMetadata, PageCopy
from vllm_dualpath.connector.paging import PagedCaches
from vllm_dualpath.connector.setup import EngineSetup
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.connector.stats import DualPathStats, Recorder
from vllm_dualpath.connector.worker_mover import WorkerMover
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.messages import (
    LocalLoaded,
    LocalMessage,
    Persist,
    Release,
    ReturnPersistSlots,
    Saved,
)

logger = init_logger("vllm.dualpath.worker")


class _Batch:
    """The copies of one step that use one mover's memory."""

    def __init__(self, staging: Staging, copies: list[PageCopy], rows: Rows) -> None:
        self.staging = staging
        self.copies = copies
        self.rows = rows
        self.last_mark: Mark = None


class WorkerSide:
    """Hooks of one worker. ``guard.GuardedWorker`` stands between them and vLLM."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self.recorder = Recorder()
        self._layer_of: dict[str, int] = {}
        self._step = DualPathMetadata()
        self._load_marks: list[Sequence[Mark]] = []
        """Of each batch of this step's loads, by layer."""
        self._layer_waits: list[float] = []
        self._saves: list[_Batch] | None = None
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
        self._engine: CopyEngine = copy_engine(caches.device)
        self._thread = CopyThread()
        self._mover = WorkerMover(
            setup.mover_spec(geometry),
            geometry,
            caches,
            self._engine,
            self._received,
            lambda: self._loads.mover_lost(),
        )
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
            try:
                self._thread.close()
                self._mover.close()
            finally:
                self._engine.close()

    # --- one step --------------------------------------------------------------------------------

    def bind(self, step: DualPathMetadata) -> None:
        """Take a step's orders; blocks to store are copied before anything can change them."""
        self._step = step
        self._saves = None
        self._saved_layers.clear()
        self._load_marks.clear()
        self._mover.note_step(step.scheduler_boot)
        self._delayed |= step.delayed_frees
        self._invalid |= step.failed_blocks
        for copy in (*step.sync_loads, *step.saves):
            self._owed[copy.request_id] = copy.claim
        if step.persists:
            self._persist(step.persists)

    def start_loads(self) -> None:
        """Start this step's loads; those that this step's forward pass reads come layer by
        layer.
        """
        step = self._step
        loads, step.sync_loads = step.sync_loads, []
        for batch in self._batches(loads, self._fail_sync):
            self._load_layers(batch)
        self._loads.start(step)

    def wait_for_layer(self, layer_name: str) -> None:
        """Order what the forward pass does next behind the copies of this layer."""
        if not self._load_marks:
            return
        layer = self._layer_of.get(layer_name)
        if layer is not None:
            for marks in self._load_marks:
                self._layer_waits.append(self._engine.hold_forward(marks[layer]))

    def save_layer(self, layer_name: str) -> None:
        """Copy out this layer's new pages, and say so once they are there."""
        if not self._step.saves:
            return
        layer = self._layer_of.get(layer_name)
        if layer is None or layer in self._saved_layers:
            return
        if self._saves is None:
            self._saves = self._batches(self._step.saves, self._drop_saves)
        self._saved_layers.add(layer)
        for batch in self._saves:
            self._save_layer(batch, layer)

    def finish_saves(self) -> None:
        """End the step: copy layers whose hook did not fire.

        Copies go on; before anything changes their pages, vLLM calls ``fence``.
        """
        if self._step.saves:
            for name in self._layer_of:
                self.save_layer(name)
        for batch in self._saves or ():
            self._release_after(batch)
        self._saves = None
        self._step.saves = []
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
            self.recorder.observe(metrics.FENCE_WAIT_SECONDS, [self._engine.hold_forward(mark)])

    def fail_step(self) -> None:
        """Something went wrong where nothing should: report this step's loads as failed."""
        self._fail_sync(self._step.sync_loads)
        self._step.sync_loads = []
        self._loads.fail_all(self._step)

    # --- results ---------------------------------------------------------------------------------

    def results(self, finished_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Requests whose sends, receives ended, and whose receives failed, since the last call."""
        self._finish(finished_ids)
        sent = set()
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

    def _batches(
        self, copies: list[PageCopy], on_gone: Callable[[list[PageCopy]], None]
    ) -> list[_Batch]:
        """Group ``copies`` by mover; hand those whose mover's memory is gone to ``on_gone``."""
        by_boot: dict[bytes, list[PageCopy]] = {}
        for copy in copies:
            by_boot.setdefault(copy.claim.boot_id, []).append(copy)
        batches = []
        for boot_id, group in by_boot.items():
            staging = self._mover.acquire(boot_id)
            if staging is None:
                on_gone(group)
            else:
                batches.append(_Batch(staging, group, self._rows(staging, group)))
        return batches

    def _rows(self, staging: Staging, copies: list[PageCopy]) -> Rows:
        """The pages of ``copies``; lets go of ``staging`` if they make no sense."""
        try:
            return staging.rows(copies)
        except BaseException:
            staging.release()
            raise

    def _load_layers(self, batch: _Batch) -> None:
        try:
            marks = self._engine.submit_layers(batch.rows, load=True)
            self._fence = batch.last_mark = marks[-1]
            self._load_marks.append(marks)
        finally:
            self._release_after(batch)

    def _save_layer(self, batch: _Batch, layer: int) -> None:
        mark = batch.last_mark = self._submit(batch.rows, range(layer, layer + 1), load=False)
        self._when(mark, lambda: self._report_saved(batch.copies, layer))

    def _report_saved(self, copies: list[PageCopy], layer: int) -> None:
        for copy in copies:
            message = Saved(copy.claim.key, layer, copy.first_page, copy.last_page)
            self._mover.connection.send(copy.claim.boot_id, message)

    def _persist(self, blocks: list[BlockSave]) -> None:
        """Copy whole blocks to persist slots, all in one copy, and have them stored."""
        claims = {block.boot_id: Claim(NO_KEY, block.boot_id) for block in blocks}
        copies = [PageCopy("", claims[b.boot_id], 0, b.block_ids, (b.slot,)) for b in blocks]

        def gone(copies: list[PageCopy]) -> None:
            self.recorder.count(metrics.BLOCKS_NOT_STORED, len(copies))
            slots = tuple(copy.slots[0] for copy in copies)
            self._mover.connection.send(copies[0].claim.boot_id, ReturnPersistSlots(slots))

        def stored(boot_id: bytes) -> None:
            for block in blocks:
                if block.boot_id == boot_id:
                    message = Persist(block.slot, block.hash, block.parent)
                    self._mover.connection.send(boot_id, message)

        for batch in self._batches(copies, gone):
            layers = range(self._geometry.num_layers)
            batch.last_mark = self._submit(batch.rows, layers, load=False)
            self._release_after(batch)
            self._when(batch.last_mark, partial(stored, batch.staging.boot_id))

    def _submit(self, rows: Rows, layers: range, *, load: bool) -> Mark:
        self._fence = mark = self._engine.submit(rows, layers, load=load)
        return mark

    def _when(self, mark: Mark, then: Callable[[], object]) -> None:
        """Call ``then`` once ``mark`` is reached, after all earlier ``then``s; never if its copy
        failed.
        """

        def wait_then() -> None:
            self._engine.wait(mark)
            then()

        self._thread.put(wait_then)

    def _release_after(self, batch: _Batch) -> None:
        """Let go of a batch's staging memory once its copies have ended, well or not."""

        def wait_release() -> None:
            try:
                self._engine.wait(batch.last_mark)
            finally:
                batch.staging.release()

        self._thread.put(wait_release)

    def _finish(self, request_ids: set[str]) -> None:
        """Give up claims and report sends once every copy ordered so far has ended."""
        owed = [self._owed.pop(each) for each in request_ids & self._owed.keys()]
        delayed = request_ids & self._delayed
        self._delayed -= delayed

        def end() -> None:
            for claim in owed:
                self._mover.connection.send_surely(claim.boot_id, Release(claim.key))
            self._sent.extend(delayed)

        if owed or delayed:
            self._when(None, end)

    def _fail_sync(self, copies: list[PageCopy]) -> None:
        """A synchronous load whose memory is gone, which the life of a mapping is there to
        prevent.
        """
        for copy in copies:
            logger.error("request %s: staged pages are gone: recomputing", copy.request_id)
            self.recorder.count(metrics.LOAD_FAILURES, label="mover_lost")
            self._invalid.update(copy.block_ids)

    def _drop_saves(self, copies: list[PageCopy]) -> None:
        self.recorder.count(metrics.LOAD_FAILURES, len(copies), "mover_lost")
