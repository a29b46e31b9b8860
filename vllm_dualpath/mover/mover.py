"""A mover, assembled: memory, store, transport, ports, and who hears what."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import ExitStack
from pathlib import Path

from vllm_dualpath.config import EngineConfig
from vllm_dualpath.control.bus import MoverSocket
from vllm_dualpath.control.host import host_id, process_start_ticks
from vllm_dualpath.control.slot_table import SlotTableWriter, claims_bytes, table_bytes
from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.index.shared import SharedIndexWriter
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Attached,
    Cut,
    Donate,
    Dropped,
    End,
    EngineMessage,
    Evict,
    Hello,
    LocalLoad,
    LocalLoadDone,
    LocalLoaded,
    Mapped,
    MoverMessage,
    MoverSpec,
    NotCached,
    Peer,
    PeerDied,
    Persist,
    PersistSlots,
    Release,
    Reserve,
    ReturnPersistSlots,
    RootChanged,
    RouterMessage,
    Saved,
    SnapshotEnd,
    Stage,
    Stored,
    StoredBlock,
)
from vllm_dualpath.mover.book import TransferBook
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.engine_port import EnginePort
from vllm_dualpath.mover.layout import geometry_of, io_options, make_pools
from vllm_dualpath.mover.local import LocalIndex, LocalLoads, evict
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.mover.peers import PeerDirectory
from vllm_dualpath.mover.persist import PersistSlotsLedger
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.router_port import Registration, RouterPort
from vllm_dualpath.mover.snapshot import scan_store
from vllm_dualpath.mover.staging import SharedMemory
from vllm_dualpath.mover.storage_queue import StorageQueue
from vllm_dualpath.mover.watch import ProgressWatch
from vllm_dualpath.storage import open_store
from vllm_dualpath.transport import make_transport

logger = logging.getLogger(__name__)

_TABLE_ENTRIES = 1024
_STOP_DONATING_S = 1.0


class Mover:
    """Built from a spec, then ``run``. Raises ``ConfigError`` for what cannot work."""

    def __init__(self, spec: MoverSpec, config: EngineConfig) -> None:
        self._spec = spec
        self._config = config
        self._boot_id = secrets.token_bytes(16)
        self._root = spec.root
        self._counters = Counters()
        self._loop = EventLoop()
        self._scanning = False
        self._scan = 0
        """The scan whose blocks the router is waiting for; those of an older one are not told."""
        geometry = self._geometry = geometry_of(spec)
        self._pools = pools = make_pools(config, geometry, spec.max_model_len)
        num_slots = pools.prompts.num_slots + pools.donor.num_slots + pools.persist.num_slots
        self._staging = SharedMemory("staging", num_slots * geometry.slot_bytes)
        self._max_blocks = geometry.num_blocks(spec.max_model_len)
        self._table = SharedMemory("table", table_bytes(_TABLE_ENTRIES, self._max_blocks))
        self._claims = SharedMemory("claims", claims_bytes(_TABLE_ENTRIES))
        self._store = open_store(config.store, spec.fingerprint, geometry, io=io_options(config))
        self._storage = StorageQueue(self._store, self._loop)
        self._book = TransferBook()
        transport = make_transport(
            config.transport,
            config.listen,
            require_rdma=config.require_rdma,
            service_level=config.service_level,
            traffic_class=config.traffic_class,
        )
        region = transport.register(
            self._staging.address, self._staging.num_bytes, fd=self._staging.fd
        )
        logger.info("transport %s, store %s", transport.name, self._store.uri)
        self._contact = Peer(
            engine_id=spec.engine_id,
            boot_id=self._boot_id,
            host_id=host_id(),
            pid=os.getpid(),
            pid_start=process_start_ticks(os.getpid()) or 0,
            address=transport.address,
            region=region.descriptor,
            staging_address=self._staging.address,
            slots=(),
        )
        self._peers = PeerDirectory(
            transport, self._loop, self._contact.host_id, self._counters, self._on_notice
        )
        self._ports = self._make_ports()
        self._book.bind(self._ports)
        self._persist = PersistSlotsLedger(self._ports, pools.persist)
        self._loads = LocalLoads(self._ports, self._answer_load)
        self._index_memory: SharedMemory | None = None
        self._index: LocalIndex | None = None
        self._router: RouterPort | None = None
        if config.router is None:
            self._make_index()
        self._engine = EnginePort(
            Path(spec.socket_path),
            self._loop,
            self._counters,
            self._attached,
            self._on_attached,
            self._on_engine_message,
            self._on_engine_gone,
        )
        self._watch = ProgressWatch(
            self._ports, self._book, self._loads, self._engine, self._grant_persist_slots
        )

    def run(self) -> None:
        """Serve until the engine is gone or ``stop`` is called, then end in order."""
        self._loop.call_later(self._config.deadlines.attach_s, self._check_attached)
        try:
            self._loop.run()
        finally:
            self._close()

    def stop(self, reason: str) -> None:
        """End ``run``. May be called from a signal handler's wake-up."""
        logger.info("ending: %s", reason)
        self._loop.stop()

    # --- assembly --------------------------------------------------------------------------------

    def _make_ports(self) -> Ports:
        return Ports(
            engine_id=self._spec.engine_id,
            boot_id=self._boot_id,
            contact=self._contact,
            config=self._config,
            geometry=self._geometry,
            loop=self._loop,
            staging=self._staging,
            pool=self._pools.prompts,
            donor_pool=self._pools.donor,
            store=self._store,
            storage=self._storage,
            peers=self._peers,
            table=SlotTableWriter(
                self._table.map, self._claims.map, _TABLE_ENTRIES, self._max_blocks
            ),
            counters=self._counters,
            tell_router=self._tell_router,
            stored=self._stored,
            dropped=self._dropped,
            closed=self._book.closed,
        )

    def _make_index(self) -> None:
        capacity = self._config.index_capacity_blocks
        memory = SharedMemory("index", SharedIndexWriter.size_bytes(capacity))
        self._index_memory = memory
        self._index = LocalIndex(self._ports, SharedIndexWriter(memory.map, capacity))
        scan_store(self._ports, self._index.add, self._scanned)

    def _scanned(self, num_blocks: int) -> None:
        logger.info("store holds %d blocks", num_blocks)

    def _join_router(self) -> None:
        assert self._config.router is not None
        self._router = RouterPort(
            MoverSocket(self._config.router, self._boot_id, self._config.keys),
            self._loop,
            self._counters,
            self._hello,
            self._watch.stats,
            self._on_router_message,
            self._on_welcome,
            self._on_router_lost,
            self._config.deadlines.router_lost_s,
        )

    def _hello(self, registration: Registration) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            engine_id=self._spec.engine_id,
            role=self._config.role,
            boot_id=self._boot_id,
            url=self._spec.url,
            model=self._spec.model,
            fingerprint=self._spec.fingerprint,
            root=self._root,
            geometry=self._spec.geometry,
            max_model_len=self._spec.max_model_len,
            store=self._config.store,
            store_quota_bytes=self._config.store_quota_bytes,
            host_id=self._contact.host_id,
            pid=self._contact.pid,
            pid_start=self._contact.pid_start,
            address=self._contact.address,
            region=self._contact.region,
            staging_address=self._contact.staging_address,
            num_slots=self._pools.prompts.num_slots,
            num_donor_slots=self._pools.donor.num_slots,
            kv_tokens=self._spec.kv_tokens,
            prefix_caching=self._spec.prefix_caching,
            registration=registration.number,
            num_sent=registration.num_sent,
            registered=registration.registered,
        )

    # --- the router ------------------------------------------------------------------------------

    def _tell_router(self, message: MoverMessage) -> None:
        if self._router is not None:
            self._router.send(message)

    def _on_router_message(self, message: RouterMessage) -> None:
        self._watch.start()
        match message:
            case Reserve():
                self._book.reserve(message)
            case Stage():
                self._book.stage(message)
            case Donate():
                self._book.donate(message)
            case Cut():
                self._book.cut(message.key, message.num_hit_blocks)
            case End():
                self._book.end(message.key, message.drain, staged=message.staged)
            case PeerDied():
                self._book.peer_died(message.boot_id)
                self._peers.left(message.boot_id)
            case Evict():
                evict(self._ports, message.hashes)

    def _on_welcome(self, send_snapshot: bool) -> None:
        # A router that was slow to answer welcomes each Hello; one scan serves them all.
        if send_snapshot and not self._scanning:
            self._scanning = True
            self._send_snapshot(self._scan)

    def _send_snapshot(self, scan: int) -> None:
        def found(blocks: tuple[StoredBlock, ...]) -> None:
            if scan == self._scan:
                self._tell_router(Stored(blocks))

        def ended(num_blocks: int) -> None:
            if scan == self._scan:
                self._scanning = False
                self._tell_router(SnapshotEnd(num_blocks))

        scan_store(self._ports, found, ended)

    def _on_router_lost(self) -> None:
        # Half of a snapshot is none: the next registration gets one from its beginning.
        self._scan += 1
        self._scanning = False
        self._watch.start()
        self._book.router_lost()

    def _on_notice(self, notice: object) -> None:
        self._watch.start()
        self._book.notice(notice)  # type: ignore[arg-type]  # decoded as Notice by PeerDirectory

    # --- the store -------------------------------------------------------------------------------

    def _stored(self, blocks: tuple[StoredBlock, ...]) -> None:
        if self._index is not None:
            self._index.add(blocks)
        self._tell_router(Stored(blocks))

    def _dropped(self, hashes: tuple[bytes, ...], gone: bool) -> None:
        if self._index is not None:
            self._index.drop(hashes, gone)
        self._tell_router(Dropped(hashes, gone))

    # --- the engine ------------------------------------------------------------------------------

    def _attached(self) -> tuple[Attached, list[int]]:
        fds = [
            os.dup(self._staging.fd),
            self._table.read_only_fd(),
            os.dup(self._claims.fd),
        ]
        if self._index_memory is not None:
            fds.append(self._index_memory.read_only_fd())
        answer = Attached(
            version=PROTOCOL_VERSION,
            boot_id=self._boot_id,
            pid=os.getpid(),
            staging_bytes=self._staging.num_bytes,
            slot_bytes=self._geometry.slot_bytes,
            num_slots=self._staging.num_bytes // self._geometry.slot_bytes,
            table_capacity=_TABLE_ENTRIES,
            table_max_blocks=self._max_blocks,
            index_capacity_blocks=0 if self._index is None else self._config.index_capacity_blocks,
        )
        return answer, fds

    def _on_attached(self, kind: str) -> None:
        if kind == "scheduler":
            self._grant_persist_slots()

    def _on_engine_message(self, message: EngineMessage) -> None:
        if isinstance(message, Mapped):
            # Not before: a leg's load must find its pages mapped.
            if self._router is None and self._config.router is not None:
                self._join_router()
            return
        self._watch.start()
        match message:
            case Saved():
                self._book.saved(message)
            case NotCached():
                self._book.not_cached(message.key)
            case Release():
                self._book.release(message.key)
            case Persist():
                self._persist.store(message)
            case ReturnPersistSlots():
                self._persist.take_back(message.slots)
            case LocalLoad():
                if self._index is None:
                    raise ProtocolError("local load: a router plans the loads of this engine")
                self._loads.start(message)
                self._index.touch(message.hashes)
            case LocalLoadDone():
                self._loads.done(message.load_id)
            case RootChanged():
                self._root = message.root
                if self._router is not None:
                    self._router.say_hello()

    def _on_engine_gone(self, reason: str) -> None:
        self.stop(f"the engine's {reason}")

    def _answer_load(self, answer: LocalLoaded) -> None:
        self._engine.send("worker", answer)

    def _grant_persist_slots(self) -> None:
        slots = self._persist.grant_all()
        if slots and not self._engine.send("scheduler", PersistSlots(slots)):
            self._persist.take_back(slots)

    def _check_attached(self) -> None:
        if not self._engine.has_worker:
            self.stop("no engine attached in time")

    def _close(self) -> None:
        """Finish stores, leave the cluster, let go of everything; each even if another fails."""
        with ExitStack() as stack:
            stack.callback(self._loop.close)
            stack.callback(self._store.close)
            stack.callback(self._peers.close)
            if self._router is not None:
                stack.callback(self._router.close, "ending")
            stack.callback(self._storage.close)
            stack.callback(self._engine.close)
            stack.callback(self._stop_donating)

    def _stop_donating(self) -> None:
        """Give both sides of each transfer their proof: between hosts our death is none."""
        if not self._book.stop_donating():
            return
        self._loop.finish(lambda: not self._peers.num_open_puts, _STOP_DONATING_S)
