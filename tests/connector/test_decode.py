"""The decode side: the whole prompt is loaded before the request runs; new blocks are stored."""

from __future__ import annotations

import pytest

from tests.connector.engine import generated, key_of
from vllm_dualpath.blocks import chain_hashes
from vllm_dualpath.messages import Persist, PersistSlots, Release

PROMPT = list(range(1, 43))
SLOTS = [7, 3, 9, 1, 12, 5]


def publish(e, prompt=PROMPT, slots=SLOTS, **changes):
    e.stage(prompt, slots, len(prompt))
    return e.mover.publish(e.root, prompt, 2, slots, **changes)


def stored(e) -> list[bytes]:
    return [m.hash for m in e.mover.of(Persist)]


def chain(e, request_id: str, num_tokens: int) -> list[bytes]:
    prompt = e.prompts[request_id]
    tokens = (prompt + generated(prompt, 100))[:num_tokens]
    return chain_hashes(e.root, tokens, 8)


def check_stored_bytes(e, request_id: str, num_tokens: int) -> None:
    """Each persist slot holds the block that its message names."""
    prompt = e.prompts[request_id]
    tokens = (prompt + generated(prompt, 100))[:num_tokens]
    hashes = chain_hashes(e.root, tokens, 8)
    parents = [e.root, *hashes]
    for message in e.mover.of(Persist):
        block = hashes.index(message.hash)
        assert message.parent == parents[block]
        from tests.connector.engine import NUM_LAYERS, page_words

        for layer in range(NUM_LAYERS):
            for page in (0, 1):
                got = e.mover.page([message.slot], layer, page).tolist()
                assert got == page_words(tokens, layer, 2 * block + page)


def test_prompt_is_loaded_and_only_one_token_computed(engine, is_async):
    """All pages come from the slots; the claim is released by the copy; the answer is right."""
    e = engine("decode", is_async=is_async)
    params = publish(e)
    e.add("r", PROMPT, 4, params)
    first = e.schedule()
    assert not first.output.num_scheduled_tokens
    e.update(first, e.execute(first))
    e.mover.wait_for(Release)
    e.run()
    e.check_output("r", 4)
    e.check_ended()


@pytest.mark.parametrize("num_known", [4, 20, 40])
def test_local_prefix_shortens_the_load(engine, num_known):
    """Pages in the prefix cache are not overwritten."""
    e = engine("decode", persist=False)
    e.add("warm", [*PROMPT[:num_known], 80], 1)
    e.run()
    params = publish(e)
    for page in range(num_known // 4):  # not needed: may hold anything
        e.mover.page(SLOTS, 0, page)[:] = 0
    e.add("r", PROMPT, 4, params)
    e.run()
    e.check_output("r", 4)
    e.check_ended()


def test_two_requests_of_one_transfer(engine, is_async):
    """N = 2: two claims of one key, two releases."""
    e = engine("decode", is_async=is_async)
    params = publish(e)
    e.add("0_r", PROMPT, 3, params)
    e.add("1_r", PROMPT, 3, params)
    e.run()
    assert e.mover.releases[key_of(params)] == 2
    e.check_output("0_r", 3)
    e.check_output("1_r", 3)
    e.check_ended()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_abort_at_every_state(engine, is_async, steps):
    """Waiting, loading, loaded, running: an abort ends with one release and all blocks back."""
    e = engine("decode", is_async=is_async)
    params = publish(e)
    e.add("r", PROMPT, 6, params)
    for _ in range(steps):
        e.step()
    e.abort("r")
    e.run()
    e.check_ended()


@pytest.mark.parametrize("report_first", [False, True], ids=["abort-first", "load-first"])
def test_abort_and_completion_in_both_orders(engine, report_first):
    """The load may end before or after the abort; either way it is reported exactly once."""
    e = engine("decode")
    params = publish(e)
    e.add("r", PROMPT, 6, params)
    step = e.schedule()
    output = e.execute(step)
    if report_first:
        e.mover.wait_for(Release)
        e.update(step, output)
        late = e.schedule()
        e.update(late, e.execute(late))
    else:
        e.abort("r")
        e.update(step, output)
    if report_first:
        e.abort("r")
    e.run()
    e.check_ended()


def test_preemption_recomputes_without_a_load(engine, is_async):
    """After a preemption the claim is gone: everything is computed here."""
    e = engine("decode", is_async=is_async)
    params = publish(e)
    e.add("r", PROMPT, 8, params)
    while not e.outputs["r"]:
        e.step()
    e.preempt("r")
    e.scheduler.reset_prefix_cache()
    e.run()
    e.check_output("r", 8)
    assert e.mover.num_claims(key_of(params)) == 1
    e.check_ended()


def test_failed_copy_recomputes(engine, is_async, monkeypatch):
    """A copy that raises ends as a failed load: released, recomputed, counted, not asked again."""
    e = engine("decode", is_async=is_async)
    params = publish(e)

    def broken(*_args):
        raise RuntimeError("broken")

    monkeypatch.setattr("vllm_dualpath.connector.staging.Staging.rows", broken)
    e.add("r", PROMPT, 4, params)
    e.run()
    e.check_output("r", 4)
    assert e.mover.num_claims(key_of(params)) == 1
    e.check_ended()


def test_digest_mismatch_computes_alone(engine):
    """Another prompt than the transfer's: nothing is loaded, the claim is given back."""
    e = engine("decode")
    params = publish(e, digest=bytes(32))
    e.add("r", PROMPT, 3, params)
    e.run()
    e.check_output("r", 3)
    assert e.mover.releases[key_of(params)] == 1
    e.check_ended()


def test_rejection_notice_releases_nothing(engine):
    """VLLM's notice (one token, same parameters) neither claims nor releases, however often it
    comes.
    """
    e = engine("decode")
    params = {**publish(e), "do_remote_prefill": True}
    e.add("r", PROMPT, 4, params)
    e.step()
    for notice in range(2):
        e.add(f"notice{notice}", [0], 1, params)
        e.abort(f"notice{notice}")
    e.run()
    e.check_output("r", 4)
    assert e.mover.num_claims(key_of(params)) == 1
    e.check_ended()


# --- what is stored ------------------------------------------------------------------------------


def test_blocks_after_a_transfer_are_stored(engine, is_async):
    """The mover stores the prompt's full blocks; we store the straddling one and those after it."""
    e = engine("decode", is_async=is_async)
    e.add("r", PROMPT, 24, publish(e))
    e.run()
    e.check_output("r", 24)
    # 66 tokens, 65 of them computed: blocks 5, 6 and 7.
    e.mover.wait_for(Persist, 3)
    assert stored(e) == chain(e, "r", 64)[5:]
    check_stored_bytes(e, "r", 64)
    e.check_ended()


def test_blocks_without_a_transfer_are_stored(engine, is_async):
    """A request that came alone has all its full blocks stored, as far as there are slots."""
    e = engine("decode", is_async=is_async)
    e.add("r", PROMPT[:26], 8)
    e.run()
    e.mover.wait_for(Persist, 4)
    assert stored(e) == chain(e, "r", 32)
    check_stored_bytes(e, "r", 32)
    e.check_ended()


def test_single_step_request_is_stored_at_its_end(engine, is_async):
    """With one token to generate there is no later step: the blocks are copied while vLLM holds
    them.
    """
    e = engine("decode", is_async=is_async)
    e.add("r", PROMPT[:26], 1)
    e.run()
    e.mover.wait_for(Persist, 3)
    assert stored(e) == chain(e, "r", 24)
    check_stored_bytes(e, "r", 24)
    e.check_ended()


def test_no_free_slot_means_not_stored(engine):
    """Without slots nothing is stored, nothing waits, and the blocks are counted."""
    e = engine("decode", persist=False)
    e.add("r", PROMPT, 8)
    while "r" not in e.finished:
        step = e.schedule()
        output = e.execute(step)
        before = e.side.recorder._counters["vllm:dualpath_blocks_not_stored|"]
        e.update(step, output)
    e.run()
    assert before == 0 and not stored(e)
    e.check_ended()


def test_slots_that_come_later_are_used(engine):
    """Blocks wait, in the cache that holds them anyway, for slots that the mover gives back."""
    e = engine("decode", persist=False)
    e.add("r", PROMPT[:20], 20)
    for _ in range(6):
        e.step()
    assert not stored(e)
    e.grant_persist_slots()
    e.run()
    e.mover.wait_for(Persist, 4)
    assert stored(e) == chain(e, "r", 32)
    e.check_ended()


def test_a_prefix_is_stored_once(engine):
    """A second request with the same prompt stores only what is new."""
    e = engine("decode")
    e.add("a", PROMPT[:18], 1)
    e.run()
    e.add("b", PROMPT[:18] + [70] * 8, 1)
    e.run()
    e.mover.wait_for(Persist, 3)
    assert stored(e) == chain(e, "b", 24)
    e.check_ended()


def test_preempted_request_stores_only_what_is_computed(engine, is_async):
    """Preempted and resumed at every point of its life, a request stores right blocks, each
    once.
    """
    for preempt_after in range(1, 7):
        e = engine("decode", is_async=is_async, persist=False)
        slots = tuple(range(30, 40))
        e.mover.send("scheduler", PersistSlots(slots))
        e.wait(lambda e=e: len(e.side._mover.view.persist_slots) == 10)
        e.add("r", PROMPT[:13], 14)
        for _ in range(preempt_after):
            e.step()
        if "r" in e.scheduler.requests and e.scheduler.requests["r"] in e.scheduler.running:
            e.preempt("r")
            e.scheduler.reset_prefix_cache()
        e.run()
        e.check_output("r", 14)
        e.mover.wait_for(Persist, 3)
        assert stored(e) == chain(e, "r", 24)
        check_stored_bytes(e, "r", 24)
        e.check_ended()
        e.close()


def test_aborted_request_stores_nothing_more(engine):
    """An abort does not hold blocks back for storing."""
    e = engine("decode")
    e.add("r", PROMPT[:26], 30)
    step = e.schedule()
    output = e.execute(step)
    e.abort("r")
    e.update(step, output)
    assert e.num_free_blocks == 63
    e.run()
    assert not stored(e)
    e.check_ended()


def test_salted_blocks_have_a_salted_root(engine):
    """The same tokens under a salt are other blocks."""
    from vllm_dualpath.blocks import chain_root

    e = engine("decode")
    e.add("r", PROMPT[:18], 1, cache_salt="s")
    e.run()
    e.mover.wait_for(Persist, 2)
    assert stored(e) == chain_hashes(chain_root(e.root, "s"), PROMPT[:16], 8)
    e.check_ended()


def test_reset_changes_the_root(engine):
    """After a reset nothing matches the old root, and new blocks hang on the new one."""
    from vllm_dualpath.messages import RootChanged

    e = engine("decode")
    params = publish(e)
    e.add("old", PROMPT[:30], 20)
    e.step()
    assert e.connector.reset_cache() is True
    (changed,) = e.mover.wait_for(RootChanged)
    assert changed.root != e.root
    e.add("r", PROMPT, 1, params)
    e.run()
    assert e.mover.releases[key_of(params)] == 1
    e.check_output("r", 1)
    e.mover.wait_for(Persist, 4)
    assert stored(e) == chain_hashes(changed.root, PROMPT, 8)[:4]
    e.check_ended()


def test_steps_in_flight_store_nothing(engine):
    """A block is stored only after the output of the step that computed it was processed."""
    e = engine("decode", is_async=True)
    e.add("r", PROMPT[:26], 8)
    first = e.schedule()
    second = e.schedule()
    assert not second.output.kv_connector_metadata.persists
    e.update(first, e.execute(first))
    third = e.schedule()
    assert len(third.output.kv_connector_metadata.persists) == 3
    for step in (second, third):
        e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 8)
    e.check_ended()
