from __future__ import annotations

import hashlib
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_dualpath.index import HitIndex
from vllm_dualpath.storage.base import BlockEntry

from .model import NaiveIndex

NUM_NODES = 24
ROOT = bytes(32)


def name(node: int) -> bytes:
    """Node 0 is the chain's root, which is never stored; the others form a binary tree below it."""
    return ROOT if node == 0 else hashlib.sha256(node.to_bytes(2, "little")).digest()


def parent(node: int) -> int:
    return (node - 1) // 2


def path_to(node: int) -> list[bytes]:
    hashes: list[bytes] = []
    while node:
        hashes.insert(0, name(node))
        node = parent(node)
    return hashes


def entry(node: int, last_used_s: float = 0.0, num_bytes: int = 10) -> BlockEntry:
    return BlockEntry(name(node), name(parent(node)), num_bytes, last_used_s)


def nothing_pinned(_block_hash: bytes) -> bool:
    return False


NODES = st.integers(1, 8)
"""Few, so that histories meet the same block again and again."""
TIMES = st.integers(0, 8).map(float)


class AgainstModel(RuleBasedStateMachine):
    """Any history of calls gives what a full scan would give."""

    def __init__(self) -> None:
        super().__init__()
        self.index = HitIndex()
        self.model = NaiveIndex()

    @rule(node=NODES)
    def hide(self, node: int) -> None:
        self.index.hide(name(node))
        self.model.hide(name(node))

    @rule(node=NODES, last_used_s=TIMES)
    def add(self, node: int, last_used_s: float) -> None:
        known = name(node) in self.model.entries
        assert self.index.add(entry(node, last_used_s, num_bytes=1 + node % 3)) is not known
        self.model.add(entry(node, last_used_s, num_bytes=1 + node % 3))

    @rule(node=NODES)
    def remove(self, node: int) -> None:
        assert self.index.remove(name(node)) is (name(node) in self.model.entries)
        self.model.remove(name(node))

    @rule(node=NODES, now_s=TIMES)
    def look_up(self, node: int, now_s: float) -> None:
        hashes = path_to(node)
        assert self.index.longest_prefix(hashes, now_s) == self.model.longest_prefix(hashes, now_s)

    @rule(quota=st.integers(0, 40), pinned=st.frozensets(NODES, max_size=4), remove=st.booleans())
    def evict(self, quota: int, pinned: frozenset[int], remove: bool) -> None:
        pinned_names = {name(node) for node in pinned}
        expected = self.model.choose_victims(quota, pinned_names.__contains__)
        assert self.index.choose_victims(quota, pinned_names.__contains__) == expected
        for victim in expected if remove else expected[:1]:
            self.index.remove(victim)
            self.model.remove(victim)

    @rule()
    def reload(self) -> None:
        self.index.replace_all(reversed(list(self.index.snapshot())))
        self.model.hidden.clear()

    @invariant()
    def holds_the_same(self) -> None:
        found = {item.hash: item for item in self.index.snapshot()}
        assert found == self.model.entries
        assert self.index.total_bytes == self.model.total_bytes()
        assert len(self.index) == len(self.model.entries)


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(order=st.permutations(range(1, NUM_NODES + 1)))
def test_the_order_in_which_blocks_are_learned_does_not_matter(order: list[int]) -> None:
    """A store lists its blocks in no particular order, children before parents at times."""
    index = HitIndex()
    for node in order:
        index.add(entry(node, last_used_s=float(node % 5)))
    sorted_index = HitIndex()
    sorted_index.replace_all(entry(node, float(node % 5)) for node in range(1, NUM_NODES + 1))
    assert index.choose_victims(30, nothing_pinned) == sorted_index.choose_victims(
        30, nothing_pinned
    )


def test_a_whole_chain_goes_in_one_call_from_its_end() -> None:
    index = HitIndex()
    index.replace_all(entry(node) for node in (1, 3, 7))
    assert index.choose_victims(0, nothing_pinned) == [name(7), name(3), name(1)]


def test_a_pinned_block_keeps_its_ancestors() -> None:
    index = HitIndex()
    index.replace_all(entry(node) for node in (1, 3, 4, 7))
    victims = index.choose_victims(0, {name(3)}.__contains__)
    assert victims == sorted([name(4), name(7)])


def test_a_parent_that_never_was_a_leaf_becomes_one_when_its_child_goes() -> None:
    index = HitIndex()
    index.replace_all(entry(node) for node in (3, 1))
    index.remove(name(3))
    assert index.choose_victims(0, nothing_pinned) == [name(1)]


def test_an_orphan_is_evicted_like_any_leaf() -> None:
    index = HitIndex()
    index.add(entry(7))
    assert index.longest_prefix(path_to(7), 1.0) == 0
    assert index.choose_victims(0, nothing_pinned) == [name(7)]


def test_a_later_change_does_not_show_in_a_snapshot() -> None:
    index = HitIndex()
    index.add(entry(1))
    snapshot = index.snapshot()
    index.remove(name(1))
    assert [item.hash for item in snapshot] == [name(1)]


def test_eviction_looks_at_few_blocks() -> None:
    """With 50,000 blocks in use, choosing one victim a thousand times takes no full scans."""
    index = HitIndex()
    index.replace_all(
        BlockEntry(idx.to_bytes(32, "little"), ROOT, 1, float(idx)) for idx in range(1, 50_001)
    )
    start_s = time.perf_counter()
    for _ in range(1000):
        (victim,) = index.choose_victims(index.total_bytes - 1, nothing_pinned)
        index.remove(victim)
    assert time.perf_counter() - start_s < 2.0


def test_blocks_that_come_and_go_leave_no_memory_behind() -> None:
    index = HitIndex()
    for round_idx in range(5000):
        index.add(entry(1, last_used_s=float(round_idx)))
        index.remove(name(1))
    assert len(index._heap) < 200
