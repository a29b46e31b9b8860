"""Asynchronous loads of the worker side: from slots that are filled, or from the store through the
mover.

Every load ends in exactly one result, whatever the mover does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.logger import init_logger

from vllm_dualpath import metrics
from vllm_dualpath.blocks import Geometry
from vllm_dualpath.connector.copies import CopyEngine, CopyThread, Mark
from vllm_dualpath.connector.metadata import Claim, DualPathMetadata, PageCopy, StoreLoad
from vllm_dualpath.connector.staging import Staging
from vllm_dualpath.connector.stats import Recorder
from vllm_dualpath.connector.worker_mover import WorkerMover
from vllm_dualpath.messages import LocalLoad, LocalLoadDone, LocalLoaded, Release, TransferKey

logger = init_logger("vllm.dualpath.loads")

NO_KEY = TransferKey(bytes(16), 0)
"""Stands in copies that belong to no transfer."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A load the mover reads for us."""

    load: StoreLoad
    after: Mark
    deadline_s: float


class AsyncLoads:
    """Started by hooks, ended by the copy thread; ``take_results`` is for hooks again."""

    def __init__(
        self,
        mover: WorkerMover,
        engine: CopyEngine,
        thread: CopyThread,
        geometry: Geometry,
        recorder: Recorder,
        deadline_s: float,
    ) -> None:
        self._mover = mover
        self._engine = engine
        self._thread = thread
        self._geometry = geometry
        self._recorder = recorder
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._waiting: dict[bytes, _Waiting] = {}
        self._expired: set[bytes] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._bad_blocks: set[int] = set()

    def start(self, step: DualPathMetadata) -> None:
        """Start this step's loads; orders are taken out of ``step`` as they are started."""
        self._fail_unordered(step)
        while step.async_loads:
            self._start_copy(step.async_loads[-1])
            step.async_loads.pop()
        while step.store_loads:
            self._ask_mover(step.store_loads[-1])
            step.store_loads.pop()

    def fail_all(self, step: DualPathMetadata) -> None:
        """Report every load of ``step`` that was not started as failed."""
        self._fail_unordered(step)
        while step.async_loads:
            copy = step.async_loads.pop()
            self._release(copy.claim)
            self._end(copy.request_id, copy.block_ids, loaded_any=False, reason="hook_error")
        while step.store_loads:
            load = step.store_loads.pop()
            with self._lock:
                self._waiting.pop(load.load_id, None)
            self._fail(load, "hook_error")

    def loaded(self, message: LocalLoaded) -> None:
        """The mover answered. In the link's thread."""
        with self._lock:
            waiting = self._waiting.pop(message.load_id, None)
            late = message.load_id in self._expired
            self._expired.discard(message.load_id)
        if waiting is not None:
            self._thread.put(lambda: self._copy_loaded(waiting, message))
        elif late and (boot_id := self._mover.connection.boot_id) is not None:
            self._mover.connection.send(boot_id, LocalLoadDone(message.load_id))
        else:
            logger.warning("load %s: answered twice or never asked for", message.load_id.hex()[:8])
            self._recorder.count(metrics.LOAD_FAILURES, label="unknown_load")

    def mover_lost(self) -> None:
        """No answer will come any more. In the attach thread."""
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
            self._expired.clear()
        for each in waiting:
            self._fail(each.load, "mover_lost")

    def take_results(self) -> tuple[set[str], set[str], set[int]]:
        """Requests whose loads ended, those of which nothing was loaded, blocks not loaded."""
        if self._waiting:
            self._expire(time.monotonic())
        elif not self._received:  # every load that ended is in it
            return set(), set(), set()
        with self._lock:
            taken = self._received, self._failed, self._bad_blocks
            self._received, self._failed, self._bad_blocks = set(), set(), set()
        return taken

    def _fail_unordered(self, step: DualPathMetadata) -> None:
        while step.failed_loads:
            request_id, block_ids = step.failed_loads.pop()
            self._end(request_id, block_ids, loaded_any=False, reason="not_ordered")

    def _start_copy(self, copy: PageCopy) -> None:
        after = self._engine.now()
        staging = self._mover.acquire(copy.claim.boot_id)
        if staging is None:
            self._release(copy.claim)
            self._end(copy.request_id, copy.block_ids, loaded_any=False, reason="mover_lost")
            return
        self._thread.put(lambda: self._copy_staged(copy, staging, after))

    def _copy_staged(self, copy: PageCopy, staging: Staging, after: Mark) -> None:
        loaded = self._copy(copy, staging, after)
        self._release(copy.claim)
        bad = () if loaded else copy.block_ids
        self._end(copy.request_id, bad, loaded_any=loaded, reason="copy_error")

    def _ask_mover(self, load: StoreLoad) -> None:
        waiting = _Waiting(load, self._engine.now(), time.monotonic() + self._deadline_s)
        with self._lock:
            self._waiting[load.load_id] = waiting
        if not self._mover.connection.send(load.boot_id, LocalLoad(load.load_id, load.hashes)):
            with self._lock:
                # ``mover_lost`` may have been quicker.
                gone = self._waiting.pop(load.load_id, None)
            if gone is not None:
                self._fail(load, "mover_lost")

    def _copy_loaded(self, waiting: _Waiting, message: LocalLoaded) -> None:
        """Copy the good leading blocks. In the copy thread."""
        load = waiting.load
        num_pages = self._num_good_pages(load, message)
        loaded = False
        staging = self._mover.acquire(load.boot_id) if num_pages else None
        if staging is not None:
            claim = Claim(NO_KEY, load.boot_id)
            copy = PageCopy(
                load.request_id, claim, load.first_page, load.block_ids[:num_pages], message.slots
            )
            loaded = self._copy(copy, staging, waiting.after)
        self._mover.connection.send(load.boot_id, LocalLoadDone(load.load_id))
        bad = load.block_ids[num_pages if loaded else 0 :]
        self._end(load.request_id, bad, loaded_any=loaded, reason="short_load")

    def _num_good_pages(self, load: StoreLoad, message: LocalLoaded) -> int:
        """Pages of ``load`` that lie in good blocks, none if the answer makes no sense."""
        num_good = min(message.num_good, len(load.hashes))
        slots = message.slots[:num_good]
        if len(slots) < num_good:
            logger.error(
                "load %s: %d good blocks in %d slots", load.load_id.hex()[:8], num_good, len(slots)
            )
            return 0
        per_block = self._geometry.pages_per_block
        end_page = (load.first_page // per_block + num_good) * per_block
        return max(0, min(end_page - load.first_page, len(load.block_ids)))

    def _copy(self, copy: PageCopy, staging: Staging, after: Mark) -> bool:
        try:
            num_layers = self._geometry.num_layers
            rows = staging.rows([copy])
            mark = self._engine.submit_background(rows, 0, num_layers, after, load=True)
            self._engine.wait(mark)
        except Exception:
            logger.exception("request %s: copying its KV failed: recomputing", copy.request_id)
            return False
        finally:
            staging.release()
        return True

    def _expire(self, now_s: float) -> None:
        with self._lock:
            late = [each for each in self._waiting.values() if each.deadline_s < now_s]
            for each in late:
                del self._waiting[each.load.load_id]
                self._expired.add(each.load.load_id)
        for each in late:
            self._fail(each.load, "stalled")

    def _fail(self, load: StoreLoad, reason: str) -> None:
        self._end(load.request_id, load.block_ids, loaded_any=False, reason=reason)

    def _release(self, claim: Claim) -> None:
        self._mover.connection.send_surely(claim.boot_id, Release(claim.key))

    def _end(
        self, request_id: str, bad_blocks: Sequence[int], *, loaded_any: bool, reason: str
    ) -> None:
        if bad_blocks:
            self._recorder.count(metrics.LOAD_FAILURES, label=reason)
        with self._lock:
            self._received.add(request_id)
            self._bad_blocks.update(bad_blocks)
            if not loaded_any:
                self._failed.add(request_id)
