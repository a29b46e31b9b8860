"""The prefill side: hits come in layer by layer, new pages go out, each once."""

from __future__ import annotations

import pytest

from tests.connector.engine import NUM_LAYERS, key_of
from vllm_dualpath.messages import NotCached, Release, Saved

PROMPT = list(range(1, 43))  # 42 tokens: 5 full blocks of 8 and a part, 11 pages
SLOTS = [7, 3, 9, 1, 12, 5]


def pages(first: int, last: int) -> dict:
    return {(layer, page): 1 for layer in range(NUM_LAYERS) for page in range(first, last)}


def publish(e, num_hits: int = 2, prompt=PROMPT, slots=SLOTS, **changes):
    e.stage(prompt, slots, num_hits * 8)
    return e.mover.publish(e.root, prompt, num_hits, slots, **changes)


def publish_past_cache(e, num_cached: int, num_hits: int):
    """Slots of the blocks that nobody read hold nothing."""
    params = publish(e, num_hits, num_cached_blocks=num_cached)
    for layer in range(NUM_LAYERS):
        for page in range(2 * num_cached):
            e.mover.page(SLOTS, layer, page)[:] = 0
    return params


def failures(e) -> dict:
    counters = e.side.recorder._counters
    return {k.partition("|")[2]: v for k, v in counters.items() if "load_failures" in k}


@pytest.mark.parametrize("num_hits", [0, 1, 2, 5])
def test_hit_is_loaded_and_the_rest_saved_once(engine, is_async, num_hits):
    """Hit blocks are copied in, all later pages are saved exactly once, and the claim is
    released.
    """
    e = engine("prefill", is_async=is_async)
    params = publish(e, num_hits)
    e.add("r", PROMPT, 1, params)
    e.run()
    e.check_output("r", 1)
    assert e.mover.saved_pages(key_of(params)) == pages(2 * num_hits, 11)
    e.check_staged(PROMPT, SLOTS, 0)
    e.check_ended()


def test_chunked_prefill_saves_each_page_once(engine, is_async):
    """However the prompt is cut into steps, every page is saved once, partial pages only at the
    end.
    """
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=9)
    params = publish(e, 1)
    e.add("r", PROMPT, 1, params)
    e.run()
    assert e.mover.saved_pages(key_of(params)) == pages(2, 11)
    assert len(e.mover.of(Saved)) > 3 * NUM_LAYERS
    e.check_staged(PROMPT, SLOTS, 0)
    e.check_ended()


@pytest.mark.parametrize("num_known", [8, 24, 40], ids=["shorter", "longer", "nearly-all"])
def test_local_prefix_cache_and_hit(engine, is_async, num_known):
    """A local hit shorter than ours shortens the load; a longer one is saved from the cache at
    once.
    """
    e = engine("prefill", is_async=is_async)
    e.add("warm", [*PROMPT[:num_known], 80], 1)
    e.run()
    params = publish(e, 2)
    e.add("r", PROMPT, 1, params)
    e.run()
    e.check_output("r", 1)
    assert e.mover.saved_pages(key_of(params)) == pages(4, 11)
    e.check_staged(PROMPT, SLOTS, 4)
    e.check_ended()


def run_past_cache(e, num_known: int):
    """A prompt whose plan leaves two of four hit blocks to the cache, which has some tokens."""
    if num_known:
        e.add("warm", [*PROMPT[:num_known], 80], 1)
        e.run()
    params = publish_past_cache(e, 2, 4)
    e.add("r", PROMPT, 1, params)
    e.run()
    e.check_output("r", 1)
    assert e.mover.saved_pages(key_of(params)) == {**pages(0, 4), **pages(8, 11)}
    e.check_staged(PROMPT, SLOTS, 0)
    return key_of(params)


@pytest.mark.parametrize("num_known", [16, 28, 40], ids=["exactly", "more", "past-the-hit"])
@pytest.mark.parametrize("step_tokens", [512, 9], ids=["whole", "chunked"])
def test_what_the_plan_left_to_the_cache_is_saved_from_there(
    engine, is_async, num_known, step_tokens
):
    """Blocks that nobody read go out of the prefix cache, those that were read do not."""
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=step_tokens)
    run_past_cache(e, num_known)
    assert not e.mover.of(NotCached)
    e.check_ended()


@pytest.mark.parametrize("num_known", [0, 8], ids=["nothing", "a-part"])
@pytest.mark.parametrize("step_tokens", [512, 9], ids=["whole", "chunked"])
def test_what_the_cache_holds_no_more_is_computed(engine, is_async, num_known, step_tokens):
    """The slots cannot close the gap: everything after the local prefix is computed, the pages
    that the decode side misses are saved once, and the mover hears of it once.
    """
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=step_tokens)
    key = run_past_cache(e, num_known)
    assert [each.key for each in e.mover.wait_for(NotCached)] == [key]
    e.check_ended()


def test_preemption_between_cached_pages_and_new_ones(engine, is_async):
    """What was saved from the cache is not saved again when the prompt is computed anew."""
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=8)
    e.add("warm", [*PROMPT[:16], 80], 1)
    e.run()
    params = publish_past_cache(e, 2, 3)
    e.add("r", PROMPT, 1, params)
    e.step()
    if is_async:
        e.step()
    e.preempt("r")
    e.scheduler.reset_prefix_cache()
    e.run()
    e.check_output("r", 1)
    assert e.mover.saved_pages(key_of(params)) == {**pages(0, 4), **pages(6, 11)}
    e.check_staged(PROMPT, SLOTS, 0)
    e.check_ended()


def test_two_requests_of_one_transfer(engine):
    """Each claims and each releases: the mover counts two."""
    e = engine("prefill")
    params = publish(e, 2)
    e.add("0_r", PROMPT, 1, params)
    e.add("1_r", PROMPT, 1, params)
    e.run()
    assert e.mover.num_claims(key_of(params)) == 2
    e.mover.wait_for(Release, 2)
    e.check_ended()


def test_preemption_loads_nothing_twice_and_saves_nothing_twice(engine, is_async):
    """After a preemption the prompt is computed again without a load; saved pages are not saved
    again.
    """
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=20)
    params = publish(e, 1)
    e.add("r", PROMPT, 1, params)
    e.step()
    if is_async:
        e.step()
    e.preempt("r")
    e.scheduler.reset_prefix_cache()
    e.run()
    e.check_output("r", 1)
    assert e.mover.saved_pages(key_of(params)) == pages(2, 11)
    e.check_staged(PROMPT, SLOTS, 0)
    e.check_ended()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_at_every_state(engine, is_async, steps):
    """Aborted before, in and after its steps, a request releases its claim exactly once."""
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=20)
    params = publish(e, 1)
    e.add("r", PROMPT, 3, params)
    for _ in range(steps):
        e.step()
    e.abort("r")
    e.run()
    assert e.mover.num_claims(key_of(params)) == min(1, steps)
    e.check_ended()


def test_abort_after_preemption(engine):
    """A preempted request that is aborted still releases once."""
    e = engine("prefill", max_num_batched_tokens=20)
    params = publish(e, 1)
    e.add("r", PROMPT, 1, params)
    e.step()
    e.preempt("r")
    e.abort("r")
    e.run()
    e.check_ended()


def test_abort_between_claim_and_allocation(engine):
    """A claim whose blocks were never allocated is released by the scheduler side."""
    e = engine("prefill", num_blocks=16)
    e.add("big", list(range(40)), 8)
    e.step()
    params = publish(e, 1)
    e.add("r", PROMPT, 1, params)
    e.step()
    assert e.mover.num_claims(key_of(params)) == 1
    e.abort("r")
    e.run()
    e.mover.wait_for(Release)
    e.check_ended()


def test_second_ask_before_allocation_answers_again(engine):
    """No free blocks at first: the request keeps its one claim and loads when there are some."""
    e = engine("prefill", num_blocks=16)
    e.add("big", list(range(40)), 8)
    e.step()
    params = publish(e, 2)
    e.add("r", PROMPT, 1, params)
    e.step()
    e.step()
    e.run()
    assert e.mover.num_claims(key_of(params)) == 1
    assert e.mover.saved_pages(key_of(params)) == pages(4, 11)
    e.check_output("r", 1)
    e.check_ended()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("digest_mismatch", {"digest": bytes(32)}),
        ("digest_mismatch", {"num_tokens": 41}),
        ("bad_entry", {"num_cached_blocks": 3}),
        ("boot_mismatch", {"boot_id": bytes(16)}),
    ],
)
def test_mismatch_is_no_hit_and_no_save(engine, reason, changes):
    """Another prompt, length or mover than the plan's: computed alone, counted, released if
    claimed.
    """
    e = engine("prefill")
    params = publish(e, 2, **changes)
    e.add("r", PROMPT, 1, params)
    step = e.schedule()
    assert failures(e) == {reason: 1}
    e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 1)
    assert not e.mover.of(Saved)
    e.check_ended()


@pytest.mark.parametrize(
    "params",
    [
        {"dualpath": "nonsense"},
        {"dualpath": {"version": 1}},
        {"dualpath": {"version": 99, "boot_id": "0" * 32, "transfer": "0" * 32, "attempt": 0,
                      "num_hit_blocks": 1, "num_tokens": 4}},
        {"dualpath": {"version": 1, "boot_id": "xy", "transfer": "zz", "attempt": -1,
                      "num_hit_blocks": 1, "num_tokens": 4}},
        {"dualpath": None},
    ],
)  # fmt: skip
def test_malformed_parameters(engine, params):
    """Whatever a client smuggles in, the request is computed and the rejection counted."""
    e = engine("prefill")
    e.add("r", PROMPT, 1, params)
    step = e.schedule()
    assert failures(e) == {"bad_params": 1}
    e.update(step, e.execute(step))
    e.run()
    e.check_output("r", 1)
    e.check_ended()


@pytest.mark.parametrize("params", [{}, {"other": 1}])
def test_foreign_parameters_are_not_ours(engine, params):
    """Parameters of other connectors are none of our business, and no failure."""
    e = engine("prefill")
    e.add("r", PROMPT, 1, params)
    step = e.schedule()
    assert failures(e) == {}
    e.update(step, e.execute(step))
    e.run()
    e.check_ended()


def test_late_leg_of_an_ended_transfer(engine):
    """A retired entry is not claimed; the leg computes everything."""
    e = engine("prefill")
    params = publish(e, 2)
    assert e.mover.table.retire(e.mover.entries[key_of(params)], 0)
    e.add("r", PROMPT, 1, params)
    e.run()
    e.check_output("r", 1)
    assert e.mover.num_claims(key_of(params)) == 0
    e.check_ended()


def test_entry_that_covers_the_whole_prompt(engine, is_async):
    """An entry that claims every token as hit still leaves the last block to compute."""
    e = engine("prefill", is_async=is_async)
    prompt = PROMPT[:40]
    params = publish(e, 5, prompt)
    e.add("r", prompt, 1, params)
    e.run()
    e.check_output("r", 1)
    assert not e.mover.of(Saved)
    e.check_ended()


def test_request_that_must_not_read(engine):
    """Prompt logprobs: vLLM computes every token, nothing is claimed."""
    e = engine("prefill")
    params = publish(e, 2)
    request = e.add("r", PROMPT, 1, params)
    request.skip_reading_prefix_cache = True
    e.run()
    assert e.mover.num_claims(key_of(params)) == 0
    e.check_ended()


def test_cache_salt_is_part_of_the_root(engine):
    """A salted request matches a salted plan only."""
    from vllm_dualpath.blocks import chain_root

    e = engine("prefill")
    e.stage(PROMPT, SLOTS, 16)
    salted = e.mover.publish(chain_root(e.root, "s"), PROMPT, 2, SLOTS)
    e.add("right", PROMPT, 1, salted, cache_salt="s")
    e.run()
    assert e.mover.saved_pages(key_of(salted)) == pages(4, 11)
    plain = e.mover.publish(e.root, PROMPT, 2, SLOTS)
    e.add("wrong", PROMPT, 1, plain, cache_salt="s")
    e.run()
    assert not e.mover.saved_pages(key_of(plain))
    e.check_ended()


def test_blocks_held_until_copies_end(engine, is_async):
    """Copies outlast their step: vLLM holds a finished request's blocks until the worker reports
    it.
    """
    e = engine("prefill", is_async=is_async)
    params = publish(e, 1)
    request = e.add("r", PROMPT, 1, params)
    step = e.schedule()
    e.update(step, e.execute(step))
    assert request.is_finished() and "r" in e.scheduler.requests
    e.run()
    assert e.mover.saved_pages(key_of(params)) == pages(2, 11)
    e.check_ended()


def test_mixed_batch(engine, is_async):
    """Many requests, with and without transfers, share steps; each gets its own pages."""
    e = engine("prefill", is_async=is_async, max_num_batched_tokens=40, num_blocks=64)
    keys = []
    for i in range(5):
        prompt = [i + 1, *PROMPT[: 20 + 5 * i]]
        slots = [8 * i + j for j in range(8)]
        params = publish(e, i % 3, prompt, slots)
        keys.append((prompt, slots, params, i % 3))
        e.add(f"r{i}", prompt, 1, params)
        e.add(f"plain{i}", [50 + i, *PROMPT[:17]], 3)
    e.run()
    for i, (prompt, slots, params, num_hits) in enumerate(keys):
        e.check_output(f"r{i}", 1)
        e.check_output(f"plain{i}", 3)
        last = -(-len(prompt) // 4)
        assert e.mover.saved_pages(key_of(params)) == pages(2 * num_hits, last)
        e.check_staged(prompt, slots, 0)
    e.check_ended()


def test_reset_ends_the_saves(engine):
    """Pages computed after a reset are another model's: none goes to the old transfer."""
    e = engine("prefill", max_num_batched_tokens=16, enable_chunked_prefill=True)
    params = publish(e, 0)
    e.add("r", PROMPT, 1, params)
    e.step()
    num_saved = len(e.mover.wait_for(Saved, NUM_LAYERS))
    e.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    e.run()
    assert len(e.mover.of(Saved)) == num_saved
    e.check_output("r", 1)
    e.check_ended()
