"""An engine that says what a test tells it, and the real mover process it started."""

from __future__ import annotations

import mmap
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tests.mover.material import (
    FINGERPRINT,
    GEOMETRY,
    MAX_MODEL_LEN,
    ROOT,
    WAIT_S,
    Prompt,
    wait_for,
)
from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.control.slot_table import ClaimedTransfer, SlotTableReader
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    GeometrySpec,
    Hello,
    LocalMessage,
    LocalStats,
    Mapped,
    MoverSpec,
    Peer,
    Release,
    Saved,
    TransferKey,
)

_T = TypeVar("_T")


class ScriptedEngine:
    """Both sides of an engine: links to the mover, its staging memory and its slot table."""

    def __init__(self, socket_path: Path) -> None:
        self.messages: queue.SimpleQueue[LocalMessage] = queue.SimpleQueue()
        self.closed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.worker = EngineLink(socket_path, "worker", self.messages.put, self.closed.put)
        self.attached, fds = self.worker.connect(WAIT_S)
        self.scheduler = EngineLink(socket_path, "scheduler", self.messages.put, self.closed.put)
        _, more = self.scheduler.connect(WAIT_S)
        for fd in more:
            os.close(fd)
        self.staging = mmap.mmap(fds[0], self.attached.staging_bytes)
        self.worker.send(Mapped())
        table = mmap.mmap(fds[1], 0, prot=mmap.PROT_READ)
        self.index_map = mmap.mmap(fds[3], 0, prot=mmap.PROT_READ) if len(fds) > 3 else None
        self.table = SlotTableReader(
            table,
            mmap.mmap(fds[2], 0),
            self.attached.table_capacity,
            self.attached.table_max_blocks,
        )
        for fd in fds:
            os.close(fd)
        self._seen: list[LocalMessage] = []

    def slot(self, slot: int) -> bytes:
        """The payload of one slot."""
        start = slot * GEOMETRY.slot_bytes
        return self.staging[start : start + GEOMETRY.payload_bytes]

    def save_pages(
        self, claimed: ClaimedTransfer, prompt: Prompt, first_page: int | None = None
    ) -> None:
        """Compute every page beyond the hits, and take those before them from the cache: write
        each to its slot, then say so, layer by layer.
        """
        per_block = GEOMETRY.pages_per_block
        first = claimed.num_hit_blocks * per_block if first_page is None else first_page
        ranges = [(0, claimed.num_cached_blocks * per_block), (first, prompt.num_pages)]
        for layer in range(GEOMETRY.num_layers):
            for begin, end in ranges:
                for page in range(begin, end):
                    self._write_page(claimed, prompt, layer, page)
                if begin < end:
                    self.worker.send(Saved(claimed.key, layer, begin, end))

    def _write_page(self, claimed: ClaimedTransfer, prompt: Prompt, layer: int, page: int) -> None:
        block, in_block = divmod(page, GEOMETRY.pages_per_block)
        offset = GEOMETRY.page_offset(layer, in_block)
        num_bytes = GEOMETRY.layer_page_bytes[layer]
        payload = prompt.expected_blocks()[block]
        start = claimed.slots[block] * GEOMETRY.slot_bytes + offset
        self.staging[start : start + num_bytes] = payload[offset : offset + num_bytes]

    def claim(self, key: TransferKey) -> ClaimedTransfer:
        claimed = self.table.claim(key)
        assert claimed is not None, f"{key} is not published"
        return claimed

    def release(self, key: TransferKey) -> None:
        self.worker.send(Release(key))

    def expect(self, kind: type[_T], match: Callable[[_T], bool] = lambda _: True) -> _T:
        """The first message of this kind that matches; earlier ones of the kind are forgotten."""

        def look() -> _T | None:
            while not self.messages.empty():
                self._seen.append(self.messages.get())
            for idx, message in enumerate(self._seen):
                if isinstance(message, kind) and match(message):
                    late = self._seen[idx + 1 :]
                    self._seen = [m for m in self._seen[:idx] if not isinstance(m, kind)] + late
                    return message
            return None

        return wait_for(look, f"{kind.__name__} at the engine")  # type: ignore[return-value]

    def expect_idle(self) -> LocalStats:
        """A report, from now on, that nothing is open and every slot free."""
        self.forget(LocalStats)
        return self.expect(LocalStats, lambda each: each.idle and each.stats.slots_used == 0)

    def forget(self, kind: type[LocalMessage]) -> None:
        """Drop what came of this kind."""
        while not self.messages.empty():
            self._seen.append(self.messages.get())
        self._seen = [message for message in self._seen if not isinstance(message, kind)]

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()


class MoverProcess:
    """One ``python -m vllm_dualpath.mover`` with its scripted engine."""

    def __init__(
        self,
        directory: Path,
        engine_id: str,
        role: str,
        router: str | None,
        store: Path,
        **config: Any,
    ) -> None:
        self.engine_id = engine_id
        self.socket_path = directory / f"{engine_id}.sock"
        self.log = directory / f"{engine_id}.log"
        values = {
            "role": role,
            "store": f"file://{store}",
            "staging_bytes": 24 * GEOMETRY.slot_bytes,
            "persist_slots": 4,
            "donor_slots": 0,
            **config,
        }
        if router is not None:
            values["router"] = router
        spec_path = directory / f"{engine_id}.spec"
        spec_path.write_bytes(msgspec.msgpack.encode(self._spec(values)))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_dualpath.mover", "--spec", str(spec_path)],
                stderr=log,
                stdout=log,
            )
        self._engine: ScriptedEngine | None = None
        self.hello: Hello | None = None

    def _spec(self, values: dict[str, Any]) -> MoverSpec:
        return MoverSpec(
            version=PROTOCOL_VERSION,
            engine_id=self.engine_id,
            socket_path=str(self.socket_path),
            config=values,
            url=f"http://{self.engine_id}",
            model="tiny",
            fingerprint=FINGERPRINT,
            root=ROOT,
            geometry=GeometrySpec(
                GEOMETRY.block_tokens,
                GEOMETRY.page_tokens,
                GEOMETRY.layer_page_bytes,
                GEOMETRY.layout,
                GEOMETRY.kv_heads,
                GEOMETRY.kv_dtype,
            ),
            max_model_len=MAX_MODEL_LEN,
        )

    @property
    def engine(self) -> ScriptedEngine:
        if self._engine is None:
            self._engine = ScriptedEngine(self.socket_path)
        return self._engine

    @property
    def boot_id(self) -> bytes:
        return self.engine.attached.boot_id

    def peer(self, slots: tuple[int, ...] = ()) -> Peer:
        """The mover as the router describes it to another."""
        assert self.hello is not None
        return Peer(
            engine_id=self.engine_id,
            boot_id=self.boot_id,
            host_id=self.hello.host_id,
            pid=self.hello.pid,
            pid_start=self.hello.pid_start,
            address=self.hello.address,
            region=self.hello.region,
            staging_address=self.hello.staging_address,
            slots=slots,
        )

    def kill(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End in order, or by force if that takes too long; fails if the mover did not end well."""
        if self._engine is not None:
            self._engine.close()
        elif self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(WAIT_S)
            raise

    def assert_clean_log(self) -> None:
        """No callback of the mover raised."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
