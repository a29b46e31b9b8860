"""Who had a prompt last gets its next turn, and what a prefill engine still holds is not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from vllm_dualpath.messages import Committed, Message, NotCached, Stage
from vllm_dualpath.router.affinity import PrefixMemory
from vllm_dualpath.router.engine import Engine

from .cluster import BLOCK_TOKENS, Harness, stored_blocks, wire_key
from .test_good_case import body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


_CACHING = {"prefix_caching": True, "kv_tokens": 1000}


def hashes(count: int, salt: int = 0) -> list[bytes]:
    return [bytes([salt, index]) * 16 for index in range(count)]


def remember(memory: PrefixMemory, block_hashes: list[bytes], key: int) -> None:
    engines: Any = (object(), object())
    memory.remember(block_hashes, key, *engines)


async def test_the_latest_turn_is_found() -> None:
    """Of the prompts that share leading blocks the longest, within the blocks of one turn; also
    where the earlier one's very last block is another.
    """
    memory = PrefixMemory()
    remember(memory, hashes(3), 1)
    remember(memory, hashes(6), 2)

    def found(block_hashes: list[bytes]) -> tuple[int, ...]:
        earlier = memory.find(block_hashes)
        return () if earlier is None else (earlier.key, earlier.num_blocks)

    assert found(hashes(9)) == (2, 6)
    assert found([*hashes(5), *hashes(9, salt=1)]) == (2, 5)
    assert found([*hashes(4), *hashes(9, salt=1)]) == (1, 3)
    assert found(hashes(9, salt=1)) == ()
    assert found([*hashes(6), *hashes(200, salt=2)]) == (2, 6)
    assert found([]) == ()


async def test_the_memory_is_bounded() -> None:
    """The prompt that was used longest ago is forgotten."""
    memory = PrefixMemory(2)
    for salt in (0, 1, 0, 2):
        remember(memory, hashes(2, salt), salt)
    found = [memory.find(hashes(2, salt)) is not None for salt in (0, 1, 2)]
    assert found == [True, False, True]


async def test_the_next_turn_goes_where_the_last_one_was() -> None:
    """Not to the first engine by id, which is as idle; and elsewhere when it is gone."""
    async with Harness(mode="split") as harness:
        for name, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode")):
            await harness.add(name, role, None, commits(harness), **_CACHING)
        turns = [list(range(1, 4 * BLOCK_TOKENS * turn)) for turn in (1, 2, 3)]
        p1 = engine_of(harness, "p1")
        p1.add_load(1, 1000)
        await harness.post(body(prompt=turns[0]))
        p1.add_load(-1, -1000)
        await harness.post(body(prompt=turns[1]))
        assert [len(harness.movers[name].of(Stage)) for name in ("p1", "p2")] == [0, 2]
        harness.router.cluster.leave(engine_of(harness, "p2"))
        await harness.post(body(prompt=turns[2]))
        assert len(harness.movers["p1"].of(Stage)) == 1


def engine_of(harness: Harness, name: str) -> Engine:
    engine = harness.router.cluster.by_id(name)
    assert engine is not None
    return engine


def commits(harness: Harness) -> Any:
    """A prefill leg's answer that lets d1 commit; a decode leg's is plain."""

    async def answer(request: web.Request, leg: dict[str, Any]) -> web.StreamResponse:
        if leg["max_tokens"] == 1:
            params = leg["kv_transfer_params"]["dualpath"]
            harness.movers["d1"].say(Committed(wire_key(params)))
        return await harness.movers["d1"].server.answer(request, leg)

    return answer


# --- what the prefill engine holds ---

_TURNS = [list(range(100, 100 + count)) for count in (18, 30, 42)]
"""Of 4, 7 and 10 full blocks."""
_OTHER = list(range(500, 518))


@contextlib.asynccontextmanager
async def caching(kv_tokens: int = 1000, **config: Any) -> AsyncIterator[Harness]:
    """A prefill engine with a prefix cache; the store has every block of these prompts."""
    blocks = [*stored_blocks(_TURNS[-1], 10), *stored_blocks(_OTHER, 4)]
    async with Harness(mode="prefill_only", **config) as harness:
        hello = {**_CACHING, "kv_tokens": kv_tokens}
        await harness.add("p", "prefill", blocks, **hello)
        await harness.add("d", "decode", blocks, **hello)
        yield harness
        await harness.idle()


async def ask(harness: Harness, prompt: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """Blocks left to the cache by the plan of this request, and the parts that are read."""
    status, _ = await harness.post(body(prompt=prompt))
    assert status == 200
    stage = harness.p.of(Stage)[-1]
    assert harness.d.of(Stage)[-1].num_cached_blocks == stage.num_cached_blocks
    return stage.num_cached_blocks, [(s.first_block, s.last_block) for s in stage.segments]


async def test_what_the_prefill_engine_holds_is_not_read() -> None:
    """Of each turn only what the last one's prompt did not have; the same prompt not at all."""
    async with caching() as harness:
        assert await ask(harness, _TURNS[0]) == (0, [(0, 4)])
        assert await ask(harness, _TURNS[1]) == (4, [(4, 7)])
        assert await ask(harness, _TURNS[1]) == (7, [])
        assert await ask(harness, _TURNS[2]) == (7, [(7, 10)])
        _, metrics = await harness.get("/metrics")
        assert 'planned_tokens_total{reader_role="cache"} 72.0' in metrics


async def test_an_engine_without_a_cache_and_a_router_that_shall_not_ask() -> None:
    async with caching(read_past_cache=False) as harness:
        for turn in _TURNS[:2]:
            assert (await ask(harness, turn))[0] == 0
    async with caching(kv_tokens=0) as harness:
        for turn in _TURNS[:2]:
            assert (await ask(harness, turn))[0] == 0


async def test_what_other_prompts_have_pushed_out_is_read() -> None:
    """An engine holds what fits its cache, the latest prompts first."""
    other = list(range(500, 548))
    async with caching(kv_tokens=80) as harness:
        await ask(harness, _TURNS[0])
        assert (await ask(harness, _TURNS[1]))[0] == 4
        await ask(harness, other)
        assert (await ask(harness, _TURNS[1]))[0] == 0
        assert (await ask(harness, _TURNS[1]))[0] == 7


async def test_an_engine_that_held_less_is_believed_in_no_more() -> None:
    """Until it has computed a prompt again."""
    async with caching() as harness:
        await ask(harness, _TURNS[0])
        await ask(harness, _OTHER)

        async def misses(request: web.Request, leg: dict[str, Any]) -> web.StreamResponse:
            key = wire_key(leg["kv_transfer_params"]["dualpath"])
            harness.p.say(NotCached(key))
            await asyncio.sleep(0.1)
            harness.p.server.cached_tokens = 8
            return await harness._prefill(request, leg)

        healthy, harness.p.server.behaviour = harness.p.server.behaviour, misses
        assert (await ask(harness, _TURNS[1]))[0] == 4
        harness.p.server.behaviour = healthy
        assert await ask(harness, _OTHER) == (0, [(0, 4)])
        assert (await ask(harness, _TURNS[2]))[0] == 7
        assert (await ask(harness, _OTHER))[0] == 4


async def test_a_prompt_that_was_not_computed_is_not_held() -> None:
    async with caching() as harness:

        async def refuses(_request: web.Request, _leg: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"error": {}}, status=400)

        healthy, harness.p.server.behaviour = harness.p.server.behaviour, refuses
        assert (await harness.post(body(prompt=_TURNS[0])))[0] == 400
        harness.p.server.behaviour = healthy
        assert (await ask(harness, _TURNS[1]))[0] == 0


async def test_a_promise_that_cannot_be_kept_is_not_relied_on() -> None:
    """While its hits are staged another prompt fills the cache: it is decided anew."""
    async with caching(kv_tokens=90) as harness:
        await ask(harness, _TURNS[0])
        cache = engine_of(harness, "p").prefix_cache
        assert cache is not None

        def crowd(message: Message) -> bool:
            if isinstance(message, Stage) and message.key.attempt == 0:
                cache.begin(1 << 40, 70)
                cache.arrive(1 << 40)
                cache.end(1 << 40, computed=True)
            return False

        harness.p.script = crowd
        status, _ = await harness.post(body(prompt=_TURNS[1]))
        assert status == 200
        first, second = harness.p.of(Stage)[-2:]
        assert (first.num_cached_blocks, second.num_cached_blocks) == (4, 0)
        (part,) = second.segments
        assert (part.reader, part.first_block, part.last_block) == ("p", 0, 7)
        _, metrics = await harness.get("/metrics")
        assert 'attempts_failed_total{reason="evicted"} 1.0' in metrics


async def test_several_at_once_that_go_on_from_one_prompt() -> None:
    """The second finds what the first one has taken over."""
    async with caching() as harness:
        await ask(harness, _TURNS[0])
        prompts = [[*_TURNS[0][:16], *range(900 + i, 912 + i)] for i in range(0, 60, 20)]
        for status, _ in await asyncio.gather(*(harness.post(body(prompt=p)) for p in prompts)):
            assert status == 200
        assert [stage.num_cached_blocks for stage in harness.p.of(Stage)] == [0, 4, 4, 4]
