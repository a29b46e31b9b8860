"""Who reads is settled when both sides have slots, not before: `split` alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_dualpath.messages import Message, Reserve, Stage, TransferFailed
from vllm_dualpath.router.engine import Engine

from .cluster import BLOCK_TOKENS, Harness, pair, stored_blocks
from .test_good_case import body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

PROMPT = list(range(1, 8 * BLOCK_TOKENS + 4))
BLOCKS = stored_blocks(PROMPT, 8)
SPLIT: dict[str, Any] = {"mode": "split", "min_segment_blocks": 1, "heartbeat_s": 30}


def engine(harness: Harness, name: str) -> Engine:
    """As the router knows it."""
    found = harness.router.cluster.by_id(name)
    assert found is not None
    return found


def queues(harness: Harness) -> list[int]:
    """Tokens that p and d are to read."""
    return [engine(harness, name).read_queue_tokens for name in ("p", "d")]


def parts(harness: Harness) -> list[tuple[str, int]]:
    """(reader, last block) of what both sides were told to stage, once."""
    stages = [*harness.p.of(Stage), *harness.d.of(Stage)]
    assert len(stages) == 2
    assert stages[0].segments == stages[1].segments
    return [(part.reader, part.last_block) for part in stages[0].segments]


async def waits_for_slots(harness: Harness) -> asyncio.Task[tuple[int, bytes]]:
    """A request that was placed; its decode slots come with ``slots_come``."""
    harness.d.script = lambda message: isinstance(message, Reserve)
    request = asyncio.create_task(harness.post(body(prompt=PROMPT)))
    await harness.until(lambda: bool(harness.d.of(Reserve)))
    return request


def slots_come(harness: Harness, holds: type[Message] | None = None) -> None:
    """What of d ``holds`` is answered by the test."""
    harness.d.script = lambda message: holds is not None and isinstance(message, holds)
    harness.d.respond(harness.d.of(Reserve)[0])


async def test_what_is_read_when_the_slots_come_decides() -> None:
    """A queue that has grown since the request was placed gets less of it."""
    async with pair(BLOCKS, **SPLIT) as harness:
        request = await waits_for_slots(harness)
        assert queues(harness) == [0, 0], "what has no slots is not about to be read"
        engine(harness, "p").add_reads(4 * BLOCK_TOKENS)
        harness.p.script = lambda message: isinstance(message, Stage)
        slots_come(harness, holds=Stage)
        await harness.until(lambda: bool(harness.p.of(Stage)) and bool(harness.d.of(Stage)))
        assert queues(harness) == [4 * BLOCK_TOKENS, 8 * BLOCK_TOKENS], "from here on it weighs"
        engine(harness, "p").add_reads(-4 * BLOCK_TOKENS)
        for mover in (harness.p, harness.d):
            mover.script = lambda _message: False
            mover.respond(mover.of(Stage)[0])
        assert (await request)[0] == 200
        # Idle, each would have read four; four were read lately besides those that wait.
        assert parts(harness) == [("d", 8)]
        _, metrics = await harness.get("/metrics")
        assert 'planned_tokens_total{reader_role="decode"} 32.0' in metrics
        await harness.idle()
        assert queues(harness) == [0, 0]


async def test_other_modes_decide_when_they_place() -> None:
    """Their queues count from then on, as the paper's do."""
    async with pair(BLOCKS, mode="dual", heartbeat_s=30) as harness:
        request = await waits_for_slots(harness)
        assert queues(harness) == [8 * BLOCK_TOKENS, 0]
        engine(harness, "p").add_reads(100)
        slots_come(harness)
        await harness.until(lambda: bool(harness.p.of(Stage)))
        engine(harness, "p").add_reads(-100)
        assert (await request)[0] == 200
        assert parts(harness) == [("p", 8)]
        await harness.idle()
        assert queues(harness) == [0, 0]


@pytest.mark.parametrize("joins", [True, False])
async def test_other_engines_meanwhile(joins: bool) -> None:
    """One more joins: the pair is looked up among them. One of the pair serves no more: as it was
    divided when the request was placed, and it weighs on both all the same.
    """
    async with pair(BLOCKS, **SPLIT) as harness:
        request = await waits_for_slots(harness)
        if joins:
            await harness.add("a", "prefill")
        else:
            harness.router.cluster.set_serving(engine(harness, "p"), False)
        slots_come(harness)
        await harness.until(lambda: bool(harness.p.of(Stage)))
        assert (await request)[0] == 200
        assert parts(harness) == [("p", 4), ("d", 8)]
        await harness.idle()
        assert queues(harness) == [0, 0]


async def test_a_retry_weighs_on_its_reader_when_it_has_slots() -> None:
    """Not before, as any other request; and it is not divided again: another reader is tried."""
    async with pair(BLOCKS, **SPLIT) as harness:

        def fail(message: Message) -> bool:
            if isinstance(message, Stage) and message.key.attempt == 0:
                harness.d.say(TransferFailed(message.key, "io_error"))
                return True
            return isinstance(message, Reserve) and message.key.attempt == 1

        harness.d.script = fail
        harness.p.script = lambda message: isinstance(message, Stage) and message.key.attempt == 0
        request = asyncio.create_task(harness.post(body(prompt=PROMPT)))
        await harness.until(lambda: len(harness.d.of(Reserve)) == 2)
        assert queues(harness) == [0, 0]
        engine(harness, "p").add_reads(100)
        harness.d.script = lambda _message: False
        harness.d.respond(harness.d.of(Reserve)[1])
        await harness.until(lambda: len(harness.p.of(Stage)) == 2)
        engine(harness, "p").add_reads(-100)
        assert (await request)[0] == 200
        assert [part.reader for part in harness.p.of(Stage)[1].segments] == ["p"]
        await harness.idle()


async def test_a_client_that_leaves_before_the_slots_come_leaves_nothing() -> None:
    """Slots that are granted later are for nobody: no read is planned."""
    async with pair(BLOCKS, **SPLIT) as harness:
        request = await waits_for_slots(harness)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        slots_come(harness)
        await harness.idle()
        assert queues(harness) == [0, 0]
        assert harness.p.of(Stage) == []
