"""The cluster's state: the engines, who may work with whom, what is stored, what is open.

Owned by the event loop's thread. Says nothing on its own: ``movers.py`` carries the messages that
follow from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from vllm_dualpath.messages import PROTOCOL_VERSION, Hello, Message, TransferKey
from vllm_dualpath.router.engine import Engine, check_url
from vllm_dualpath.router.roster import EngineSpeed, Roster
from vllm_dualpath.router.stores import Stores
from vllm_dualpath.router.transfer import Transfer

logger = logging.getLogger(__name__)


class Cluster:
    """See the module's docstring."""

    def __init__(self, speed: EngineSpeed = EngineSpeed()) -> None:  # noqa: B008 # frozen
        self._speed = speed
        self.stores = Stores()
        self.transfers: dict[TransferKey, Transfer] = {}
        self.rejected_messages = 0
        self._engines: dict[str, Engine] = {}
        self._by_boot_id: dict[bytes, Engine] = {}
        self._silent_decode: dict[str, Engine] = {}
        self._pinned: Counter[bytes] = Counter()
        self._changed = asyncio.Event()
        self._roster: Roster | None = None
        self._num_asked = 0
        self.on_room: Callable[[], None] = lambda: None
        """Called whenever an engine may take more than before, or there are other engines."""

    # --- engines ---

    @property
    def roster(self) -> Roster:
        """The engines as they are now; another one after each change."""
        if self._roster is None:
            self._roster = Roster(self._engines.values(), self._speed)
        return self._roster

    @property
    def engines(self) -> list[Engine]:
        """Live engines, by id."""
        return self.roster.engines

    def usable(self, role: str) -> list[Engine]:
        """Live engines of a role whose HTTP server answers, by id."""
        return self.roster.usable[role]

    def set_serving(self, engine: Engine, serving: bool) -> None:
        """Its HTTP server answers, or does not. ``notify`` tells those who wait for it."""
        engine.serving = serving
        self._roster = None

    def by_boot_id(self, boot_id: bytes) -> Engine | None:
        return self._by_boot_id.get(boot_id)

    def by_id(self, engine_id: str) -> Engine | None:
        return self._engines.get(engine_id)

    def refusal(self, hello: Hello) -> str:
        """Why this mover may not join; empty when it may."""
        if hello.version != PROTOCOL_VERSION:
            return f"protocol version: expected {PROTOCOL_VERSION}, found {hello.version}"
        if hello.role not in ("prefill", "decode"):
            return f"role: expected prefill or decode, found {hello.role!r}"
        try:
            hello.geometry.to_geometry()
            check_url(hello.url)
        except ValueError as exc:
            return str(exc)
        known = self._engines.values()
        others = (engine for engine in known if engine.engine_id != hello.engine_id)
        other = next(others, None)
        return "" if other is None else _difference(other.hello, hello)

    def join(self, hello: Hello, now_s: float) -> Engine:
        """Take in an engine, or what it says anew. An earlier run of it must have left before."""
        engine = self._engines.get(hello.engine_id)
        if engine is None:
            engine = Engine(hello, now_s, self._room_changed)
            self._silent_decode.pop(hello.engine_id, None)
            self._engines[hello.engine_id] = engine
            self._by_boot_id[hello.boot_id] = engine
        engine.hello = hello
        engine.last_seen_s = now_s
        self.notify()
        return engine

    def leave(self, engine: Engine, *, silently: bool = False) -> None:
        """Take an engine out; its transfers fail.

        A decode engine whose mover fell silent may still serve without one: it is a last resort.
        """
        engine.lost.set()
        if silently and engine.role == "decode":
            self._silent_decode[engine.engine_id] = engine
        self._by_boot_id.pop(engine.boot_id, None)
        if self._engines.get(engine.engine_id) is engine:
            del self._engines[engine.engine_id]
        self._roster = None
        engine.seen_in(None)
        for transfer in list(self.transfers.values()):
            transfer.engine_lost(engine)
        self.stores.forget_unwatched(self._engines.values())
        self.notify()

    def silent(self, now_s: float, limit_s: float) -> list[Engine]:
        """Engines whose last heartbeat is older than ``limit_s``."""
        return [engine for engine in self.engines if now_s - engine.last_seen_s > limit_s]

    def excuse_silence(self, duration_s: float) -> None:
        """Let ``duration_s`` of every engine's silence not count."""
        for engine in self._engines.values():
            engine.last_seen_s += max(0.0, duration_s)

    def notify(self) -> None:
        """The engines are others than before: wake whoever waits for one."""
        self._roster = None
        self.on_room()
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_decode(self, timeout_s: float) -> bool:
        """Wait until a decode engine serves; False when none came in time."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        while not self.usable("decode"):
            left_s = ends_s - loop.time()
            if left_s <= 0:
                return False
            await self.wait_for_change(left_s)
        return True

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until an engine came, went or began to serve, at most ``timeout_s``."""
        # Not wait_for: until Python 3.12 it forgets a cancellation that meets a change.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    # --- planning ---

    def _room_changed(self) -> None:
        self.on_room()

    def some_decode(self) -> Engine | None:
        """A decode engine to ask something of: all in turn, whatever their load."""
        serving = self.usable("decode")
        if not serving:
            return self.least_loaded_decode()
        engine = serving[self._num_asked % len(serving)]
        self._num_asked += 1
        return engine

    def least_loaded_decode(self, excluded: Iterable[Engine] = ()) -> Engine | None:
        """Where a request goes that no transfer serves."""
        left_out = set(excluded)
        serving = self.usable("decode") or list(self._silent_decode.values())
        candidates = [engine for engine in serving if engine not in left_out]
        return min(
            candidates, key=lambda e: (e.num_tokens, e.num_requests, e.engine_id), default=None
        )

    # --- transfers ---

    def open(self, transfer: Transfer) -> None:
        self.transfers[transfer.key] = transfer
        self._pinned.update(transfer.prompt.block_hashes)

    def close(self, transfer: Transfer, *, drain: bool, reason: str) -> None:
        """The plan is over for the router: end it at every mover; its blocks may be evicted."""
        transfer.end(drain=drain, reason=reason)
        if transfer.finished:
            self.transfers.pop(transfer.key, None)
        self._pinned.subtract(transfer.prompt.block_hashes)
        for block_hash in transfer.prompt.block_hashes:
            if self._pinned[block_hash] <= 0:
                del self._pinned[block_hash]

    def is_pinned(self, block_hash: bytes) -> bool:
        return block_hash in self._pinned

    def deliver(self, sender: Engine, key: TransferKey, message: Message) -> None:
        """Give a mover's message to the transfer it is about, if it takes part in it."""
        transfer = self.transfers.get(key)
        if transfer is None or sender not in transfer.movers:
            logger.debug("%s about unknown transfer %s", type(message).__name__, key)
            return
        transfer.on_message(sender, message)
        if transfer.finished:
            self.transfers.pop(key, None)

    def forget_finished(self) -> None:
        for key in [key for key, transfer in self.transfers.items() if transfer.finished]:
            del self.transfers[key]


def _difference(expected: Hello, found: Hello) -> str:
    """What keeps two engines from serving one model behind one router; empty when nothing does."""
    for name in ("model", "fingerprint", "geometry"):
        left, right = getattr(expected, name), getattr(found, name)
        if left != right:
            left, right = (v.hex()[:16] if isinstance(v, bytes) else v for v in (left, right))
            return (
                f"{name}: expected {left} as {expected.engine_id} has, found {right} at"
                f" {found.engine_id}; one router serves one model with one block size"
            )
    return ""
