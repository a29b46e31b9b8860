"""The storage queue over a store with threads of its own, and over one without."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mover.material import (
    FINGERPRINT,
    GEOMETRY,
    ROOT,
    block_path,
    block_payload,
    make_pipe,
    release_pipe,
)
from tests.mover.rig import MemoryStore
from vllm_dualpath.errors import BlockCorrupt, BlockNotFound
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.mover.storage_queue import IoTask, StorageQueue
from vllm_dualpath.storage import IoOptions, PosixStore, ReadBlock, WriteBlock

HASHES = [bytes([idx]) * 32 for idx in range(40)]


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture(params=["io_uring", "threads", "memory"])
def store(request: pytest.FixtureRequest, store_dir: Path) -> Any:
    if request.param == "memory":
        return MemoryStore()
    options = IoOptions(request.param, num_threads=1, depth=4)
    return PosixStore(f"file://{store_dir}", FINGERPRINT, GEOMETRY, io=options)


@pytest.fixture
def storage(store: Any, loop: EventLoop) -> Iterator[StorageQueue]:
    queue = StorageQueue(store, loop, num_threads=1)
    yield queue
    queue.close()
    if isinstance(store, PosixStore):
        store.close()


def slot(content: bytes = b"") -> memoryview:
    view = memoryview(mmap.mmap(-1, GEOMETRY.slot_bytes))
    view[: len(content)] = content
    return view


def run(loop: EventLoop, storage: StorageQueue) -> None:
    """Serve the loop until the queue is empty."""
    timer = loop.call_later(20.0, lambda: pytest.fail(f"{storage.num_open} tasks never ended"))
    while storage.num_open:
        loop.run_once()
    timer.cancel()


def store_blocks(loop: EventLoop, storage: StorageQueue, num_blocks: int) -> None:
    tasks = [
        IoTask(WriteBlock(each, ROOT, slot(block_payload(each))), lambda _task: None)
        for each in HASHES[:num_blocks]
    ]
    for task in tasks:
        storage.submit_write(task)
    run(loop, storage)
    assert all(task.num_bytes >= GEOMETRY.slot_bytes for task in tasks)


def test_blocks_written_are_read_back(loop: EventLoop, storage: StorageQueue) -> None:
    """Each task ends once, on the loop, with its bytes in its own slot."""
    store_blocks(loop, storage, 40)
    ended: list[IoTask] = []
    slots = [slot() for _ in HASHES]
    tasks = [
        IoTask(ReadBlock(each, view), ended.append, num_tokens=8)
        for each, view in zip(HASHES, slots, strict=True)
    ]
    for task in tasks:
        storage.submit_read(task)
    assert storage.read_queue_tokens == 8 * 40
    run(loop, storage)
    assert len(ended) == 40
    assert set(map(id, ended)) == set(map(id, tasks))
    assert [bytes(view) for view in slots] == [block_payload(each) for each in HASHES]
    assert storage.read_queue_tokens == 0


def test_a_missing_block_is_an_error_of_its_task_only(
    loop: EventLoop, storage: StorageQueue
) -> None:
    store_blocks(loop, storage, 1)
    tasks = [IoTask(ReadBlock(each, slot()), lambda _task: None) for each in HASHES[:2]]
    for task in tasks:
        storage.submit_read(task)
    run(loop, storage)
    assert tasks[0].error is None
    assert isinstance(tasks[1].error, BlockNotFound)


def test_a_bad_block_is_gone_before_its_task_ends(
    loop: EventLoop, storage: StorageQueue, store: Any, store_dir: Path
) -> None:
    """Whoever hears of it may store the block again at once."""
    if isinstance(store, MemoryStore):
        pytest.skip("nothing in memory is ever corrupt")
    store_blocks(loop, storage, 1)
    path = block_path(store_dir, HASHES[0])
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    seen: list[bool] = []
    task = IoTask(ReadBlock(HASHES[0], slot()), lambda _task: seen.append(path.exists()))
    storage.submit_read(task)
    run(loop, storage)
    assert isinstance(task.error, BlockCorrupt)
    assert seen == [False]
    store_blocks(loop, storage, 1)


def test_other_calls_run_and_their_errors_are_kept(loop: EventLoop, storage: StorageQueue) -> None:
    """A removal or a scan returns a number; what it raises unexpectedly is no crash."""
    good = IoTask(lambda: 7, lambda _task: None)
    bad = IoTask(lambda: 1 // 0, lambda _task: None)
    for task in (good, bad):
        storage.submit_write(task)
    run(loop, storage)
    assert (good.num_bytes, good.error) == (7, None)
    assert "ZeroDivisionError" in str(bad.error)


def test_what_waits_is_cancelled_and_what_runs_is_stalled(loop: EventLoop, store_dir: Path) -> None:
    """Behind a read that hangs on the only thread, the next ends as cancelled, at once."""
    store = PosixStore(
        f"file://{store_dir}", FINGERPRINT, GEOMETRY, io=IoOptions("threads", num_threads=1)
    )
    storage = StorageQueue(store, loop)
    store_blocks(loop, storage, 2)
    pipe = make_pipe(store_dir, HASHES[0])
    ended: list[IoTask] = []
    hung, waiting = (IoTask(ReadBlock(each, slot()), ended.append) for each in HASHES[:2])
    try:
        storage.submit_read(hung)
        storage.submit_read(waiting)
        while not storage.stalled_reads(loop.now_s() + 5, 1.0) or hung.started_s is None:
            loop.call_later(0.001, lambda: None)
            loop.run_once()
        assert set(storage.stalled_reads(loop.now_s() + 5, 1.0)) == {hung, waiting}
        assert waiting.started_s is None
        assert storage.stalled_reads(loop.now_s(), 60.0) == []
        storage.cancel(waiting)
        storage.cancel(hung)
        while not ended:
            loop.run_once()
        assert ended == [waiting]
        assert waiting.cancelled
        assert not hung.cancelled
    finally:
        release_pipe(pipe)
    run(loop, storage)
    assert ended == [waiting, hung]
    storage.close()
    store.close()


def test_closing_finishes_writes(loop: EventLoop, store: Any) -> None:
    """What was handed over for storing is stored, though nobody runs the loop any more."""
    storage = StorageQueue(store, loop, num_threads=1)
    ended: list[IoTask] = []
    for each in HASHES[:10]:
        storage.submit_write(
            IoTask(WriteBlock(each, ROOT, slot(block_payload(each))), ended.append)
        )
    storage.close()
    assert [task.error for task in ended] == [None] * 10
    for each in HASHES[:10]:
        store.get(each, slot())
