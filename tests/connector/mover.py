"""A scripted mover: a real Unix socket, real shared memory, and no behaviour but what a test asks
for.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from vllm_dualpath.blocks import Geometry, prompt_digest
from vllm_dualpath.control.framing import FramedSocket
from vllm_dualpath.control.slot_table import SlotTableWriter, claims_bytes, table_bytes
from vllm_dualpath.errors import PeerLost
from vllm_dualpath.index.shared import SharedIndexWriter
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    EngineMessage,
    LegParams,
    LocalMessage,
    Release,
    Saved,
    TransferKey,
    decode_engine_message,
    encode,
)

TABLE_CAPACITY = 16
INDEX_CAPACITY = 1024


class ScriptedMover:
    """Serves one engine."""

    def __init__(self, path: Path, geometry: Geometry, num_slots: int, *, index: bool) -> None:
        self.alive = True
        self.boot_id = os.urandom(16)
        self.geometry = geometry
        self.num_slots = num_slots
        self.received: list[tuple[str, EngineMessage]] = []
        self.releases: Counter[TransferKey] = Counter()
        self._max_blocks = 64
        sizes = [
            num_slots * geometry.slot_bytes,
            table_bytes(TABLE_CAPACITY, self._max_blocks),
            claims_bytes(TABLE_CAPACITY),
        ]
        if index:
            sizes.append(SharedIndexWriter.size_bytes(INDEX_CAPACITY))
        self._fds = [_memfd(size) for size in sizes]
        maps = [mmap.mmap(fd, size) for fd, size in zip(self._fds, sizes, strict=True)]
        self.staging = np.frombuffer(maps[0], dtype=np.uint8).reshape(num_slots, -1)
        self.table = SlotTableWriter(maps[1], maps[2], TABLE_CAPACITY, self._max_blocks)
        self.index = SharedIndexWriter(maps[3], INDEX_CAPACITY) if index else None
        self.entries: dict[TransferKey, int] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._peers: dict[str, FramedSocket] = {}
        self._lock = threading.Condition()
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, name="scripted-mover")
        self._thread.start()

    # --- what a test does with it
    # ------------------------------------------------------------------

    def publish(
        self,
        root: bytes,
        tokens: list[int],
        num_hit_blocks: int,
        slots: list[int],
        **changes: object,
    ) -> dict[str, object]:
        """Publish a transfer; returns the leg's parameters."""
        key = TransferKey(os.urandom(16), 0)
        digest = changes.get("digest", prompt_digest(root, tokens))
        num_tokens = changes.get("num_tokens", len(tokens))
        num_cached = changes.get("num_cached_blocks", 0)
        entry = (key, num_hit_blocks, num_tokens, digest, slots, num_cached)
        self.entries[key] = self.table.publish(*entry)  # type: ignore[arg-type]
        boot_id = changes.get("boot_id", self.boot_id)
        return LegParams.make(boot_id, key, num_hit_blocks, len(tokens)).to_params()  # type: ignore[arg-type]

    def send(self, kind: str, message: LocalMessage) -> None:
        with self._lock:
            self._lock.wait_for(lambda: kind in self._peers, 5)
            self._peers[kind].send(encode(message))

    def of(self, message_type: type) -> list:
        with self._lock:
            return [m for _, m in self.received if isinstance(m, message_type)]

    def wait_for(self, message_type: type, count: int = 1, timeout_s: float = 5.0) -> list:
        """Wait until that many messages of a type have come; returns them."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._of(message_type)) >= count, timeout_s)
        found = self.of(message_type)
        assert len(found) >= count, f"{message_type.__name__}: {len(found)} of {count} came"
        return found

    def num_claims(self, key: TransferKey) -> int:
        return self.table.num_claims(self.entries[key])

    def saved_pages(self, key: TransferKey) -> Counter[tuple[int, int]]:
        """How often each (layer, page) was saved."""
        pages: Counter[tuple[int, int]] = Counter()
        for message in self.of(Saved):
            if message.key == key:
                pages.update(
                    (message.layer, p) for p in range(message.first_page, message.last_page)
                )
        return pages

    def page(self, slots: list[int], layer: int, page: int) -> np.ndarray:
        """The bytes of one page in staging, as 64-bit words; writable."""
        geometry = self.geometry
        slot = slots[page // geometry.pages_per_block]
        start = geometry.page_offset(layer, page % geometry.pages_per_block)
        return self.staging[slot, start : start + geometry.layer_page_bytes[layer]].view(np.int64)

    def die(self) -> None:
        """End like a killed process: connections close, memory lives on in others' mappings."""
        self.alive = False
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for fd in self._fds:
            os.close(fd)
        os.close(self._wake)

    # --- its thread
    # --------------------------------------------------------------------------------

    def _of(self, message_type: type) -> list:
        return [m for _, m in self.received if isinstance(m, message_type)]

    def _serve(self) -> None:
        anonymous: list[FramedSocket] = []
        alive = True
        while alive:
            peers = [*self._peers.values(), *anonymous]
            readable, _, _ = select.select([self._wake, self._listener, *peers], [], [])
            for ready in readable:
                if ready == self._wake:
                    alive = False
                elif ready is self._listener:
                    anonymous.append(FramedSocket(self._listener.accept()[0]))
                else:
                    self._read(ready, anonymous)
        for peer in [*self._peers.values(), *anonymous]:
            peer.close()
        self._listener.close()

    def _read(self, peer: FramedSocket, anonymous: list[FramedSocket]) -> None:
        try:
            messages = [decode_engine_message(payload) for payload in peer.receive()]
        except PeerLost:
            messages = []
            with self._lock:
                self._peers = {k: p for k, p in self._peers.items() if p is not peer}
            if peer in anonymous:
                anonymous.remove(peer)
            peer.close()
        for message in messages:
            with self._lock:
                if isinstance(message, Attach):
                    anonymous.remove(peer)
                    self._attach(message.kind, peer)
                kind = next(k for k, p in self._peers.items() if p is peer)
                self.received.append((kind, message))
                if isinstance(message, Release):
                    self.releases[message.key] += 1
                self._lock.notify_all()

    def _attach(self, kind: str, peer: FramedSocket) -> None:
        attached = Attached(
            version=PROTOCOL_VERSION,
            boot_id=self.boot_id,
            pid=os.getpid(),
            staging_bytes=self.num_slots * self.geometry.slot_bytes,
            slot_bytes=self.geometry.slot_bytes,
            num_slots=self.num_slots,
            table_capacity=TABLE_CAPACITY,
            table_max_blocks=self._max_blocks,
            index_capacity_blocks=INDEX_CAPACITY if self.index is not None else 0,
        )
        peer.send(encode(attached), self._fds)
        self._peers[kind] = peer


def _memfd(size: int) -> int:
    fd = os.memfd_create("dualpath-test")
    os.ftruncate(fd, size)
    return fd
