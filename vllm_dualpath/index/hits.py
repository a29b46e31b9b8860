"""What is stored: a prefix trie of Full Blocks by chain hash, and what to evict first.

A chain hash covers its whole prefix, so the trie needs no edges: a node is found by its hash, and
its parent's hash and the number of its stored children give the order of eviction. Time is passed
in. Knows no store and no requests.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_dualpath.storage.base import BlockEntry

_HeapItem = tuple[float, bytes, int]


@dataclass(slots=True)
class _Node:
    parent: bytes
    num_bytes: int
    last_used_s: float
    serial: int
    """Tells a node from an earlier one of the same hash that the heap still names."""
    queued: bool = False
    """Whether the heap holds an item of this node."""
    hidden: bool = False
    """Stored, but reading it failed: no hit until it is stored again."""


class HitIndex:
    """The blocks of one store. Owned by one thread; nothing here blocks.

    A block whose parent is not stored (evicted by somebody else, or not yet seen) is kept: it is a
    leaf like any other unless it has children.

    Only leaves need a place in the heap of eviction candidates. A touch does not move its item: an
    item's time is a lower bound of its node's, put right when the item comes to the top. So a touch
    costs nothing and every other step O(log n), amortised over the touches.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._num_children: Counter[bytes] = Counter()
        self._heap: list[_HeapItem] = []
        self._total_bytes = 0
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._nodes

    @property
    def total_bytes(self) -> int:
        """What all blocks take in the store."""
        return self._total_bytes

    def add(self, entry: BlockEntry) -> bool:
        """Learn of a stored block; of a known one only a later use. Returns whether it was new."""
        node = self._nodes.get(entry.hash)
        if node is not None:
            node.last_used_s = max(node.last_used_s, entry.last_used_s)
            node.hidden = False
            return False
        node = _Node(entry.parent, entry.num_bytes, entry.last_used_s, self._next_serial)
        self._next_serial += 1
        self._nodes[entry.hash] = node
        self._num_children[entry.parent] += 1
        self._total_bytes += entry.num_bytes
        if entry.hash not in self._num_children:
            self._queue(entry.hash, node)
        return True

    def remove(self, block_hash: bytes) -> bool:
        """Forget a block; its children stay as orphans. Returns whether it was known."""
        node = self._nodes.pop(block_hash, None)
        if node is None:
            return False
        self._total_bytes -= node.num_bytes
        self._num_children[node.parent] -= 1
        if self._num_children[node.parent] == 0:
            del self._num_children[node.parent]
            self._queue_if_known(node.parent)
        if len(self._heap) > 2 * len(self._nodes) + 64:
            self._rebuild_heap()
        return True

    def hide(self, block_hash: bytes) -> None:
        """A block takes its place in the store but cannot be read: no hit until added anew."""
        node = self._nodes.get(block_hash)
        if node is not None:
            node.hidden = True

    def longest_prefix(self, hashes: Sequence[bytes], now_s: float) -> int:
        """How many leading ``hashes`` are stored; counts as a use of each of those at ``now_s``."""
        nodes = self._nodes
        for num_found, block_hash in enumerate(hashes):
            node = nodes.get(block_hash)
            if node is None or node.hidden:
                return num_found
            if node.last_used_s < now_s:
                node.last_used_s = now_s
        return len(hashes)

    def replace_all(self, entries: Iterable[BlockEntry]) -> None:
        """Forget everything and learn ``entries``, e.g. after a new look at the store."""
        known = list(entries)
        self._nodes.clear()
        self._num_children.clear()
        self._heap.clear()
        self._total_bytes = 0
        for entry in known:
            self.add(entry)

    def snapshot(self) -> Iterator[BlockEntry]:
        """Every block as it is known now, in the order learned; later changes do not show."""
        return iter(
            [
                BlockEntry(block_hash, node.parent, node.num_bytes, node.last_used_s)
                for block_hash, node in self._nodes.items()
            ]
        )

    def choose_victims(self, quota_bytes: int, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        """What to evict so that ``quota_bytes`` hold the rest, in the order to evict it.

        Least recently used first, children before their parents, ties by hash. A pinned block and
        its ancestors are never chosen, so the rest may exceed the quota. Nothing is removed here:
        the caller calls ``remove`` for each, and may do so for a part of them.
        """
        victims: list[bytes] = []
        popped: list[bytes] = []
        evicted_children: Counter[bytes] = Counter()
        excess_bytes = self._total_bytes - quota_bytes
        while excess_bytes > 0:
            block_hash = self._pop_leaf(evicted_children)
            if block_hash is None:
                break
            popped.append(block_hash)
            if is_pinned(block_hash):
                continue
            victims.append(block_hash)
            node = self._nodes[block_hash]
            excess_bytes -= node.num_bytes
            evicted_children[node.parent] += 1
            if evicted_children[node.parent] == self._num_children[node.parent]:
                self._queue_if_known(node.parent)
        for block_hash in popped:
            self._queue_if_known(block_hash)
        return victims

    def _pop_leaf(self, evicted_children: Counter[bytes]) -> bytes | None:
        """Take the least recently used node whose children are all evicted, if there is one."""
        while self._heap:
            item_s, block_hash, serial = heapq.heappop(self._heap)
            node = self._nodes.get(block_hash)
            if node is None or node.serial != serial:
                continue  # an earlier node of this hash, removed since
            node.queued = False
            if self._num_children.get(block_hash, 0) > evicted_children.get(block_hash, 0):
                continue  # got a child; the removal of its last one queues it again
            if item_s == node.last_used_s:
                return block_hash
            self._queue(block_hash, node)  # used since
        return None

    def _queue_if_known(self, block_hash: bytes) -> None:
        node = self._nodes.get(block_hash)
        if node is not None:
            self._queue(block_hash, node)

    def _queue(self, block_hash: bytes, node: _Node) -> None:
        if not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.last_used_s, block_hash, node.serial))

    def _rebuild_heap(self) -> None:
        """Drop the items of removed nodes, of which there are more than of others."""
        self._heap.clear()
        for block_hash, node in self._nodes.items():
            node.queued = block_hash not in self._num_children
            if node.queued:
                self._heap.append((node.last_used_s, block_hash, node.serial))
        heapq.heapify(self._heap)
