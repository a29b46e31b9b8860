"""Who had a prompt last gets its next turn, where engines are alike."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from vllm_dualpath.messages import Committed, Stage
from vllm_dualpath.router.affinity import PrefixMemory
from vllm_dualpath.router.engine import Engine

from .cluster import BLOCK_TOKENS, Harness, wire_key
from .test_good_case import body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


def hashes(count: int, salt: int = 0) -> list[bytes]:
    return [bytes([salt, index]) * 16 for index in range(count)]


async def test_the_latest_turn_is_found() -> None:
    """Of the prompts that are prefixes of this one the longest, within the blocks of one turn."""
    memory, first, second = PrefixMemory(), object(), object()
    memory.remember(hashes(3), (first,))  # type: ignore[arg-type]
    memory.remember(hashes(5), (second, first))  # type: ignore[arg-type]
    assert memory.find(hashes(9)) == ((second, 5), (first, 5))
    assert memory.find(hashes(4)) == ((first, 3),)
    assert memory.find(hashes(9, salt=1)) == ()
    assert memory.find(hashes(5 + 64)) == ((second, 5), (first, 5))
    assert memory.find(hashes(5 + 65)) == ()
    assert memory.find([]) == ()


async def test_the_memory_is_bounded() -> None:
    """The prompt that was used longest ago is forgotten."""
    memory, engine = PrefixMemory(2), object()
    for salt in (0, 1, 0, 2):
        memory.remember(hashes(2, salt), (engine,))  # type: ignore[arg-type]
    assert [bool(memory.find(hashes(2, salt))) for salt in (0, 1, 2)] == [True, False, True]


async def test_the_next_turn_goes_where_the_last_one_was() -> None:
    """Not to the first engine by id, which is as idle; and elsewhere when it is gone."""
    async with Harness(mode="split") as harness:
        for name, role in (("p1", "prefill"), ("p2", "prefill"), ("d1", "decode")):
            await harness.add(name, role, behaviour=commits(harness))
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
