"""A naive index that is plainly right, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_dualpath.storage.base import BlockEntry


class NaiveIndex:
    """A dictionary, scanned in full for everything."""

    def __init__(self) -> None:
        self.entries: dict[bytes, BlockEntry] = {}
        self.hidden: set[bytes] = set()

    def add(self, entry: BlockEntry) -> None:
        self.hidden.discard(entry.hash)
        known = self.entries.get(entry.hash, entry)
        self.entries[entry.hash] = replace(
            known, last_used_s=max(known.last_used_s, entry.last_used_s)
        )

    def remove(self, block_hash: bytes) -> None:
        self.entries.pop(block_hash, None)
        self.hidden.discard(block_hash)

    def hide(self, block_hash: bytes) -> None:
        if block_hash in self.entries:
            self.hidden.add(block_hash)

    def longest_prefix(self, hashes: Sequence[bytes], now_s: float) -> int:
        num_found = 0
        for block_hash in hashes:
            if block_hash not in self.entries or block_hash in self.hidden:
                break
            self.add(replace(self.entries[block_hash], last_used_s=now_s))
            num_found += 1
        return num_found

    def total_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def choose_victims(self, quota_bytes: int, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        left, victims = dict(self.entries), []
        while sum(entry.num_bytes for entry in left.values()) > quota_bytes:
            parents = {entry.parent for entry in left.values()}
            leaves = [
                entry
                for entry in left.values()
                if entry.hash not in parents and not is_pinned(entry.hash)
            ]
            if not leaves:
                break
            victim = min(leaves, key=lambda entry: (entry.last_used_s, entry.hash))
            victims.append(victim.hash)
            del left[victim.hash]
        return victims
