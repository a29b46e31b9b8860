"""Requests that no engine can take yet: they wait in order, and never for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_dualpath.messages import Committed, Load, MoverStats, Reserve, Stage
from vllm_dualpath.policy import WaitingLine
from vllm_dualpath.router.waiting import Line, NotNow

from .cluster import BLOCK_TOKENS, Harness, pair, stored_blocks, wire_key
from .test_good_case import IDS, body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

TIGHT: dict[str, Any] = {"beta_s": 1.0, "prefill_tokens_per_s": len(IDS) - 1.0}
"""One prompt in the prefill engine is more than beta."""

Answered = asyncio.Task[tuple[int, bytes]]


async def post_later(harness: Harness, **changes: object) -> Answered:
    return asyncio.create_task(harness.post(body(**changes)))


async def waiting(harness: Harness) -> float:
    _, text = await harness.get("/metrics")
    line = next(line for line in text.splitlines() if line.startswith("dualpath_router_waiting "))
    return float(line.split()[1])


async def until_waiting(harness: Harness, number: int) -> None:
    async def poll() -> None:
        while await waiting(harness) != number:  # noqa: ASYNC110 - seen from outside, by HTTP
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 5)


@contextlib.asynccontextmanager
async def full_pair(**config: Any) -> AsyncIterator[tuple[Harness, Answered]]:
    """``p`` takes nothing more: it holds a request, yielded too, until ``go_on``."""
    async with pair(**TIGHT, **config) as harness:
        harness.p.script = lambda message: isinstance(message, Stage)
        first = await post_later(harness)
        await harness.until(lambda: len(harness.p.of(Stage)) == 1)
        yield harness, first


def go_on(harness: Harness) -> None:
    harness.p.script = lambda _message: False
    for stage in harness.p.of(Stage):
        harness.p.respond(stage)


async def statuses(*tasks: Answered) -> list[int]:
    return [status for status, _ in await asyncio.wait_for(asyncio.gather(*tasks), 10)]


async def test_who_finds_no_engine_below_beta_waits_in_order() -> None:
    """The second and third request are placed, one after the other, when the first has left."""
    async with full_pair() as (harness, first):
        others = [await post_later(harness, max_tokens=6)]
        await until_waiting(harness, 1)
        others.append(await post_later(harness, max_tokens=7))
        await until_waiting(harness, 2)
        assert len(harness.d.of(Reserve)) == 1
        go_on(harness)
        assert await statuses(first, *others) == [200] * 3
        assert [leg["max_tokens"] for leg in harness.bodies("d:leg")] == [5, 6, 7]
        assert await waiting(harness) == 0
        await harness.idle()


async def test_who_has_waited_long_enough_is_placed_all_the_same() -> None:
    """After ``queue_wait_s`` load counts no more."""
    async with full_pair(queue_wait_s=0.2) as (harness, first):
        second = await post_later(harness)
        await harness.until(lambda: len(harness.p.of(Stage)) == 2)
        go_on(harness)
        assert await statuses(first, second) == [200, 200]
        await harness.idle()


async def test_a_client_that_leaves_the_line_holds_nobody_up() -> None:
    """The next one moves up, and nothing stays booked."""
    async with full_pair() as (harness, first):
        gone = await post_later(harness)
        await until_waiting(harness, 1)
        third = await post_later(harness)
        await until_waiting(harness, 2)
        gone.cancel()
        await until_waiting(harness, 1)
        go_on(harness)
        assert await statuses(first, third) == [200, 200]
        assert len(harness.d.of(Reserve)) == 2
        await harness.idle()


async def test_a_new_engine_moves_the_line() -> None:
    """Who waits for the only prefill engine takes one that joins."""
    async with full_pair() as (harness, first):
        second = await post_later(harness)
        await until_waiting(harness, 1)
        await harness.add("p2", "prefill")
        await harness.until(lambda: bool(harness.movers["p2"].of(Stage)))
        go_on(harness)
        assert await statuses(first, second) == [200, 200]
        await harness.idle()


def lose(harness: Harness, name: str) -> None:
    """The router has not heard of this mover for too long."""
    engine = harness.router.cluster.by_id(name)
    assert engine is not None
    harness.movers[name].heartbeats = False
    harness.router.cluster.leave(engine)


@pytest.mark.parametrize("lost", ["p", "d"])
async def test_a_lost_group_sends_its_line_to_a_decode_engine_alone(lost: str) -> None:
    """Nobody waits for engines that are gone: the whole line goes, and nothing stays booked."""
    async with full_pair() as (harness, first):
        if lost == "d":
            await harness.add("e", "decode", store="file:///elsewhere")
        others = [await post_later(harness, max_tokens=each) for each in (6, 7, 8)]
        await until_waiting(harness, 3)
        lose(harness, lost)
        assert await statuses(first, *others) == [200] * 4
        answered = harness.bodies("e:leg" if lost == "d" else "d:leg")
        assert sorted(leg["max_tokens"] for leg in answered) == [5, 6, 7, 8]
        assert not any("kv_transfer_params" in leg for leg in answered)
        assert await waiting(harness) == 0
        await harness.until(lambda: not harness.router.cluster.transfers)


async def test_a_line_goes_on_with_the_engines_that_are_left() -> None:
    """One of two full prefill engines goes: who waits takes the other's place, in order."""
    async with full_pair() as (harness, first):
        other = await harness.add("p2", "prefill")
        other.script = lambda message: isinstance(message, Stage)
        second = await post_later(harness)
        await harness.until(lambda: bool(other.of(Stage)))
        third = await post_later(harness, max_tokens=6)
        await until_waiting(harness, 1)
        fourth = await post_later(harness, max_tokens=7)
        await until_waiting(harness, 2)
        lose(harness, "p2")
        # Whose transfer is lost has waited once; who waits goes on waiting.
        await harness.until(lambda: len(harness.p.of(Stage)) == 2)
        assert await waiting(harness) == 2
        go_on(harness)
        assert await statuses(first, second, third, fourth) == [200] * 4
        decoded = [leg["max_tokens"] for leg in harness.bodies("d:leg")]
        assert decoded.index(6) < decoded.index(7)
        await harness.until(lambda: not harness.router.cluster.transfers)


async def test_a_lost_groups_line_is_placed_in_another_group() -> None:
    """Engines that share nothing with the lost ones serve its line, with a transfer."""
    root = b"\xff" * 32  # after every other in the order of groups

    async def prefill(request: Any, leg: dict[str, Any]) -> Any:
        key = wire_key(leg["kv_transfer_params"]["dualpath"])
        harness.movers["d2"].say(Committed(key))
        return await harness.movers["p2"].server.answer(request, leg)

    async with full_pair() as (harness, first):
        await harness.add("p2", "prefill", behaviour=prefill, root=root)
        await harness.add("d2", "decode", root=root)
        second = await post_later(harness, max_tokens=6)
        await until_waiting(harness, 1)
        assert not harness.movers["p2"].of(Stage)
        lose(harness, "p")
        assert await statuses(first, second) == [200, 200]
        assert sorted(leg["max_tokens"] for leg in harness.bodies("d2:leg")) == [5, 6]
        assert all("kv_transfer_params" in leg for leg in harness.bodies("d2:leg"))
        await harness.until(lambda: not harness.router.cluster.transfers)


async def test_a_full_kv_cache_makes_the_next_one_wait() -> None:
    """The decode engine has room for one prompt more than fits, and not for two."""
    release = asyncio.Event()

    async def decode(request: Any, answer_to: dict[str, Any]) -> Any:
        await release.wait()
        return await harness.d.server.answer(request, answer_to)

    async with Harness() as harness:
        await harness.add("p", "prefill")
        await harness.add("d", "decode", behaviour=decode, kv_tokens=5, max_model_len=30)
        first = await post_later(harness)
        await harness.until(lambda: bool(harness.bodies("d:leg")))
        second = await post_later(harness)
        await until_waiting(harness, 1)
        release.set()
        assert [(await task)[0] for task in (first, second)] == [200, 200]
        await harness.idle()


async def test_split_gives_the_slower_nic_less_as_measured() -> None:
    """Heartbeats tell what was read and how long it took; a plan follows from it."""
    prompt = list(range(1, 4 * BLOCK_TOKENS + 4))
    blocks = stored_blocks(prompt, 4)
    token_bytes = 64  # two layers, 64 bytes for a page of 2 tokens
    async with pair(blocks, mode="split", min_segment_blocks=1, heartbeat_s=30) as harness:
        for mover, rate in ((harness.p, 30_000), (harness.d, 10_000)):
            mover.say(Load(MoverStats()))
            read = MoverStats(storage_read_bytes=rate * token_bytes, storage_read_busy_s=1.0)
            engine = harness.router.cluster.by_id(mover.name)
            assert engine is not None
            await harness.until(lambda engine=engine: engine.num_loads == 1)
            engine.heartbeat(read, engine.last_seen_s + 1)
            assert engine.read_rate.rate == rate
        await harness.post(body(prompt=prompt))
        segments = harness.d.of(Stage)[0].segments
        assert [(part.reader, part.last_block) for part in segments] == [("p", 3), ("d", 4)]
        await harness.idle()


async def test_a_hit_that_is_computed_sooner_than_read_is_not_read() -> None:
    """With ``recompute``, the rate of computing and measured rates of reading."""
    async with pair(
        stored_blocks(IDS, 3), recompute=True, prefill_tokens_per_s=1e9, heartbeat_s=30
    ) as harness:
        await harness.post(body())
        assert harness.d.of(Stage)[0].num_hit_blocks == 3  # nothing is known of reading yet
        engine = harness.router.cluster.by_id("p")
        assert engine is not None
        engine.heartbeat(MoverStats(), 1.0)
        slow = MoverStats(storage_read_bytes=5000 * 64, storage_read_busy_s=1.0)
        engine.heartbeat(slow, 2.0)
        await harness.post(body())
        assert harness.d.of(Stage)[1].num_hit_blocks == 0
        await harness.idle()


async def test_a_place_that_comes_when_its_request_has_left_is_given_back() -> None:
    """Between the two there is a moment in which both are true."""
    line: Line[str] = Line()
    is_free = False
    discarded: list[str] = []

    def attempt(_line: WaitingLine) -> str | NotNow:
        return "place" if is_free else NotNow.NOT_NOW

    task = asyncio.create_task(line.place(1, attempt, discarded.append, 5))
    await asyncio.sleep(0)
    assert len(line) == 1
    is_free = True
    line._advance()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (discarded, len(line)) == (["place"], 0)


async def test_an_attempt_that_fails_fails_its_request_alone() -> None:
    """An error in placing one request is that request's, and the line goes on."""
    line: Line[str] = Line()
    is_free = False

    def broken(_line: WaitingLine) -> NotNow:
        if is_free:
            raise RuntimeError("a bug")
        return NotNow.NOT_NOW

    first = asyncio.create_task(line.place(1, broken, lambda _place: None, 5))
    await asyncio.sleep(0)
    second = asyncio.create_task(line.place(1, lambda _line: "place", lambda _place: None, 5))
    await asyncio.sleep(0)
    is_free = True
    line.wake()
    assert await second == "place"
    with pytest.raises(RuntimeError, match="a bug"):
        await first


async def test_recompute_needs_a_rate() -> None:
    """What recomputing costs is the user's to say: without it start is refused."""
    with pytest.raises(ValueError, match="recompute needs prefill_tokens_per_s"):
        Harness(recompute=True)
