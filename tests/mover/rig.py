"""Movers' transfer books in one process, every step of store and network in a test's hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.mover.material import GEOMETRY, MAX_MODEL_LEN, ROOT, Prompt
from vllm_dualpath import native
from vllm_dualpath.config import EngineConfig
from vllm_dualpath.control.host import host_id, process_start_ticks
from vllm_dualpath.control.slot_table import (
    SlotTableReader,
    SlotTableWriter,
    claims_bytes,
    table_bytes,
)
from vllm_dualpath.errors import BlockNotFound
from vllm_dualpath.messages import (
    Donate,
    MoverMessage,
    Peer,
    Reserve,
    SegmentSpec,
    Stage,
    TransferKey,
    decode_notice,
)
from vllm_dualpath.mover.book import TransferBook
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.mover.peers import PeerDirectory
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.staging import SharedMemory, SlotPool
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.storage.base import ReadBlock, WriteBlock
from vllm_dualpath.transport.base import PutArray
from vllm_dualpath.transport.loopback import LoopbackTransport

NUM_SLOTS = 8
NUM_DONOR_SLOTS = 1
"""Fewer than a donor's blocks."""
TABLE_ENTRIES = 4


class StepStorage:
    """A ``StorageQueue`` without threads: a test decides which call runs next."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.queued: list[IoTask] = []
        self.running: list[IoTask] = []
        self.cancelled: list[IoTask] = []
        self.stalled: list[IoTask] = []
        """What the test says makes no progress."""
        self._num_writes = 0

    @property
    def num_open_writes(self) -> int:
        return self._num_writes

    @property
    def open_tasks(self) -> list[IoTask]:
        return [*self.queued, *self.running]

    def submit_read(self, task: IoTask) -> None:
        self.queued.append(task)

    def submit_write(self, task: IoTask) -> None:
        self.queued.append(task)

    def cancel(self, task: IoTask) -> None:
        if task in self.queued:
            self.queued.remove(task)
            task.cancelled = True
            self.cancelled.append(task)

    def stalled_reads(self, _now_s: float, _deadline_s: float) -> list[IoTask]:
        return self.stalled

    def start_one(self, choice: int) -> None:
        """A thread takes a task: from here on it cannot be cancelled."""
        if self.queued:
            self.running.append(self.queued.pop(choice % len(self.queued)))

    def finish_one(self, choice: int) -> None:
        """A call returns and the loop hears of it; cancelled tasks first, as they never run."""
        if self.cancelled:
            task = self.cancelled.pop(0)
        elif self.running:
            task = self.running.pop(choice % len(self.running))
            try:
                task.num_bytes = self._run(task)
            except BlockNotFound as exc:
                task.error = exc
        else:
            return
        task.done(task)

    def touches(self, address: int, num_bytes: int) -> bool:
        """Whether an open call reads or writes this memory."""
        return any(
            address <= native.buffer_address(task.work.payload) < address + num_bytes
            for task in self.open_tasks
            if isinstance(task.work, ReadBlock | WriteBlock)
        )

    def _run(self, task: IoTask) -> int:
        if isinstance(task.work, ReadBlock | WriteBlock):
            return task.work.run(self._store)  # type: ignore[arg-type]
        return task.work()


class MemoryStore:
    """Blocks in a dictionary, for both sides; some can be missing."""

    uri = "memory:"

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def get(self, block_hash: bytes, payload: memoryview, *, verify: bool = True) -> int:
        del verify  # nothing is corrupt here
        if block_hash not in self.blocks:
            raise BlockNotFound(block_hash.hex())
        payload[:] = self.blocks[block_hash]
        return len(payload)

    def put(self, block_hash: bytes, parent: bytes, payload: memoryview) -> int:
        del parent
        self.blocks[block_hash] = bytes(payload)
        return len(payload)


class CheckedTransport(LoopbackTransport):
    """Says before each put where it goes, and shows what is under way."""

    on_put: Callable[[PutArray, bytes], None]

    def put(self, peer_id: int, pieces: PutArray, notice: bytes) -> int:
        self.on_put(pieces, notice)
        return super().put(peer_id, pieces, notice)

    def deliver(self) -> None:
        """Everything that was put so far arrives."""
        self.resume()
        self.pause()

    def deliver_all_but(self, peer_id: int) -> None:
        """As ``deliver``, but for what was put to one peer."""
        kept = [batch for batch in self._held if batch.peer_id == peer_id]
        for batch in kept:
            self._held.remove(batch)
        self.deliver()
        self._held.extendleft(reversed(kept))

    def reads(self, address: int, num_bytes: int) -> bool:
        """Whether a put under way reads this memory."""
        return self._names(0, address, num_bytes)

    def writes(self, address: int, num_bytes: int) -> bool:
        """Whether a put under way will write this memory at the peer."""
        return self._names(1, address, num_bytes)

    def _names(self, column: int, address: int, num_bytes: int) -> bool:
        return any(
            address <= piece[column] < address + num_bytes
            for batch in self._held
            for piece in batch.pieces.tolist()
        )


class Side:
    """One mover without its process: its book, memory and engine's view of the table."""

    def __init__(self, role: str, loop: EventLoop, store: MemoryStore) -> None:
        self.role = role
        self.told: list[MoverMessage] = []
        self.transport = CheckedTransport()
        self.transport.on_put = self._check_put
        self.transport.pause()
        self.storage = StepStorage(store)
        num_slots = NUM_SLOTS + NUM_DONOR_SLOTS
        self.staging = SharedMemory("staging", num_slots * GEOMETRY.slot_bytes)
        self.pool = SlotPool(role, 0, NUM_SLOTS)
        self.donor_pool = SlotPool("donor", NUM_SLOTS, NUM_DONOR_SLOTS)
        self.book = TransferBook()
        self.others: list[Side] = []
        self.claimed: set[int] = set()
        """Slots that the engine may copy from or to, kept by the test."""
        max_blocks = GEOMETRY.num_blocks(MAX_MODEL_LEN)
        table = SharedMemory("table", table_bytes(TABLE_ENTRIES, max_blocks))
        claims = SharedMemory("claims", claims_bytes(TABLE_ENTRIES))
        self._memories = (self.staging, table, claims)
        self.table = SlotTableReader(table.map, claims.map, TABLE_ENTRIES, max_blocks)
        region = self.transport.register(self.staging.address, self.staging.num_bytes)
        self.contact = Peer(
            engine_id=role,
            boot_id=os.urandom(16),
            host_id=host_id(),
            pid=os.getpid(),
            pid_start=process_start_ticks(os.getpid()) or 0,
            address=self.transport.address,
            region=region.descriptor,
            staging_address=self.staging.address,
            slots=(),
        )
        counters = Counters()
        ports: Any = Ports(
            engine_id=role,
            boot_id=self.contact.boot_id,
            contact=self.contact,
            config=EngineConfig(
                role="decode" if role == "decode" else "prefill",
                store="file:///x",
                router="tcp://127.0.0.1:1",
            ),
            geometry=GEOMETRY,
            loop=loop,
            staging=self.staging,
            pool=self.pool,
            donor_pool=self.donor_pool,
            store=store,  # type: ignore[arg-type]
            storage=self.storage,  # type: ignore[arg-type]
            peers=PeerDirectory(self.transport, loop, host_id(), counters, self.book.notice),
            table=SlotTableWriter(table.map, claims.map, TABLE_ENTRIES, max_blocks),
            counters=counters,
            tell_router=self.told.append,
            stored=lambda _blocks: None,
            dropped=lambda _hashes, _gone: None,
            closed=self.book.closed,
        )
        self.ports: Ports = ports
        self.book.bind(ports)
        for pool in (self.pool, self.donor_pool):
            pool.release = partial(self._release, pool.release)  # type: ignore[method-assign]

    @property
    def all_free(self) -> bool:
        return (self.pool.num_free, self.donor_pool.num_free) == (NUM_SLOTS, NUM_DONOR_SLOTS)

    def address(self, slot: int) -> int:
        return self.staging.address + slot * GEOMETRY.slot_bytes

    def _release(self, release: Callable[[Sequence[int]], None], slots: Sequence[int]) -> None:
        """No slot is freed while anything under way reads or writes it."""
        for slot in slots:
            assert slot not in self.claimed, f"{self.role} slot {slot}: claimed by the engine"
            where = (self.address(slot), GEOMETRY.slot_bytes)
            assert not self.storage.touches(*where), f"{self.role} slot {slot}: store call open"
            assert not self.transport.reads(*where), f"{self.role} slot {slot}: own put open"
            self.check_unwritten(slot)
        release(slots)

    def check_unwritten(self, slot: int) -> None:
        """No other mover has a put to this slot under way."""
        where = (self.address(slot), GEOMETRY.slot_bytes)
        for other in self.others:
            writes = other.transport.writes(*where)
            assert not writes, f"{self.role} slot {slot}: {other.role} writes"

    def _check_put(self, pieces: PutArray, notice: bytes) -> None:
        """Each put goes to slots that this very transfer holds at the peer, and that its engine
        neither reads nor writes.
        """
        message = decode_notice(notice)
        (peer,) = (o for o in self.others if o.contact.boot_id == message.receiver_boot_id)
        held = {
            slot
            for transfer in peer.book.transfers
            if transfer.key == message.key
            for slot in transfer.slots
        }
        for piece in pieces.tolist():
            slot = (piece[1] - peer.staging.address) // GEOMETRY.slot_bytes
            assert slot in held, f"{self.role} writes to slot {slot} not held by {message.key}"
            assert slot not in peer.claimed, f"{self.role} writes to {peer.role}'s claimed {slot}"

    def close(self) -> None:
        self.ports.peers.close()
        for memory in self._memories:
            os.close(memory.fd)


class Trio:
    """Two sides and a donor on one loop, and the messages a router would send."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.store = MemoryStore()
        self.prefill = Side("prefill", self.loop, self.store)
        self.decode = Side("decode", self.loop, self.store)
        self.donor = Side("donor", self.loop, self.store)
        self.sides = (self.prefill, self.decode, self.donor)
        for side in self.sides:
            side.others = [each for each in self.sides if each is not side]
        self._numbers = itertools.count(1)

    def new_key(self) -> TransferKey:
        return TransferKey(next(self._numbers).to_bytes(16, "big"), 0)

    def reserve(
        self, side: Side, key: TransferKey, prompt: Prompt, peer: Peer, *, donated: bool = False
    ) -> None:
        donors = (self.donor.contact,) if donated else ()
        side.book.reserve(Reserve(key, side.role, len(prompt.tokens), peer, donors))

    def stage(
        self,
        side: Side,
        key: TransferKey,
        prompt: Prompt,
        segments: tuple[SegmentSpec, ...],
        peer: Peer,
    ) -> None:
        side.book.stage(
            Stage(
                key=key,
                pool=side.role,
                num_tokens=len(prompt.tokens),
                num_hit_blocks=segments[-1].last_block if segments else 0,
                root=ROOT,
                block_hashes=prompt.hashes,
                digest=prompt.digest,
                segments=segments,
                peer=peer,
            )
        )

    def donate(
        self,
        key: TransferKey,
        prompt: Prompt,
        segment: SegmentSpec,
        prefill: Peer,
        decode: Peer,
    ) -> None:
        self.donor.book.donate(
            Donate(
                key=key,
                block_hashes=prompt.hashes[: segment.last_block],
                segments=(segment,),
                prefill=prefill,
                decode=decode,
            )
        )

    def spin(self) -> None:
        """Serve the events that wait, without waiting for more."""
        for _ in range(3):
            self.loop.call_later(0.0, lambda: None)
            self.loop.run_once()

    def close(self) -> None:
        for side in self.sides:
            side.close()
        self.loop.close()
