"""The cluster's state: the engines, who may work with whom, what is stored, what is open.

Owned by the event loop's thread. Says nothing on its own: ``movers.py`` carries the messages that
follow from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable

from vllm_dualpath.messages import PROTOCOL_VERSION, Hello, Message, TransferKey
from vllm_dualpath.policy import ClusterSnapshot
from vllm_dualpath.router.engine import Engine, check_url
from vllm_dualpath.router.stores import Stores
from vllm_dualpath.router.transfer import Transfer

logger = logging.getLogger(__name__)

PairGroup = tuple[str, bytes, bytes]
"""(store, fingerprint, root): engines that may share KV. A weight reset makes another root."""


class Cluster:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.stores = Stores()
        self.transfers: dict[TransferKey, Transfer] = {}
        self.rejected_messages = 0
        self._engines: dict[str, Engine] = {}
        self._by_boot_id: dict[bytes, Engine] = {}
        self._silent_decode: dict[str, Engine] = {}
        self._pinned: Counter[bytes] = Counter()
        self._changed = asyncio.Event()

    # --- engines ---

    @property
    def engines(self) -> list[Engine]:
        """Live engines, by id."""
        return sorted(self._engines.values(), key=lambda engine: engine.engine_id)

    def usable(self, role: str) -> list[Engine]:
        """Live engines of a role whose HTTP server answers, by id."""
        return [engine for engine in self.engines if engine.role == role and engine.usable]

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
        others = (engine for engine in self.engines if engine.engine_id != hello.engine_id)
        other = next(others, None)
        return "" if other is None else _difference(other.hello, hello)

    def join(self, hello: Hello, now_s: float) -> Engine:
        """Take in an engine, or what it says anew. An earlier run of it must have left before."""
        engine = self._engines.get(hello.engine_id)
        if engine is None:
            engine = Engine(hello, now_s)
            self._silent_decode.pop(hello.engine_id, None)
            self._engines[hello.engine_id] = engine
            self._by_boot_id[hello.boot_id] = engine
            self.notify()
        engine.hello = hello
        engine.last_seen_s = now_s
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
        """Wake whoever waits for an engine."""
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
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    # --- planning ---

    def pair_groups(self) -> list[PairGroup]:
        """Groups with a prefill and a decode engine, the largest first."""
        sizes: Counter[PairGroup] = Counter()
        roles: dict[PairGroup, set[str]] = {}
        for engine in self.engines:
            if engine.usable:
                sizes[group_of(engine)] += 1
                roles.setdefault(group_of(engine), set()).add(engine.role)
        complete = [group for group in sizes if len(roles[group]) == 2]
        return sorted(complete, key=lambda group: (-sizes[group], group))

    def snapshot(self, group: PairGroup) -> ClusterSnapshot:
        """The policy's view of one group."""
        return ClusterSnapshot(
            *(
                tuple(e.load() for e in self.usable(role) if group_of(e) == group)
                for role in ("prefill", "decode")
            )
        )

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
        """The plan is over for the router: end it at both movers; its blocks may be evicted."""
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
        if transfer is None or sender not in (transfer.prefill, transfer.decode):
            logger.debug("%s about unknown transfer %s", type(message).__name__, key)
            return
        transfer.on_message(sender, message)
        if transfer.finished:
            self.transfers.pop(key, None)

    def forget_finished(self) -> None:
        for key in [key for key, transfer in self.transfers.items() if transfer.finished]:
            del self.transfers[key]


def group_of(engine: Engine) -> PairGroup:
    """The engines that ``engine`` may share KV with."""
    hello = engine.hello
    return hello.store, hello.fingerprint, hello.root


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
