"""An engine without a router: its mover keeps the index, loads, evicts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mover.material import (
    BLOCKING_IO,
    GEOMETRY,
    WAIT_S,
    Prompt,
    block_path,
    make_pipe,
    open_test_store,
    release_pipe,
    wait_for,
)
from tests.mover.scripted_engine import MoverProcess
from vllm_dualpath.index.shared import SharedIndexReader
from vllm_dualpath.messages import (
    LocalLoad,
    LocalLoadDone,
    LocalLoaded,
    LocalStats,
    Persist,
    PersistSlots,
)

QUOTA_BLOCKS = 6
FILE_BYTES = GEOMETRY.slot_bytes + 4096


@pytest.fixture(scope="module")
def module_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("local")
    (directory / "store").mkdir()
    return directory


@pytest.fixture(scope="module")
def stored(module_dir: Path) -> Prompt:
    """A prompt that is in the store when the mover starts."""
    prompt = Prompt(40, seed=1)
    prompt.store(module_dir / "store", 4)
    return prompt


@pytest.fixture(scope="module")
def mover(module_dir: Path, stored: Prompt) -> Iterator[MoverProcess]:
    mover = MoverProcess(
        module_dir,
        "local",
        "both",
        None,
        module_dir / "store",
        staging_bytes=12 * GEOMETRY.slot_bytes,
        store_quota_bytes=QUOTA_BLOCKS * FILE_BYTES,
        deadlines={"stage_s": 1.0},
        **BLOCKING_IO,
    )
    yield mover
    mover.close()
    mover.assert_clean_log()


def load(mover: MoverProcess, hashes: tuple[bytes, ...]) -> LocalLoaded:
    """Ask for blocks and wait for the answer."""
    request = LocalLoad(os.urandom(16), hashes)
    mover.engine.worker.send(request)
    return mover.engine.expect(LocalLoaded, lambda answer: answer.load_id == request.load_id)


def test_index_is_shared(mover: MoverProcess, stored: Prompt) -> None:
    """What the store holds at start can be looked up without asking."""
    index = SharedIndexReader(mover.engine.index_map)
    wait_for(lambda: index.longest_prefix(stored.hashes) == 4, "four blocks in the index")
    index.close()


def test_load(mover: MoverProcess, stored: Prompt) -> None:
    """Stored blocks are read into slots, which are free again when the engine says so."""
    answer = load(mover, stored.hashes[:4])
    assert answer.num_good == 4
    for slot, expected in zip(answer.slots, stored.expected_blocks(), strict=False):
        assert mover.engine.slot(slot) == expected
    mover.engine.worker.send(LocalLoadDone(answer.load_id))
    mover.engine.expect_idle()


def test_missing_block_is_a_short_load(mover: MoverProcess, stored: Prompt) -> None:
    """The answer names the good leading blocks; more than there are slots gives none."""
    answer = load(mover, stored.hashes)
    assert answer.num_good == 4
    mover.engine.worker.send(LocalLoadDone(answer.load_id))
    too_many = load(mover, stored.hashes[:1] * 50)
    assert (too_many.num_good, too_many.slots) == (0, ())
    mover.engine.worker.send(LocalLoadDone(too_many.load_id))
    mover.engine.expect_idle()


def test_loads_wait_for_slots(mover: MoverProcess, stored: Prompt) -> None:
    """A load without slots waits for another's; one given up while it waits is forgotten."""
    first = load(mover, stored.hashes[:4])
    second = load(mover, stored.hashes[:4])
    given_up, waiting = (LocalLoad(os.urandom(16), stored.hashes[:4]) for _ in range(2))
    mover.engine.worker.send(given_up)
    mover.engine.worker.send(waiting)
    mover.engine.worker.send(LocalLoadDone(given_up.load_id))
    mover.engine.worker.send(LocalLoadDone(first.load_id))
    answer = mover.engine.expect(LocalLoaded)
    assert (answer.load_id, answer.num_good) == (waiting.load_id, 4)
    for each in (second, answer):
        mover.engine.worker.send(LocalLoadDone(each.load_id))
    mover.engine.expect_idle()


def test_bad_requests_are_counted(mover: MoverProcess, stored: Prompt) -> None:
    """An id in use, an unknown id and an empty load are rejected; nothing else changes."""
    answer = load(mover, stored.hashes[:1])
    mover.engine.worker.send(LocalLoad(answer.load_id, stored.hashes[:1]))
    mover.engine.worker.send(LocalLoad(os.urandom(16), ()))
    mover.engine.worker.send(LocalLoadDone(os.urandom(16)))
    mover.engine.worker.send(LocalLoadDone(answer.load_id))
    mover.engine.expect(LocalStats, lambda each: each.idle and each.stats.rejected_messages == 3)


def test_stalled_load(mover: MoverProcess, module_dir: Path, stored: Prompt) -> None:
    """A read that hangs is given up after ``stage_s``; the slots come back when it returns."""
    path = block_path(module_dir / "store", stored.hashes[3])
    content = path.read_bytes()
    make_pipe(module_dir / "store", stored.hashes[3])
    try:
        before = time.monotonic()
        answer = load(mover, stored.hashes[:4])
        assert answer.num_good == 3
        assert 0.5 < time.monotonic() - before < 5
        mover.engine.worker.send(LocalLoadDone(answer.load_id))
        assert mover.engine.expect(LocalStats, lambda each: each.stats.slots_used == 4)
    finally:
        release_pipe(path)
    mover.engine.expect_idle()
    path.write_bytes(content)


def test_persist_and_evict(mover: MoverProcess, module_dir: Path, stored: Prompt) -> None:
    """Blocks persisted beyond the quota evict the least recently used, in store and index."""
    engine = mover.engine
    index = SharedIndexReader(engine.index_map)
    store = open_test_store(module_dir / "store")
    new = Prompt(48, seed=2)
    parents = (bytes(32), *new.hashes)
    slots: list[int] = []
    for block_hash, parent in zip(new.hashes[:5], parents, strict=False):
        while not slots:
            slots += engine.expect(PersistSlots).slots
        engine.worker.send(Persist(slots.pop(), block_hash, parent))
        wait_for(lambda block_hash=block_hash: store.contains(block_hash), "block is stored")
    wait_for(lambda: index.longest_prefix(new.hashes[:5]) == 5, "index learns of new blocks")
    wait_for(lambda: len(list(store.entries())) <= QUOTA_BLOCKS, "store is within its quota")
    wait_for(lambda: index.longest_prefix(stored.hashes) < 3, "index forgets evicted blocks")
    assert sum(map(store.contains, stored.hashes)) == index.longest_prefix(stored.hashes)
    index.close()
    store.close()


def test_sigterm_without_any_timer(mover: MoverProcess) -> None:
    """An idle mover without a router sleeps without a timer; a signal still ends it at once."""
    assert mover.engine.worker.is_open
    time.sleep(0.6)
    mover.kill(signal.SIGTERM)
    assert mover.process.wait(WAIT_S) == 0
