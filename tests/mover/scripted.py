"""A router and an engine that say what a test tells them, against real mover processes."""

from __future__ import annotations

import mmap
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq

from vllm_dualpath.blocks import Geometry, chain_hashes, chain_root, prompt_digest
from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.control.slot_table import ClaimedTransfer, SlotTableReader
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    End,
    Ended,
    GeometrySpec,
    Hello,
    Load,
    LocalMessage,
    LocalStats,
    MoverMessage,
    MoverSpec,
    Peer,
    Pong,
    Release,
    Reserve,
    Reserved,
    RouterMessage,
    Saved,
    SegmentSpec,
    Stage,
    TransferFailed,
    TransferKey,
    Welcome,
    decode_mover_message,
    encode,
)
from vllm_dualpath.storage.posix import PosixStore

WAIT_S = 15.0
GEOMETRY = Geometry(8, 4, (1024, 512, 2048), "LBHNC", 2, "uint8")
FINGERPRINT = bytes(range(32))
ROOT = chain_root(FINGERPRINT)
MAX_MODEL_LEN = 64
_T = TypeVar("_T")


def wait_for(condition: Callable[[], _T], what: str, timeout_s: float = WAIT_S) -> _T:
    """Poll ``condition`` until it is true; fails with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out: {what}")
        time.sleep(0.005)
    return result


def block_payload(block_hash: bytes) -> bytes:
    """A slot's bytes of a stored block, a function of its hash; the padding is zero."""
    seed = int.from_bytes(block_hash[:8], "little")
    generator = np.random.default_rng(seed)
    return generator.bytes(GEOMETRY.payload_bytes).ljust(GEOMETRY.slot_bytes, b"\0")


def open_test_store(directory: Path) -> PosixStore:
    return PosixStore(f"file://{directory}", FINGERPRINT, GEOMETRY)


def make_pipe(directory: Path, block_hash: bytes) -> Path:
    """Replace a stored block by a named pipe: opening it for reading blocks, as on a dead disk."""
    path = block_path(directory, block_hash)
    path.unlink()
    os.mkfifo(path)
    return path


def release_pipe(pipe: Path) -> None:
    """Let the reader that hangs on a pipe return; it finds no block."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as exc:
        raise AssertionError(f"nobody reads {pipe}: {exc}") from exc
    finally:
        pipe.unlink(missing_ok=True)


def block_path(directory: Path, block_hash: bytes) -> Path:
    """The file of a stored block."""
    name = block_hash.hex()
    (path,) = directory.glob(f"*/{name[:2]}/{name[2:4]}/{name}")
    return path


class Prompt:
    """Token ids with their chain; ``store`` puts leading blocks into a store."""

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        self.tokens = [seed * 1000 + idx for idx in range(num_tokens)]
        self.hashes = tuple(chain_hashes(ROOT, self.tokens, GEOMETRY.block_tokens))
        self.digest = prompt_digest(ROOT, self.tokens)
        self.num_blocks = GEOMETRY.num_blocks(num_tokens)
        self.num_pages = GEOMETRY.num_pages(num_tokens)

    def store(self, directory: Path, num_blocks: int) -> None:
        store = open_test_store(directory)
        for idx in range(num_blocks):
            with mmap.mmap(-1, GEOMETRY.slot_bytes) as buffer:
                buffer[:] = block_payload(self.hashes[idx])
                view = memoryview(buffer)
                store.put(self.hashes[idx], self.hashes[idx - 1] if idx else ROOT, view)
                view.release()
        store.close()

    def expected_blocks(self) -> list[bytes]:
        """The payload every block of the prompt shall have, the partial last one included."""
        names = [*self.hashes, self.digest]
        return [block_payload(name)[: GEOMETRY.payload_bytes] for name in names][: self.num_blocks]


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
        """Compute every page beyond the hits: write it to its slot, then say so, layer by layer."""
        per_block = GEOMETRY.pages_per_block
        first = claimed.num_hit_blocks * per_block if first_page is None else first_page
        blocks = prompt.expected_blocks()
        for layer in range(GEOMETRY.num_layers):
            for page in range(first, prompt.num_pages):
                block, in_block = divmod(page, per_block)
                offset = GEOMETRY.page_offset(layer, in_block)
                num_bytes = GEOMETRY.layer_page_bytes[layer]
                start = claimed.slots[block] * GEOMETRY.slot_bytes + offset
                self.staging[start : start + num_bytes] = blocks[block][offset : offset + num_bytes]
            if first < prompt.num_pages:
                self.worker.send(Saved(claimed.key, layer, first, prompt.num_pages))

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


class ScriptedRouter:
    """A ROUTER socket; answers ``Hello`` and ``Load`` unless told not to, while a test waits."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.boot_id = os.urandom(16)
        self.heartbeat_s = 0.05
        self.send_snapshot = False
        self.silent = False
        self.hellos: dict[bytes, Hello] = {}
        self.num_hellos = 0
        self.loads: dict[bytes, Load] = {}
        self._received: dict[bytes, list[MoverMessage]] = {}

    def send(self, mover: MoverProcess | bytes, message: RouterMessage) -> None:
        identity = mover if isinstance(mover, bytes) else mover.boot_id
        self.socket.send_multipart([identity, encode(message)])

    def pump(self, timeout_s: float = 0.0) -> None:
        """Take in what waits, at least one message if one comes within ``timeout_s``."""
        while self.socket.poll(int(timeout_s * 1000)):
            timeout_s = 0.0
            identity, payload = self.socket.recv_multipart()
            self._take(identity, decode_mover_message(payload))

    def _take(self, identity: bytes, message: MoverMessage) -> None:
        if isinstance(message, Hello):
            self.hellos[identity] = message
            self.num_hellos += 1
            if not self.silent:
                welcome = Welcome(
                    PROTOCOL_VERSION, self.boot_id, self.heartbeat_s, self.send_snapshot
                )
                self.send(identity, welcome)
        elif isinstance(message, Load):
            self.loads[identity] = message
            if not self.silent:
                self.send(identity, Pong(self.boot_id))
        else:
            self._received.setdefault(identity, []).append(message)

    def received(self, mover: MoverProcess) -> list[MoverMessage]:
        """What came from a mover and was not expected yet."""
        self.pump()
        return self._received.setdefault(mover.boot_id, [])

    def expect(
        self,
        mover: MoverProcess,
        kind: type[_T],
        key: TransferKey | None = None,
        timeout_s: float = WAIT_S,
    ) -> _T:
        """The next message of this kind; others stay. Fails at once on ``TransferFailed``."""
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = self.received(mover)
            for message in waiting:
                mine = key is None or getattr(message, "key", None) == key
                if isinstance(message, kind) and mine:
                    waiting.remove(message)
                    return message
                failed = isinstance(message, TransferFailed) and mine and key is not None
                if failed and kind is not Ended:
                    raise AssertionError(f"{mover.engine_id}: {message}")
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"timed out: {kind.__name__} from {mover.engine_id}, there is {waiting}"
                )
            self.pump(0.05)

    def expect_load(
        self, mover: MoverProcess, condition: Callable[[Load], bool], what: str
    ) -> Load:
        """A heartbeat with this property."""
        self.loads.pop(mover.boot_id, None)

        def look() -> Load | None:
            self.pump(0.02)
            load = self.loads.get(mover.boot_id)
            return load if load is not None and condition(load) else None

        return wait_for(look, f"{what}: {self.loads.get(mover.boot_id)}")  # type: ignore[return-value]

    def join(self, mover: MoverProcess) -> None:
        """Wait until a mover has registered."""

        def registered() -> bool:
            self.pump(0.02)
            return mover.boot_id in self.hellos

        wait_for(registered, f"Hello of {mover.engine_id}")
        mover.hello = self.hellos[mover.boot_id]

    def count_hellos(self, timeout_s: float) -> int:
        """``pump``, and say how many ``Hello`` came."""
        before = self.num_hellos
        self.pump(timeout_s)
        return self.num_hellos - before

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()


class Transfer:
    """One transfer as a router drives it; each step is a method."""

    def __init__(
        self, router: ScriptedRouter, prefill: MoverProcess, decode: MoverProcess, prompt: Prompt
    ) -> None:
        self.router = router
        self.prefill = prefill
        self.decode = decode
        self.prompt = prompt
        self.key = TransferKey(os.urandom(16), 0)
        self.prefill_slots: tuple[int, ...] = ()
        self.decode_slots: tuple[int, ...] = ()

    def ask_decode(self) -> None:
        """Send the decode side's ``Reserve``."""
        num_tokens = len(self.prompt.tokens)
        self.router.send(self.decode, Reserve(self.key, "decode", num_tokens, self.prefill.peer()))

    def reserve_decode(self) -> None:
        self.ask_decode()
        self.decode_slots = self.router.expect(self.decode, Reserved, self.key).slots

    def reserve_prefill(self) -> None:
        num_tokens = len(self.prompt.tokens)
        peer = self.decode.peer(self.decode_slots)
        self.router.send(self.prefill, Reserve(self.key, "prefill", num_tokens, peer))
        self.prefill_slots = self.router.expect(self.prefill, Reserved, self.key).slots

    def reserve(self) -> None:
        self.reserve_decode()
        self.reserve_prefill()

    def stage(self, split: int, num_hit_blocks: int, num_releases: int = 1) -> None:
        """The prefill side reads ``[0, split)``, the decode side the rest."""
        self.stage_at(self.prefill, split, num_hit_blocks, num_releases)
        self.stage_at(self.decode, split, num_hit_blocks, num_releases)

    def stage_at(
        self,
        mover: MoverProcess,
        split: int,
        num_hit_blocks: int,
        num_releases: int = 1,
        peer: Peer | None = None,
    ) -> None:
        at_prefill = mover is self.prefill
        peer = peer or (
            self.decode.peer(self.decode_slots)
            if at_prefill
            else self.prefill.peer(self.prefill_slots)
        )
        segments = [
            SegmentSpec(self.prefill.engine_id, 0, split),
            SegmentSpec(self.decode.engine_id, split, num_hit_blocks),
        ]
        message = Stage(
            key=self.key,
            pool="prefill" if at_prefill else "decode",
            num_tokens=len(self.prompt.tokens),
            num_hit_blocks=num_hit_blocks,
            root=ROOT,
            block_hashes=self.prompt.hashes,
            digest=self.prompt.digest,
            segments=tuple(each for each in segments if each.first_block < each.last_block),
            peer=peer,
            num_releases=num_releases,
        )
        self.router.send(mover, message)

    def end(self, mover: MoverProcess, drain: bool) -> None:
        self.router.send(mover, End(self.key, drain, "test"))

    def assert_staged(self, claimed: ClaimedTransfer, mover: MoverProcess, num_blocks: int) -> None:
        """The leading blocks in the slots are byte for byte what they shall be."""
        expected = self.prompt.expected_blocks()
        for block in range(num_blocks):
            assert mover.engine.slot(claimed.slots[block]) == expected[block], f"block {block}"

    def assert_whole(self, claimed: ClaimedTransfer, mover: MoverProcess) -> None:
        """Every page of the prompt is in the slots; what lies beyond its last token is not."""
        blocks = self.prompt.expected_blocks()
        per_block = GEOMETRY.pages_per_block
        for layer in range(GEOMETRY.num_layers):
            for page in range(self.prompt.num_pages):
                block, in_block = divmod(page, per_block)
                start = GEOMETRY.page_offset(layer, in_block)
                end = start + GEOMETRY.layer_page_bytes[layer]
                found = mover.engine.slot(claimed.slots[block])[start:end]
                assert found == blocks[block][start:end], f"layer {layer} page {page}"
