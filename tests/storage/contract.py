"""What every store must do. A test class per store inherits ``StoreContract``."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import BlockCorrupt, BlockNotFound
from vllm_dualpath.storage import BlockStore

GEOMETRY = Geometry(
    block_tokens=64,
    page_tokens=16,
    layer_page_bytes=(512, 768, 1024),
    layout="LBHNC",
    kv_heads=2,
    kv_dtype="bfloat16",
)
OTHER_GEOMETRY = Geometry(64, 16, (512, 1024, 768), "LBHNC", 2, "bfloat16")
FINGERPRINT = hashlib.sha256(b"a model").digest()
HEADER_BYTES = 4096
FILE_BYTES = HEADER_BYTES + GEOMETRY.slot_bytes

OpenStore = Callable[[], BlockStore]


def block_hash(idx: int) -> bytes:
    return hashlib.sha256(b"block" + idx.to_bytes(8, "little")).digest()


def empty_payload(geometry: Geometry = GEOMETRY) -> memoryview:
    return memoryview(mmap.mmap(-1, geometry.slot_bytes))


def filled_payload(seed: int, geometry: Geometry = GEOMETRY) -> memoryview:
    payload = empty_payload(geometry)
    payload[: geometry.payload_bytes] = random.Random(seed).randbytes(geometry.payload_bytes)
    return payload


def put_chain(store: BlockStore, num_blocks: int) -> list[bytes]:
    """Store blocks 0.. as one chain and return their hashes."""
    hashes = [block_hash(idx) for idx in range(num_blocks)]
    for idx, name in enumerate(hashes):
        store.put(name, hashes[idx - 1] if idx else bytes(32), filled_payload(idx))
    return hashes


def put_many(open_store: OpenStore, num_rounds: int, barrier: Barrier) -> None:
    """One of several processes that all store the same blocks at the same time."""
    store = open_store()
    for idx in range(num_rounds):
        barrier.wait(timeout=20)
        store.put(block_hash(idx), bytes(32), filled_payload(idx))
    store.close()


class StoreContract(ABC):
    """Fixtures to override: ``open_store`` opens the same store each time it is called."""

    @pytest.fixture
    @abstractmethod
    def open_store(self, tmp_path: Path) -> OpenStore: ...

    @pytest.fixture
    def store(self, open_store: OpenStore) -> BlockStore:
        return open_store()

    def test_a_block_comes_back_as_it_went_in(self, store: BlockStore) -> None:
        payload = filled_payload(1)
        assert store.put(block_hash(1), bytes(32), payload) == FILE_BYTES
        found = empty_payload()
        assert store.get(block_hash(1), found) == FILE_BYTES
        assert found == payload

    def test_another_instance_sees_the_block(self, open_store: OpenStore) -> None:
        open_store().put(block_hash(1), bytes(32), filled_payload(1))
        other = open_store()
        assert other.contains(block_hash(1))
        other.get(block_hash(1), empty_payload())

    def test_a_block_that_is_there_is_not_written_again(self, store: BlockStore) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        assert store.put(block_hash(1), bytes(32), filled_payload(2)) == 0
        found = empty_payload()
        store.get(block_hash(1), found)
        assert found == filled_payload(1)

    def test_an_unknown_block_is_not_found(self, store: BlockStore) -> None:
        assert not store.contains(block_hash(1))
        with pytest.raises(BlockNotFound, match=block_hash(1).hex()):
            store.get(block_hash(1), empty_payload())

    def test_a_removed_block_is_gone_and_its_bytes_are_freed(self, store: BlockStore) -> None:
        put_chain(store, 2)
        assert store.remove(block_hash(0)) == FILE_BYTES
        assert store.remove(block_hash(0)) == 0
        assert not store.contains(block_hash(0))
        assert [entry.hash for entry in store.entries()] == [block_hash(1)]

    def test_entries_tell_parent_and_size_of_every_block(self, store: BlockStore) -> None:
        hashes = put_chain(store, 20)
        entries = {entry.hash: entry for entry in store.entries()}
        assert set(entries) == set(hashes)
        for parent, child in zip([bytes(32), *hashes], hashes, strict=False):
            assert entries[child].parent == parent
            assert entries[child].num_bytes == FILE_BYTES

    def test_a_payload_of_another_size_is_refused(self, store: BlockStore) -> None:
        with pytest.raises(ValueError, match="payload"):
            store.put(block_hash(1), bytes(32), filled_payload(1)[:-1])
        with pytest.raises(ValueError, match="payload"):
            store.get(block_hash(1), empty_payload()[:-1])

    def test_concurrent_writers_of_the_same_blocks_leave_each_whole(
        self, open_store: OpenStore
    ) -> None:
        num_rounds, context = 20, multiprocessing.get_context("fork")
        barrier = context.Barrier(3)
        writers = [
            context.Process(target=put_many, args=(open_store, num_rounds, barrier))
            for _ in range(3)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(timeout=30)
        assert [writer.exitcode for writer in writers] == [0, 0, 0]
        store, found = open_store(), empty_payload()
        for idx in range(num_rounds):
            store.get(block_hash(idx), found)
            assert found == filled_payload(idx)
        assert len(list(store.entries())) == num_rounds

    def test_one_owner_at_a_time_holds_the_eviction_lease(self, open_store: OpenStore) -> None:
        first, second = open_store(), open_store()
        assert first.acquire_eviction_lease("a", 60)
        assert not second.acquire_eviction_lease("b", 60)
        assert first.acquire_eviction_lease("a", 0)
        assert second.acquire_eviction_lease("b", 60)
        assert not first.acquire_eviction_lease("a", 60)

    def test_of_many_that_want_the_lease_at_once_one_gets_it(self, store: BlockStore) -> None:
        barrier = threading.Barrier(6)

        def compete(owner: int) -> bool:
            barrier.wait(timeout=20)
            return store.acquire_eviction_lease(str(owner), 60)

        with ThreadPoolExecutor(6) as threads:
            for _ in range(10):
                won = list(threads.map(compete, range(6)))
                assert sum(won) == 1
                assert store.acquire_eviction_lease(str(won.index(True)), 0)


def assert_quarantined(store: BlockStore, name: bytes, *, match: str) -> None:
    """A read fails with ``match``, and the block is not found again."""
    with pytest.raises(BlockCorrupt, match=match):
        store.get(name, empty_payload())
    assert not store.contains(name)
    with pytest.raises(BlockNotFound):
        store.get(name, empty_payload())
