"""Mode ``pool``: engines that are no side of a request read a part of its hit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_dualpath.messages import (
    Cut,
    CutDone,
    Donate,
    End,
    Ended,
    Goodbye,
    Load,
    Message,
    MoverStats,
    Reserve,
    SegmentDone,
    Stage,
    TransferFailed,
)

from .cluster import Harness, ScriptedMover, pair, stored_blocks
from .test_good_case import IDS, body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

_BLOCKS = stored_blocks(IDS, 4)


@contextlib.asynccontextmanager
async def trio(**hello: Any) -> AsyncIterator[tuple[Harness, ScriptedMover]]:
    """A pair and ``x``, a second decode engine that other requests keep from being chosen."""
    async with pair(_BLOCKS, mode="pool", min_segment_blocks=1) as harness:
        x = await harness.add("x", "decode", _BLOCKS, **hello)
        yield harness, x


def ready_without_donors(harness: Harness) -> None:
    """Let the prefill mover be ready at once only where it does not wait for a donor's blocks."""

    def hold(message: Message) -> bool:
        return isinstance(message, Stage) and len(message.segments) > 2

    harness.p.script = hold


async def transferred(harness: Harness) -> None:
    status, content = await harness.post(body())
    assert status == 200
    assert b"from d" in content


async def test_a_donor_reads_its_part() -> None:
    """Both sides know the donor from the start, it gets their slots, and its blocks alone."""
    async with trio() as (harness, x):
        await transferred(harness)
        await harness.idle()
        for mover in (harness.p, harness.d):
            (reserve,), (stage,) = mover.of(Reserve), mover.of(Stage)
            assert [donor.boot_id for donor in reserve.donors] == [x.boot_id]
            readers = [(part.reader, part.last_block) for part in stage.segments]
            assert readers == [("p", 2), ("d", 3), ("x", 4)]
        (donate,) = x.of(Donate)
        assert [(part.first_block, part.last_block) for part in donate.segments] == [(3, 4)]
        assert donate.block_hashes == tuple(block.hash for block in _BLOCKS)
        assert donate.prefill.boot_id == harness.p.boot_id
        assert donate.decode.boot_id == harness.d.boot_id
        assert donate.prefill.slots == donate.decode.slots == tuple(range(5))
        assert x.of(End) == []
        events = harness.events("Reserve", "Donate", "Stage")
        assert events[:2] == ["d:Reserve", "p:Reserve"]
        _, metrics = await harness.get("/metrics")
        assert 'planned_tokens_total{reader_role="donor"} 4.0' in metrics


async def test_its_queue_counts() -> None:
    """What a donor has to read weighs on its node until it says that it has."""
    async with trio() as (harness, x):
        loads: list[int] = []

        def look(message: Message) -> bool:
            if isinstance(message, Donate):
                engine = harness.router.cluster.by_id("x")
                assert engine is not None
                loads.append(engine.read_queue_tokens)
            return False

        x.script = look
        await transferred(harness)
        assert loads == [4]
        await harness.idle()


@pytest.mark.parametrize("hello", [{"num_donor_slots": 0}, {"store": "file:///other"}])
async def test_who_is_no_donor(hello: dict[str, Any]) -> None:
    """An engine without donor slots, or over another store, reads for itself alone."""
    async with trio(**hello) as (harness, x):
        await transferred(harness)
        assert x.of(Donate) == []


async def test_stuck_donor_slots() -> None:
    """A mover whose donor slots are all stuck is asked for nothing until they are not."""
    async with trio() as (harness, x):
        for stuck, num_asked in ((True, 0), (False, 1)):
            x.heartbeats = False
            engine = harness.router.cluster.by_id("x")
            assert engine is not None
            x.say(Load(MoverStats(donor_slots_stuck=stuck)))
            await harness.until(lambda: engine.donates != stuck)  # noqa: B023
            await transferred(harness)
            assert len(x.of(Donate)) == num_asked
        await harness.idle()


async def test_a_donor_that_fails() -> None:
    """Another reader takes over, every mover is told to end, and the client gets its answer."""
    async with trio() as (harness, x):

        def fail(message: Message) -> bool:
            if isinstance(message, Donate):
                x.say(TransferFailed(message.key, "stalled"))
            return isinstance(message, Donate)

        x.script = fail
        ready_without_donors(harness)
        await transferred(harness)
        await harness.idle()
        plans = [[part.reader for part in stage.segments] for stage in harness.p.of(Stage)]
        assert plans == [["p", "d", "x"], ["p"]]
        await transferred(harness)
        await harness.idle()
        assert len(x.of(Donate)) == 1, "it is asked for nothing for a while"
        assert [end.drain for end in x.of(End)] == [False]
        assert [end.drain for end in harness.p.of(End)] == [False, True, True]


async def test_a_donor_that_leaves() -> None:
    """A donor that is gone before it has read its part fails the attempt, not the request."""
    async with trio() as (harness, x):

        def leave(message: Message) -> bool:
            if isinstance(message, Donate):
                x.say(Goodbye("test"))
            return isinstance(message, Donate)

        x.script = leave
        ready_without_donors(harness)
        await transferred(harness)
        await harness.idle()
        assert [len(stage.segments) for stage in harness.p.of(Stage)] == [3, 1]


async def test_a_donor_that_leaves_after_its_part() -> None:
    """What it read is there: nobody needs it any more."""
    async with trio() as (harness, x):
        held: list[Stage] = []

        def hold(message: Message) -> bool:
            if isinstance(message, Stage):
                held.append(message)
            return isinstance(message, Stage)

        harness.p.script = hold

        def leave(message: Message) -> bool:
            if isinstance(message, Donate):
                x.respond(message)
                x.say(Goodbye("test"))
            return isinstance(message, Donate)

        x.script = leave

        async def go_on() -> None:
            await harness.until(lambda: bool(held) and harness.router.cluster.by_id("x") is None)
            harness.p.respond(held[0])

        await asyncio.gather(transferred(harness), go_on())
        await harness.idle()
        assert len(harness.p.of(Stage)) == 1


async def test_a_cut_goes_to_every_writer_first() -> None:
    """The prefill side, which writes beyond the cut next, hears of it last."""
    async with trio() as (harness, x):

        def bad_block(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.d.say(SegmentDone(message.key, 2, 3, 2, "corrupt"))
            return isinstance(message, Stage)

        def slow(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.p.say(SegmentDone(message.key, 0, 2, 2, ""))
            return isinstance(message, Stage)

        harness.d.script, harness.p.script = bad_block, slow
        x.script = lambda message: isinstance(message, Donate | Cut)

        async def confirm_late() -> None:
            await harness.until(lambda: bool(x.of(Cut)))
            (transfer,) = harness.router.cluster.transfers.values()
            await harness.until(lambda: transfer._cut_by == {x.boot_id})
            assert harness.p.of(Cut) == []
            x.say(SegmentDone(transfer.key, 3, 4, 3, "cut"))
            x.say(CutDone(transfer.key, 2))
            x.say(Ended(transfer.key))

        await asyncio.gather(transferred(harness), confirm_late())
        await harness.idle()
        assert [cut.num_hit_blocks for cut in (*x.of(Cut), *harness.p.of(Cut))] == [2, 2]
        assert len(harness.p.of(Stage)) == 1


async def test_a_cut_meets_the_donors_end() -> None:
    """A donor that ended while its cut was on the way has nothing to confirm."""
    async with trio() as (harness, x):

        def bad_block(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.d.say(SegmentDone(message.key, 2, 3, 2, "corrupt"))
            return isinstance(message, Stage)

        def late(message: Message) -> bool:
            if isinstance(message, Cut):
                x.say(SegmentDone(message.key, 3, 4, 4, ""))
                x.say(Ended(message.key))
            return isinstance(message, Donate | Cut)

        def slow(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.p.say(SegmentDone(message.key, 0, 2, 2, ""))
            return isinstance(message, Stage)

        harness.d.script, x.script, harness.p.script = bad_block, late, slow
        await transferred(harness)
        await harness.idle()
        assert [cut.num_hit_blocks for cut in harness.p.of(Cut)] == [2]
        assert len(harness.p.of(Stage)) == 1


async def test_a_client_that_leaves_ends_the_donor() -> None:
    """The donor of a request that nobody waits for is told to stop."""
    async with trio() as (harness, x):
        x.script = lambda message: isinstance(message, Donate)
        asking = asyncio.create_task(harness.post(body()))
        await harness.until(lambda: bool(x.of(Donate)))
        asking.cancel()
        await harness.until(lambda: bool(x.of(End)))
        await harness.idle()
