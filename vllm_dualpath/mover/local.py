"""Without a router: the mover keeps the index itself, loads for its own engine, and evicts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from vllm_dualpath.errors import OutOfDescriptors, ProtocolError, StorageError
from vllm_dualpath.index import HitIndex
from vllm_dualpath.index.shared import SharedIndexWriter
from vllm_dualpath.messages import LocalLoad, LocalLoaded, StoredBlock
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.reader import failure_reason
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.storage.base import BlockEntry, ReadBlock

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Load:
    request: LocalLoad
    slots: tuple[int, ...] = ()
    tasks: dict[int, IoTask] = field(default_factory=dict)
    num_good: int = 0
    failed_at: int | None = None
    answered: bool = False
    released: bool = False
    withdraw: Callable[[], None] | None = None


class LocalLoads:
    """Loads that the engine itself asks for; answered once each, unless given up while waiting."""

    def __init__(self, ports: Ports, answer: Callable[[LocalLoaded], None]) -> None:
        self._ports = ports
        self._answer = answer
        self._loads: dict[bytes, _Load] = {}

    @property
    def num_open(self) -> int:
        return len(self._loads)

    def start(self, request: LocalLoad) -> None:
        """Read the blocks as soon as slots are free. Raises ``ProtocolError`` for a reused id."""
        if request.load_id in self._loads or not request.hashes:
            raise ProtocolError(f"local load {request.load_id.hex()[:12]}: reused id or no blocks")
        load = self._loads[request.load_id] = _Load(request)
        num_slots = len(request.hashes)
        if num_slots > self._ports.pool.num_slots:
            self._reply(load, 0)
            return
        withdraw = self._ports.pool.reserve(num_slots, partial(self._granted, load))
        if not load.slots:
            load.withdraw = withdraw

    def done(self, load_id: bytes) -> None:
        """The engine needs the slots no more."""
        load = self._loads.get(load_id)
        if load is None:
            raise ProtocolError(f"local load {load_id.hex()[:12]}: unknown")
        load.released = True
        if load.withdraw is not None and not load.slots:
            load.withdraw()
        for task in load.tasks.values():
            self._ports.storage.cancel(task)
        self._free_if_over(load)

    def check_progress(self) -> None:
        """Answer loads whose reads are stalled with what is good so far."""
        ports = self._ports
        stalled = ports.storage.stalled_reads(ports.loop.now_s(), ports.config.deadlines.stage_s)
        for load in list(self._loads.values()):
            if not load.answered and any(task in stalled for task in load.tasks.values()):
                ports.counters.load_failures["stalled"] += 1
                hung = [idx for idx, task in load.tasks.items() if task.started_s is not None]
                ports.dropped(tuple(load.request.hashes[idx] for idx in hung), False)
                for task in load.tasks.values():
                    ports.storage.cancel(task)
                self._reply(load, self._leading(load))

    def _granted(self, load: _Load, slots: tuple[int, ...]) -> None:
        load.slots = slots
        load.withdraw = None
        for idx, block_hash in enumerate(load.request.hashes):
            view = self._ports.slot_view(slots[idx])
            work = ReadBlock(block_hash, view, self._ports.config.verify_checksums)
            done = partial(self._read_done, load, idx)
            load.tasks[idx] = IoTask(work, done, self._ports.geometry.block_tokens)
        for task in load.tasks.values():
            self._ports.storage.submit_read(task)

    def _read_done(self, load: _Load, idx: int, task: IoTask) -> None:
        del load.tasks[idx]
        self._ports.counters.storage_read_bytes += task.num_bytes
        if task.error is not None:
            self._failed(load, idx, task.error)
        if not load.tasks and not load.answered:
            self._reply(load, 0 if load.released else self._leading(load))
        self._free_if_over(load)

    def _failed(self, load: _Load, idx: int, error: StorageError) -> None:
        reason = failure_reason(error)
        logger.warning("local load: block %d: %s", idx, error)
        self._ports.counters.load_failures[reason] += 1
        self._ports.counters.corrupt_blocks += reason == "corrupt"
        if not isinstance(error, OutOfDescriptors):
            self._ports.dropped((load.request.hashes[idx],), reason != "io_error")
        load.failed_at = idx if load.failed_at is None else min(load.failed_at, idx)
        for later, task in load.tasks.items():
            if later > idx:
                self._ports.storage.cancel(task)

    def _leading(self, load: _Load) -> int:
        """Blocks before the first one that is missing or not read yet."""
        candidates = [*load.tasks]
        if load.failed_at is not None:
            candidates.append(load.failed_at)
        return min(candidates, default=len(load.request.hashes))

    def _reply(self, load: _Load, num_good: int) -> None:
        load.answered = True
        self._answer(LocalLoaded(load.request.load_id, num_good, load.slots))

    def _free_if_over(self, load: _Load) -> None:
        if load.released and not load.tasks and load.request.load_id in self._loads:
            del self._loads[load.request.load_id]
            self._ports.pool.release(load.slots)


class LocalIndex:
    """The store's index of a mover without a router, published to the engine's scheduler."""

    def __init__(self, ports: Ports, writer: SharedIndexWriter) -> None:
        self._ports = ports
        self._writer = writer
        self._index = HitIndex()

    def add(self, blocks: tuple[StoredBlock, ...]) -> None:
        """The store has these now."""
        for block in blocks:
            entry = BlockEntry(block.hash, block.parent, block.num_bytes, block.last_used_s)
            self._index.add(entry)
            self._writer.add(block.hash)
        self._evict()

    def drop(self, hashes: tuple[bytes, ...], gone: bool) -> None:
        """These cannot be read; those that are not gone still take their place in the store."""
        for block_hash in hashes:
            self._writer.discard(block_hash)
            if gone:
                self._index.remove(block_hash)
            else:
                self._index.hide(block_hash)

    def touch(self, hashes: tuple[bytes, ...]) -> None:
        """These were asked for: they are the most recently used."""
        self._index.longest_prefix(hashes, time.time())

    def _evict(self) -> None:
        quota = self._ports.config.store_quota_bytes
        if quota is None or self._index.total_bytes <= quota:
            return
        victims = tuple(self._index.choose_victims(quota, _pin_nothing))
        self.drop(victims, gone=True)
        evict(self._ports, victims)


def _pin_nothing(_block_hash: bytes) -> bool:
    """An evicted block that is being read is a short hit; its open file stays readable."""
    return False


_LEASE_S = 60.0
_RETRY_S = 20.0


def evict(ports: Ports, hashes: tuple[bytes, ...]) -> None:
    """Remove blocks in the background; later, while somebody else holds the store's lease.

    The index has forgotten them already, so giving up would leave them on the disk for ever. All
    movers of one router are one owner: it is the router that decides.
    """
    owner = ports.config.router or ports.engine_id
    leased = False

    def remove() -> int:
        nonlocal leased
        leased = ports.store.acquire_eviction_lease(owner, _LEASE_S)
        return sum(map(remove_one, hashes)) if leased else 0

    def remove_one(block_hash: bytes) -> int:
        try:
            return ports.store.remove(block_hash)
        except StorageError as exc:
            # The others shall go all the same; this one is found again by the next scan.
            logger.warning("eviction: %s", exc)
            return 0

    def done(task: IoTask) -> None:
        if task.error is None and not leased:
            logger.info("eviction of %d blocks waits for another owner's lease", len(hashes))
            ports.loop.call_later(_RETRY_S, partial(evict, ports, hashes))
        elif task.error is not None:
            logger.warning("eviction of %d blocks failed: %s", len(hashes), task.error)
        else:
            logger.info("evicted %d blocks, %d bytes", len(hashes), task.num_bytes)

    ports.storage.submit_write(IoTask(remove, done))
