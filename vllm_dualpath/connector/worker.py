"""The worker side: carries out each step's copies between vLLM's cache and the staging memory.

Called by vLLM's forward thread; long copies and waits are left to the copy thread, messages to the
link's. Knows pages and slots, not tokens: what to copy was decided by the scheduler side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.connector.copies import (
    Copy,
    CopyEngine,
    CopyThread,
    HostCopies,
    Mark,
    copy_engine,
)
from vllm_dualpath.connector.loads import NO_KEY, AsyncLoads
from vllm_dualpath.connector.metadata import BlockSave, Claim, DualPathMetadata, PageCopy
from vllm_dualpath.connector.paging import PagedCaches, Rows, make_rows
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
        self._load_marks: dict[int, list[Mark]] = {}
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
            [kv_caches[name] for name in names], setup.num_cache_blocks, geometry.layer_page_bytes
        )
        if caches.pages_split > 1:
            geometry = replace(geometry, layout=f"{geometry.layout}/{caches.pages_split}")
        self._geometry = geometry
        self._device = caches.device
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
            caches.device,
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
            self._thread.close()
            self._mover.close()

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
        for block in step.persists:
            self._persist(block)

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
        for mark in self._load_marks.get(self._layer_of.get(layer_name, -1), ()):
            self._engine.hold_forward(mark)

    def save_layer(self, layer_name: str) -> None:
        """Copy out this layer's new pages, and say so once they are there."""
        layer = self._layer_of.get(layer_name)
        if layer is None or not self._step.saves or layer in self._saved_layers:
            return
        if self._saves is None:
            self._saves = self._batches(self._step.saves, self._drop_saves)
        self._saved_layers.add(layer)
        for batch in self._saves:
            self._save_layer(batch, layer)

    def finish_saves(self) -> None:
        """End the step: copy layers whose hook did not fire, and fence the copies.

        The fence makes later kernels wait for all copies, so pages may be reused from here on.
        """
        if self._step.saves:
            for name in self._layer_of:
                self.save_layer(name)
        for batch in self._saves or ():
            self._when(batch.last_mark, batch.staging.release)
        self._saves = None
        self._step.saves = []
        self.fence()

    def fence(self) -> None:
        """Let the forward pass wait for every copy of earlier calls."""
        mark, self._fence = self._fence, None
        self._engine.hold_forward(mark)

    def fail_step(self) -> None:
        """Something went wrong where nothing should: report this step's loads as failed."""
        self._fail_sync(self._step.sync_loads)
        self._step.sync_loads = []
        self._loads.fail_all(self._step)

    # --- results ---------------------------------------------------------------------------------

    def results(self, finished_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Requests whose sends, receives ended, and whose receives failed, since the last call."""
        for request_id in finished_ids:
            self._finish(request_id)
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
                batches.append(
                    _Batch(staging, group, make_rows(group, self._geometry, self._device))
                )
        return batches

    def _load_layers(self, batch: _Batch) -> None:
        waits = []
        try:
            for layer in range(self._geometry.num_layers):
                started = time.perf_counter()
                mark = self._submit(partial(batch.staging.load, layer, batch.rows))
                self._load_marks.setdefault(layer, []).append(mark)
                batch.last_mark = mark
                waits.append(time.perf_counter() - started)
        finally:
            self._when(batch.last_mark, batch.staging.release)
        self.recorder.observe(metrics.LAYER_WAIT_SECONDS, waits)

    def _save_layer(self, batch: _Batch, layer: int) -> None:
        mark = batch.last_mark = self._submit(lambda: batch.staging.save(layer, batch.rows))
        self._when(mark, lambda: self._report_saved(batch.copies, layer))

    def _report_saved(self, copies: list[PageCopy], layer: int) -> None:
        for copy in copies:
            message = Saved(copy.claim.key, layer, copy.first_page, copy.last_page)
            self._mover.connection.send(copy.claim.boot_id, message)

    def _persist(self, block: BlockSave) -> None:
        staging = self._mover.acquire(block.boot_id)
        if staging is None:
            self.recorder.count(metrics.BLOCKS_NOT_STORED)
            self._mover.connection.send(block.boot_id, ReturnPersistSlots((block.slot,)))
            return
        rows = make_rows(
            [PageCopy("", Claim(NO_KEY, block.boot_id), 0, block.block_ids, (block.slot,))],
            self._geometry,
            self._device,
        )

        def copy_block() -> None:
            for layer in range(self._geometry.num_layers):
                staging.save(layer, rows)

        def stored() -> None:
            staging.release()
            message = Persist(block.slot, block.hash, block.parent)
            self._mover.connection.send(block.boot_id, message)

        self._when(self._submit(copy_block), stored)

    def _submit(self, copy: Copy) -> Mark:
        self._fence = mark = self._engine.submit(copy)
        return mark

    def _when(self, mark: Mark, then: Callable[[], object]) -> None:
        """Call ``then`` once ``mark`` is reached, and after all earlier ``then``s."""
        if isinstance(self._engine, HostCopies):
            then()
        else:

            def wait_then() -> None:
                self._engine.wait(mark)
                then()

            self._thread.put(wait_then)

    def _finish(self, request_id: str) -> None:
        claim = self._owed.pop(request_id, None)
        if claim is not None:
            release = Release(claim.key)
            self._when(None, lambda: self._mover.connection.send_surely(claim.boot_id, release))
        if request_id in self._delayed:
            self._delayed.discard(request_id)
            self._when(None, lambda: self._sent.append(request_id))

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
