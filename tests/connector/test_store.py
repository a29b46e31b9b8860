"""Without a router: hits come from the mover's index, and the mover reads them into slots."""

from __future__ import annotations

import threading

import pytest

from tests.connector.engine import generated
from vllm_dualpath.blocks import chain_hashes
from vllm_dualpath.messages import LocalLoad, LocalLoadDone, LocalLoaded, Persist

PROMPT = list(range(1, 43))
SLOTS = (7, 3, 9, 1, 12)


def index(e, tokens=PROMPT, num_blocks=5) -> list[bytes]:
    hashes = chain_hashes(e.root, tokens, 8)[:num_blocks]
    for each in hashes:
        e.mover.index.add(each)
    return hashes


def answer(e, load: LocalLoad, num_good: int, first_block: int = 0, slots=SLOTS) -> None:
    e.stage(PROMPT, [0] * first_block + list(slots), 8 * (first_block + num_good))
    e.mover.send("worker", LocalLoaded(load.load_id, num_good, tuple(slots[:num_good])))


def run_answering(e, num_good: int, first_block: int = 0) -> LocalLoad:
    """Run the engine while the mover answers one load with that many good blocks."""
    loads: list[LocalLoad] = []

    def mover() -> None:
        loads.extend(e.mover.wait_for(LocalLoad))
        answer(e, loads[0], num_good, first_block)

    thread = threading.Thread(target=mover)
    thread.start()
    e.run(4000)
    thread.join()
    e.mover.wait_for(LocalLoadDone)
    return loads[0]


@pytest.mark.parametrize("num_good", [0, 1, 3, 5])
def test_good_blocks_are_loaded_and_the_rest_computed(engine, is_async, num_good):
    """All, some or none of the promised blocks are good: the answer is the same."""
    e = engine("both", is_async=is_async)
    hashes = index(e)
    e.add("r", PROMPT, 4)
    load = run_answering(e, num_good)
    assert load.hashes == tuple(hashes)
    e.check_output("r", 4)
    assert len(e.mover.of(LocalLoadDone)) == 1
    e.check_ended()


def test_block_aligned_prompt_computes_one_token(engine):
    """Every block of the prompt is stored: the last one is not asked for, one token must be
    computed.
    """
    e = engine("both")
    hashes = index(e, PROMPT[:40])
    e.add("r", PROMPT[:40], 3)
    load = run_answering(e, 4)
    assert load.hashes == tuple(hashes[:4])
    e.check_output("r", 3)
    e.check_ended()


@pytest.mark.parametrize(("num_known", "first_block"), [(4, 0), (8, 1), (12, 1), (20, 2)])
def test_local_prefix_shortens_the_load(engine, num_known, first_block):
    """Only blocks beyond the local prefix are read; one that is half there is read and half
    copied.
    """
    e = engine("both", persist=False)
    e.add("warm", [*PROMPT[:num_known], 80], 1)
    e.run()
    hashes = index(e)
    e.add("r", PROMPT, 4)
    load = run_answering(e, 5 - first_block, first_block)
    assert load.hashes == tuple(hashes[first_block:])
    e.check_output("r", 4)
    e.check_ended()


def test_longer_local_prefix_needs_no_load(engine):
    """What is in the prefix cache is not read again."""
    e = engine("both", persist=False)
    e.add("warm", PROMPT, 1)
    e.run()
    index(e, num_blocks=2)
    e.add("r", PROMPT, 4)
    e.run()
    assert not e.mover.of(LocalLoad)
    e.check_output("r", 4)
    e.check_ended()


def test_silent_mover(engine, is_async):
    """No answer by the deadline: recompute; the answer that comes later is given back at once."""
    e = engine("both", is_async=is_async)
    index(e)
    e.add("r", PROMPT, 4)
    e.run(4000)
    e.check_output("r", 4)
    (load,) = e.mover.of(LocalLoad)
    assert not e.mover.of(LocalLoadDone)
    answer(e, load, 5)
    e.mover.wait_for(LocalLoadDone)
    e.check_ended()


def test_unknown_and_repeated_answers(engine):
    """Answers to no question and second answers change nothing."""
    e = engine("both")
    index(e)
    e.mover.send("worker", LocalLoaded(bytes(16), 5, SLOTS))
    e.add("r", PROMPT, 4)
    load = run_answering(e, 5)
    answer(e, load, 5)
    e.add("s", PROMPT, 4)
    e.run()
    e.check_output("r", 4)
    e.check_output("s", 4)
    e.check_ended()


@pytest.mark.parametrize("message", [(9, SLOTS), (5, (1,)), (5, (1, 2, 3, 4, 4000))])
def test_nonsense_answers(engine, message):
    """More good blocks than asked for, fewer slots than blocks, slots out of range: no crash."""
    e = engine("both")
    index(e)
    e.add("r", PROMPT, 4)
    e.step()
    (load,) = e.mover.wait_for(LocalLoad)
    e.stage(PROMPT, list(SLOTS), 40)
    e.mover.send("worker", LocalLoaded(load.load_id, message[0], message[1]))
    e.run(4000)
    e.check_output("r", 4)
    e.check_ended()


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("num_good", [0, 5])
def test_abort_while_loading(engine, is_async, steps, num_good):
    """VLLM waits for the load of an aborted request; it is reported once, good or bad."""
    e = engine("both", is_async=is_async)
    index(e)
    e.add("r", PROMPT, 4)
    for _ in range(steps):
        e.step()
    e.settle()
    e.abort("r")
    if steps:
        (load,) = e.mover.wait_for(LocalLoad)
        answer(e, load, num_good)
    e.run(4000)
    e.check_ended()
    e.add("next", PROMPT, 4)
    e.run(4000)
    e.check_output("next", 4)
    e.check_ended()


def test_preempted_request_is_not_loaded_again(engine, is_async):
    """After a preemption the store is not asked again."""
    e = engine("both", is_async=is_async)
    index(e)
    e.add("r", PROMPT, 8)
    e.step()
    e.settle()
    (load,) = e.mover.wait_for(LocalLoad)
    answer(e, load, 5)
    while not e.outputs["r"]:
        e.step()
    e.preempt("r")
    e.scheduler.reset_prefix_cache()
    e.run(4000)
    e.check_output("r", 8)
    assert len(e.mover.of(LocalLoad)) == 1
    e.check_ended()


def test_new_blocks_are_stored_once(engine, is_async):
    """Blocks that the index knows are not stored again."""
    e = engine("both", is_async=is_async)
    index(e, num_blocks=3)
    e.add("r", PROMPT, 8)
    run_answering(e, 3)
    e.mover.wait_for(Persist, 3)
    tokens = PROMPT + generated(PROMPT, 8)
    assert [m.hash for m in e.mover.of(Persist)] == chain_hashes(e.root, tokens, 8)[3:]
    e.check_ended()


def test_failed_blocks_leave_the_prefix_cache(engine):
    """Blocks of a failed load are evicted: no later request finds them."""
    e = engine("both", persist=False)
    index(e)
    e.add("r", PROMPT, 2)
    run_answering(e, 1)
    e.add("s", [*PROMPT[:20], 88], 2)
    e.run(4000)
    e.check_output("s", 2)
    e.check_ended()


def test_reset_between_ask_and_allocation(engine):
    """A request that was told of hits and then waited loads nothing of the old model's."""
    e = engine("both", num_blocks=14)
    e.add("big", [60 + i % 20 for i in range(24)], 8)
    e.step()
    index(e)
    e.add("r", PROMPT, 2)
    e.step()
    assert e.side._tracked["r"].answer
    assert e.connector.reset_cache()
    e.abort("big")
    e.run()
    assert not e.mover.of(LocalLoad)
    e.check_output("r", 2)
    e.check_ended()
