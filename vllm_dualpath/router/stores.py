"""The cluster's knowledge of what is stored: one hit index per (store, model), kept by events.

An index starts with one mover's snapshot and follows ``Stored`` and ``Dropped`` of all. It is a
cache: an entry that is wrong costs a short hit, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_dualpath.index import HitIndex
from vllm_dualpath.messages import Dropped, Evict, Hello, Stored
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.storage.base import BlockEntry

_EVICT_HASHES_PER_MESSAGE = 4096
_EVICT_TO_FRACTION = 0.95
"""Evict a little below the quota, so that not every stored block costs a message of its own."""


class StoreKey(NamedTuple):
    """One store of one model's blocks."""

    store: str
    fingerprint: bytes

    @classmethod
    def of(cls, hello: Hello) -> StoreKey:
        return cls(hello.store, hello.fingerprint)


class StoreState:
    """One store's index, and who is asked for its content."""

    def __init__(self) -> None:
        self.index = HitIndex()
        self.snapshot_from: Engine | None = None
        self.snapshot_done = False

    def needs_snapshot(self, from_engine: Engine) -> bool:
        """Whether nobody else is giving, or has given, the store's content."""
        source = self.snapshot_from
        free = source is None or source is from_engine or source.lost.is_set()
        return free and not self.snapshot_done

    def doubt(self) -> None:
        """Messages about the store were lost: its content has to be told again."""
        if self.snapshot_done:
            self.snapshot_done = False
            self.snapshot_from = None

    def begin_snapshot(self, source: Engine) -> None:
        self.snapshot_from = source


class Stores:
    """All stores that registered engines name."""

    def __init__(self) -> None:
        self._states: dict[StoreKey, StoreState] = {}

    def state(self, hello: Hello) -> StoreState:
        return self._states.setdefault(StoreKey.of(hello), StoreState())

    def stored(self, source: Engine, message: Stored) -> None:
        index = self.state(source.hello).index
        for block in message.blocks:
            index.add(BlockEntry(block.hash, block.parent, block.num_bytes, block.last_used_s))

    def dropped(self, source: Engine, message: Dropped) -> None:
        index = self.state(source.hello).index
        for block_hash in message.hashes:
            if message.gone:
                index.remove(block_hash)
            else:
                index.hide(block_hash)

    def snapshot_ended(self, source: Engine) -> None:
        state = self.state(source.hello)
        if state.snapshot_from is source:
            state.snapshot_done = True

    def forget_unwatched(self, engines: Iterable[Engine]) -> None:
        """Drop indexes of stores without a live engine: their movers' events would be missed."""
        watched = {StoreKey.of(engine.hello) for engine in engines}
        for key in [key for key in self._states if key not in watched]:
            del self._states[key]

    def evictions(self, source: Engine, is_pinned: Callable[[bytes], bool]) -> list[Evict]:
        """Orders that bring ``source``'s store below its quota.

        The index forgets the blocks at once, so that no later plan counts on them.
        """
        quota_bytes = source.hello.store_quota_bytes
        index = self.state(source.hello).index
        if quota_bytes is None or index.total_bytes <= quota_bytes:
            return []
        victims = index.choose_victims(int(quota_bytes * _EVICT_TO_FRACTION), is_pinned)
        for block_hash in victims:
            index.remove(block_hash)
        step = _EVICT_HASHES_PER_MESSAGE
        return [
            Evict(tuple(victims[start : start + step])) for start in range(0, len(victims), step)
        ]

    @property
    def num_blocks(self) -> int:
        return sum(len(state.index) for state in self._states.values())

    @property
    def num_pending(self) -> int:
        """Stores whose content is not known completely yet."""
        return sum(not state.snapshot_done for state in self._states.values())

    @property
    def total_bytes(self) -> int:
        return sum(state.index.total_bytes for state in self._states.values())
