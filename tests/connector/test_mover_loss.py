"""The mover dies: no hits, no hang, no garbage; then a new one is attached and used."""

from __future__ import annotations

import time

import pytest

from tests.connector.engine import key_of
from vllm_dualpath.blocks import chain_hashes
from vllm_dualpath.connector import worker_mover
from vllm_dualpath.messages import LocalLoad, Release, Saved

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


def lose(e) -> None:
    e.mover.die()
    e.wait(lambda: e.side._mover.view is None)


def replace(e) -> None:
    """A new mover, to which both sides attach by themselves."""
    e.mover = e.new_mover()
    e.wait(lambda: e.side._mover.view is not None, 15)
    boot_id = e.mover.boot_id
    e.wait(lambda: e.worker._worker.side._mover.connection.boot_id == boot_id, 15)


def check_free(e) -> None:
    assert not e.scheduler.requests
    assert e.num_free_blocks == e.cache_config.num_blocks - 1
    assert not e.side._tracked


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_requests_go_on_without_a_mover(engine, is_async, role):
    """With the mover gone, every role computes; a new mover brings hits back."""
    e = engine(role, is_async=is_async)
    params = e.mover.publish(e.root, PROMPT, 2, SLOTS)
    lose(e)
    e.add("a", PROMPT, 4, params)
    e.run()
    e.check_output("a", 4)
    check_free(e)
    replace(e)
    prompt = [77, *PROMPT]
    e.stage(prompt, SLOTS, len(prompt))
    params = e.mover.publish(e.root, prompt, 2, SLOTS)
    e.add("b", prompt, 2, params)
    e.run()
    e.check_output("b", 2)
    if role != "both":
        assert e.mover.num_claims(key_of(params)) == 1
    e.check_ended()


def test_synchronous_load_outlives_its_mover(engine, is_async):
    """Scheduled on a claim, the load is carried out from memory whose mover died in between."""
    e = engine("prefill", is_async=is_async)
    e.stage(PROMPT, SLOTS, 16)
    e.add("r", PROMPT, 1, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    step = e.schedule()
    lose(e)
    time.sleep(0.7)
    e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 1)
    check_free(e)
    replace(e)


def test_step_that_takes_long_keeps_the_memory_it_names(engine, monkeypatch):
    """An engine that looks idle while a step's orders are on their way gives up no mapping."""
    monkeypatch.setattr(worker_mover, "_IDLE_S", 0.05)
    e = engine("prefill")
    e.stage(PROMPT, SLOTS, 16)
    e.add("r", PROMPT, 1, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    start_loads = e.worker.start_load_kv

    def late(context) -> None:
        lose(e)
        time.sleep(0.7)
        start_loads(context)

    monkeypatch.setattr(e.worker, "start_load_kv", late)
    step = e.schedule()
    output = e.execute(step)
    assert not output.kv_connector_output.invalid_block_ids
    monkeypatch.undo()
    e.update(step, output)
    e.run()
    e.check_output("r", 1)
    replace(e)


def test_death_between_chunks(engine):
    """The mover dies while a prompt is being computed in chunks: its remaining pages go nowhere."""
    e = engine("prefill", max_num_batched_tokens=12)
    e.stage(PROMPT, SLOTS, 8)
    e.add("r", PROMPT, 1, e.mover.publish(e.root, PROMPT, 1, SLOTS))
    e.step()
    lose(e)
    e.run()
    e.check_output("r", 1)
    check_free(e)
    replace(e)
    assert not e.mover.of(Release) and not e.mover.of(Saved)


def test_decode_load_outlives_its_mover(engine, is_async):
    """The copy into the cache needs the memory only."""
    e = engine("decode", is_async=is_async)
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.add("r", PROMPT, 3, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    step = e.schedule()
    lose(e)
    e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 3)
    check_free(e)
    replace(e)


def test_store_load_ends_with_its_mover(engine, is_async):
    """A load that only the mover could have ended is reported as failed at once."""
    e = engine("both", is_async=is_async)
    for each in chain_hashes(e.root, PROMPT, 8):
        e.mover.index.add(each)
    e.add("r", PROMPT, 3)
    e.step()
    e.settle()
    e.mover.wait_for(LocalLoad)
    lose(e)
    e.run()
    e.check_output("r", 3)
    check_free(e)
    replace(e)


def test_idle_engine_gets_its_mover_back(engine):
    """Without a single step in between, the old memory is given up and the new mover attached."""
    e = engine("decode")
    lose(e)
    old = e.worker._worker.side._mover._staging
    replace(e)
    assert e.worker._worker.side._mover._staging is not old
    assert old._memory.closed


def test_late_order_for_a_dead_mover_fails_aloud(engine):
    """An order that comes after its memory was given up is no hang and no garbage."""
    e = engine("decode")
    e.stage(PROMPT, SLOTS, len(PROMPT))
    e.add("r", PROMPT, 3, e.mover.publish(e.root, PROMPT, 2, SLOTS))
    step = e.schedule()
    lose(e)
    replace(e)
    e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 3)
    check_free(e)
