"""What goes wrong, and that the client still gets its answer and nothing stays open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

import aiohttp
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from vllm_dualpath.messages import (
    Committed,
    Cut,
    CutDone,
    End,
    Ended,
    Goodbye,
    Load,
    Message,
    MoverStats,
    PeerDied,
    Ping,
    Pong,
    Refused,
    Reserve,
    SegmentDone,
    Stage,
    TransferFailed,
    Welcome,
    encode,
)

from .cluster import Harness, pair, stored_blocks, wire_key
from .test_good_case import IDS, body

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


def failing_stage(harness: Harness, name: str, times: int) -> None:
    """Let a mover answer its first ``times`` Stage messages with TransferFailed."""
    mover = harness.movers[name]

    def script(message: Message) -> bool:
        if not isinstance(message, Stage) or len(mover.of(Stage)) > times:
            return False
        mover.say(TransferFailed(message.key, "io_error"))
        return True

    mover.script = script


async def ends_without_drain(harness: Harness) -> None:
    await harness.idle()
    for mover in (harness.p, harness.d):
        assert not any(end.drain for end in mover.of(End))


async def count_of(harness: Harness, line: str) -> bool:
    _, text = await harness.get("/metrics")
    return f"{line} 1.0" in text


async def test_other_reader_then_no_hits_then_alone() -> None:
    """The fallbacks in their order: the other reader, no hits, the decode engine alone."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        failing_stage(harness, "p", 9)
        status, content = await harness.post(body())
        assert status == 200
        assert b"from d" in content
        await ends_without_drain(harness)
        stages = harness.p.of(Stage)
        plans = [[(part.reader, part.last_block) for part in stage.segments] for stage in stages]
        assert plans == [[("p", 3)], [("d", 3)], []]
        assert [stage.key.attempt for stage in stages] == [0, 1, 2]
        assert len({stage.key.transfer for stage in stages}) == 1
        assert harness.bodies("p:leg") == []
        assert harness.bodies("d:leg") == [body()]
        assert len(harness.p.of(End)) == len(harness.d.of(End)) == 3
        assert await count_of(harness, 'dualpath_router_requests_total{outcome="alone"}')


async def test_second_attempt_can_succeed() -> None:
    """One failed attempt costs one more; the legs carry the attempt that worked."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        failing_stage(harness, "p", 1)
        await harness.post(body())
        (leg,) = harness.bodies("d:leg")
        assert leg["kv_transfer_params"]["dualpath"]["attempt"] == 1
        await harness.idle()
        assert [end.drain for end in harness.d.of(End)] == [False, True]


async def test_no_slots_means_alone() -> None:
    """A reservation that fails is not tried again with another reader: it needs the same slots."""
    async with pair(stored_blocks(IDS, 3)) as harness:

        def refuse(message: Message) -> bool:
            if isinstance(message, Reserve):
                harness.p.say(TransferFailed(message.key, "no slots"))
            return isinstance(message, Reserve)

        harness.p.script = refuse
        await harness.post(body())
        assert harness.bodies("d:leg") == [body()]
        assert len(harness.d.of(Reserve)) == 1
        await ends_without_drain(harness)


async def test_silent_reader_is_noticed_by_the_router() -> None:
    """A reader that says nothing at all is given up after a multiple of stage_s."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only", deadlines={"stage_s": 0.2}) as h:
        h.p.script = lambda message: isinstance(message, Stage) and len(h.p.of(Stage)) == 1
        await h.post(body())
        readers = [[part.reader for part in stage.segments] for stage in h.p.of(Stage)]
        assert readers == [["p"], ["d"]]
        await h.idle()


async def test_bad_block_cuts_the_hit() -> None:
    """A bad block k: Cut(k) to D, on its CutDone to P, and the legs say k."""
    async with pair(stored_blocks(IDS, 4), mode="prefill_only") as harness:

        def bad_block(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.p.say(SegmentDone(message.key, 0, 4, 2, "corrupt"))
            return isinstance(message, Stage)

        harness.p.script = bad_block
        await harness.post(body())
        assert harness.events("Cut") == ["d:Cut", "p:Cut"]
        assert [cut.num_hit_blocks for cut in harness.d.of(Cut)] == [2]
        for name in ("p", "d"):
            (leg,) = harness.bodies(f"{name}:leg")
            assert leg["kv_transfer_params"]["dualpath"]["num_hit_blocks"] == 2
        await harness.idle()


async def test_cuts_only_go_down() -> None:
    """Two bad segments: the lower cut wins, and an answer to the higher one is not passed on."""
    async with pair(stored_blocks(IDS, 4), mode="split") as harness:
        held: list[Cut] = []

        def p_script(message: Message) -> bool:
            if isinstance(message, Stage):
                harness.d.say(SegmentDone(message.key, 2, 4, 3, "missing"))
            return isinstance(message, Stage)

        def d_script(message: Message) -> bool:
            if isinstance(message, Cut):
                held.append(message)
                if len(held) == 1:
                    harness.p.say(SegmentDone(message.key, 0, 2, 1, "corrupt"))
                else:
                    for cut in held:
                        harness.d.say(CutDone(cut.key, cut.num_hit_blocks))
            return isinstance(message, Cut | Stage)

        harness.p.script, harness.d.script = p_script, d_script
        await harness.post(body())
        assert [cut.num_hit_blocks for cut in held] == [3, 1]
        assert [cut.num_hit_blocks for cut in harness.p.of(Cut)] == [1]
        await harness.idle()


async def test_lost_mover_during_staging() -> None:
    """A mover that falls silent fails the attempt; the client is answered by the decode engine."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:

        def die(message: Message) -> bool:
            harness.p.heartbeats = False
            return True

        harness.p.script = die
        status, _ = await harness.post(body())
        assert status == 200
        assert harness.bodies("d:leg") == [body()]
        await harness.until(lambda: bool(harness.d.of(PeerDied)))
        assert harness.d.of(PeerDied)[0].boot_id == harness.p.boot_id
        await harness.idle()


async def test_lost_decode_mover_still_answers() -> None:
    """The decode engine's mover is gone but vLLM is there: it answers without a transfer."""
    async with pair(stored_blocks(IDS, 3)) as harness:

        def die(message: Message) -> bool:
            harness.d.heartbeats = False
            return True

        harness.d.script = die
        status, _ = await harness.post(body())
        assert status == 200
        assert harness.bodies("d:leg") == [body()]
        await harness.until(lambda: not harness.serving("d"))
        status, _ = await harness.post(body())
        assert status == 200


@pytest.mark.parametrize("how", ["status", "connection"])
async def test_failing_prefill_leg(how: str) -> None:
    """A prefill engine that answers 500 or not at all: the decode engine computes everything."""
    async with pair(stored_blocks(IDS, 3)) as harness:

        async def fail(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            if how == "connection":
                assert request.transport is not None
                request.transport.abort()
            return web.Response(status=500)

        harness.p.server.behaviour = fail
        status, content = await harness.post(body())
        assert status == 200
        assert b"from d" in content
        assert harness.bodies("d:leg") == [body()]
        assert len(harness.bodies("p:leg")) == 1
        await ends_without_drain(harness)


async def test_rejection_by_the_prefill_leg_is_passed_on() -> None:
    """VLLM's own validation error reaches the client unchanged, and the transfer is ended."""
    async with pair() as harness:

        async def refuse(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"error": {"message": "too hot"}}, status=422)

        harness.p.server.behaviour = refuse
        status, content = await harness.post(body())
        assert (status, json.loads(content)) == (422, {"error": {"message": "too hot"}})
        assert harness.bodies("d:leg") == []
        await ends_without_drain(harness)
        assert await count_of(harness, 'dualpath_router_requests_total{outcome="rejected"}')


async def test_no_commit_in_time() -> None:
    """The leg returned but the decode side never commits: it answers without a load."""
    async with pair(deadlines={"commit_s": 0.2}) as harness:
        harness.p.server.behaviour = harness.p.server.answer
        status, _ = await harness.post(body())
        assert status == 200
        assert harness.bodies("d:leg") == [body()]
        await harness.idle()
        # What the prefill engine has saved is still pushed until the transfer is given up.
        assert [[end.drain for end in mover.of(End)] for mover in (harness.p, harness.d)] == [
            [True],
            [False],
        ]
        assert await count_of(harness, 'dualpath_router_attempts_failed_total{reason="ready"}')


async def test_no_commit_after_the_prefill_side_has_ended() -> None:
    """Nothing will be pushed any more: the commit is not waited for until its deadline."""
    async with pair(deadlines={"commit_s": 50.0}) as harness:
        harness.p.server.behaviour = harness.p.server.answer
        status, _ = await harness.post(body())
        assert status == 200
        assert harness.bodies("d:leg") == [body()]


async def test_failure_during_the_prefill_leg_cancels_it() -> None:
    """A transfer that fails while the prefill engine computes: the leg is closed, D goes alone."""
    async with pair() as harness:

        async def hang(_request: web.Request, leg: dict[str, Any]) -> web.StreamResponse:
            key = wire_key(leg["kv_transfer_params"]["dualpath"])
            harness.d.say(TransferFailed(key, "peer_lost"))
            await asyncio.sleep(30)
            return web.Response()

        harness.p.server.behaviour = hang
        status, _ = await harness.post(body())
        assert status == 200
        await asyncio.wait_for(harness.p.server.disconnected.wait(), 5)
        assert harness.bodies("d:leg") == [body()]
        await ends_without_drain(harness)


async def test_decode_engine_gone_before_the_first_byte() -> None:
    """Another decode engine answers; with none left the client gets a 502 with a reason."""
    async with pair() as harness:

        async def drop(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            assert request.transport is not None
            request.transport.abort()
            return response

        harness.d.server.behaviour = drop
        status, content = await harness.post(body(stream=True))
        assert status == 502
        assert json.loads(content)["error"]["type"] == "EngineLost"
        await harness.add("e", "decode")
        await harness.until(lambda: harness.serving("d"))
        status, content = await harness.post(body(stream=True))
        assert status == 200
        assert b"from e" in content
        await harness.idle()


async def test_stream_that_breaks_off_is_no_clean_end() -> None:
    """A decode engine that dies mid-stream: the client sees an error, no finished answer."""
    async with pair() as harness:

        async def die(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: {}\n\n")
            await asyncio.sleep(0.1)
            assert request.transport is not None
            request.transport.abort()
            return response

        harness.d.server.behaviour = die
        received = b""
        async with harness.client.post(
            harness.url + "/v1/completions", json=body(stream=True)
        ) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                async for chunk in response.content.iter_any():
                    received += chunk
        assert received.startswith(b"data: {}\n\n")
        assert b"broke off" in received
        assert b"[DONE]" not in received
        await harness.idle()


@pytest.mark.parametrize("moment", ["reserve", "stage", "prefill", "commit", "decode", "alone"])
async def test_client_leaves(moment: str) -> None:
    """Whenever the client leaves, its leg is closed and both movers hear End without drain."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        reached = asyncio.Event()

        async def hang(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            reached.set()
            await asyncio.sleep(30)
            return web.Response()

        def mute(kind: type[Message]) -> None:
            def script(message: Message) -> bool:
                if isinstance(message, kind):
                    reached.set()
                return isinstance(message, kind)

            harness.p.script = script

        async def no_commit(request: web.Request, leg: dict[str, Any]) -> web.StreamResponse:
            reached.set()
            return await harness.p.server.answer(request, leg)

        if moment in ("reserve", "stage"):
            mute({"reserve": Reserve, "stage": Stage}[moment])
        elif moment == "prefill":
            harness.p.server.behaviour = hang
        elif moment == "commit":
            harness.p.server.behaviour = no_commit
        else:
            harness.d.server.behaviour = hang
        extra = {"echo": True} if moment == "alone" else {}
        call = asyncio.ensure_future(harness.post(body(**extra)))
        await asyncio.wait_for(reached.wait(), 5)
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        if moment in ("prefill", "decode", "alone"):
            server = harness.p.server if moment == "prefill" else harness.d.server
            await asyncio.wait_for(server.disconnected.wait(), 5)
        await harness.idle()
        if moment != "alone":
            assert [end.drain for end in harness.d.of(End)] == [False]
            assert len(harness.p.of(End)) == 1
        assert await count_of(harness, 'dualpath_router_requests_total{outcome="cancelled"}')


async def test_a_client_that_leaves_a_stream_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Writing to a connection that closes ends the request as cancelled, without a traceback."""
    async with pair() as harness:

        async def stream(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):  # the router has closed it
                while True:
                    await response.write(b"data: {}\n\n" * 10_000)
                    await asyncio.sleep(0)
            return response

        harness.d.server.behaviour = stream
        for _ in range(5):
            async with harness.client.post(
                f"{harness.url}/v1/completions", json=body(stream=True)
            ) as response:
                assert await response.content.readany()
                response.close()
            await harness.idle()
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
        _, text = await harness.get("/metrics")
        assert 'dualpath_router_requests_total{outcome="cancelled"} 5.0' in text


async def test_no_engine_is_a_503_with_a_reason() -> None:
    """Nobody there: requests and health say so after the configured wait."""
    async with Harness(engine_wait_s=0.1) as harness:
        for path in ("/v1/completions", "/v1/embeddings"):
            status, content = await harness.post(body(), path)
            assert status == 503
            assert "engine" in json.loads(content)["error"]["message"]
        status, answer = await harness.get("/health")
        assert (status, answer["decode"]) == (503, 0)
        assert "decode" in answer["reason"]


async def test_request_waits_for_a_lost_engine() -> None:
    """An engine that comes while a request waits serves it."""
    async with Harness(engine_wait_s=5.0) as harness:
        call = asyncio.ensure_future(harness.post(body()))
        await asyncio.sleep(0.1)
        await harness.add("d", "decode")
        assert (await call)[0] == 200
        assert (await harness.get("/health"))[0] == 200


async def test_restarted_mover_replaces_the_old_one() -> None:
    """A new boot id fails the old one's transfers, and the peers hear of its death."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        old = harness.p
        old.script = lambda message: isinstance(message, Stage)
        call = asyncio.ensure_future(harness.post(body()))
        await harness.until(lambda: bool(old.of(Stage)))
        old.heartbeats = False
        await harness.add("p", "prefill")
        assert (await call)[0] == 200
        assert harness.p is not old
        assert [died.boot_id for died in harness.d.of(PeerDied)] == [old.boot_id]
        await harness.post(body())
        (leg,) = harness.bodies("p:leg")
        assert leg["kv_transfer_params"]["dualpath"]["boot_id"] == harness.p.boot_id.hex()
        await harness.idle()
        await old.stop()
        await old.server.stop()


async def test_goodbye_takes_an_engine_out() -> None:
    """After Goodbye no request is planned with the engine."""
    async with pair() as harness:
        harness.p.heartbeats = False
        harness.p.say(Goodbye("stopping"))
        await harness.until(lambda: not harness.serving("p"))
        assert (await harness.post(body()))[0] == 200
        assert harness.d.of(Reserve) == []


async def test_given_up_mover_is_told_to_start_anew() -> None:
    """A mover that was only slow hears another router boot id, as if the router were new."""
    async with pair() as harness:
        harness.p.heartbeats = False
        await harness.until(lambda: not harness.serving("p"))
        first = harness.p.router_boot_ids[0]
        harness.p.say(Load(MoverStats()))
        await harness.until(lambda: harness.p.received[-1].__class__.__name__ == "Pong")
        told = harness.p.received[-1].router_boot_id
        assert told != first
        harness.p.heartbeats = True
        harness.p.say(harness.p.hello())
        await harness.until(lambda: harness.serving("p"))
        assert harness.p.of(Welcome)[-1].router_boot_id == told


async def test_a_message_of_a_mover_that_was_lost() -> None:
    """A heartbeat counts more messages than came: its transfers end, here and at the mover."""
    async with pair(engine_wait_s=5) as harness:
        call = await _post_without_slots(harness)
        harness.d.say(Load(MoverStats(), 1000))
        await harness.until(lambda: _hears_another_router(harness))
        harness.d.hello_changes = {"registration": 1}
        harness.d.say(harness.d.hello())
        assert (await call)[0] == 200
        await harness.idle()


async def test_a_message_to_a_mover_that_was_lost() -> None:
    """A mover that missed one registers anew: what the router thinks is under way there is not."""
    async with pair(engine_wait_s=5) as harness:
        call = await _post_without_slots(harness)
        harness.d.hello_changes = {"registration": 1}
        harness.d.say(harness.d.hello())
        await harness.until(lambda: len(harness.d.router_boot_ids) == 2)
        assert harness.d.router_boot_ids[0] != harness.d.router_boot_ids[1]
        assert (await call)[0] == 200
        await harness.idle()


async def test_the_router_counts_what_it_sends() -> None:
    """Each Pong says how many messages came before it, so that a mover can tell."""
    async with pair() as harness:
        assert (await harness.post(body()))[0] == 200
        num_pongs = len(harness.d.of(Pong))
        await harness.until(lambda: len(harness.d.of(Pong)) > num_pongs + 1)
        count = 0
        for message in harness.d.received:
            count += not isinstance(message, Ping | Pong)
            if isinstance(message, Welcome | Pong):
                assert message.num_sent == count
        assert count > 3


async def test_a_mover_that_never_heard_its_welcome() -> None:
    """Nor then what came after it: the engine begins anew, and tells again what is stored."""
    async with pair() as harness:
        assert (await harness.post(body()))[0] == 200
        heard = harness.router.cluster.by_id("d")
        assert heard is not None
        harness.d.hello_changes = {"num_sent": heard.num_heard + 1}
        harness.d.say(harness.d.hello())
        await harness.until(lambda: harness.router.cluster.by_id("d") is not heard)
        assert (await harness.post(body()))[0] == 200


async def test_a_mover_that_begins_anew_tells_again_what_is_stored() -> None:
    """What it had stored may be among what was lost."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        await harness.until(lambda: harness.router.cluster.stores.num_pending == 0)
        before = len(harness.d.of(Welcome))
        harness.d.blocks = list(stored_blocks(IDS, 3))
        harness.d.hello_changes = {"registration": 1}
        harness.d.say(harness.d.hello())
        await harness.until(lambda: len(harness.d.of(Welcome)) > before)
        assert harness.d.of(Welcome)[-1].send_snapshot
        await harness.until(lambda: harness.router.cluster.stores.num_pending == 0)


async def _post_without_slots(harness: Harness) -> asyncio.Future[tuple[int, bytes]]:
    """A request whose first ``Reserve`` the decode mover never answers."""
    harness.d.script = lambda message: isinstance(message, Reserve)
    call = asyncio.ensure_future(harness.post(body()))
    await harness.until(lambda: bool(harness.d.of(Reserve)))
    harness.d.script = lambda _message: False
    return call


def _hears_another_router(harness: Harness) -> bool:
    (welcome,) = harness.d.of(Welcome)
    return any(pong.router_boot_id != welcome.router_boot_id for pong in harness.d.of(Pong))


async def test_malformed_messages_are_counted() -> None:
    """Rubbish, and a Hello under a foreign identity, are dropped and counted; the rest goes on."""
    async with pair() as harness:
        harness.d.say_bytes(b"rubbish")
        harness.d.say_bytes(encode(Load(MoverStats()))[:-1])
        harness.d.say(harness.p.hello())
        await harness.until(lambda: harness.router.cluster.rejected_messages == 3)
        _, text = await harness.get("/metrics")
        assert "dualpath_router_rejected_messages_total 3.0" in text
        assert (await harness.post(body()))[0] == 200


async def test_messages_about_foreign_transfers_are_ignored() -> None:
    """A mover cannot move a transfer that it takes no part in."""
    async with pair() as harness:
        other = await harness.add("z", "prefill")

        async def forge(request: web.Request, leg: dict[str, Any]) -> web.StreamResponse:
            key = wire_key(leg["kv_transfer_params"]["dualpath"])
            other.say(TransferFailed(key, "forged"))
            other.say(Committed(key))
            await asyncio.sleep(0.1)
            harness.d.say(Committed(key))
            return await harness.p.server.answer(request, leg)

        harness.p.server.behaviour = forge
        await harness.post(body())
        assert "dualpath" in harness.bodies("d:leg")[0]["kv_transfer_params"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "other"}, "model: expected m"),
        ({"version": 999}, "protocol version: expected"),
        ({"fingerprint": bytes([1]) * 32}, "fingerprint: expected"),
        ({"role": "both"}, "role: expected"),
    ],
)
async def test_incompatible_engine_is_refused(change: dict[str, Any], expected: str) -> None:
    """The refusal names what was expected and found."""
    async with Harness() as harness:
        await harness.add("d", "decode")
        stranger = harness.movers["x"] = type(harness.d)(
            harness, harness.d.server, change.pop("role", "prefill"), engine_id="x", **change
        )
        stranger.start()
        await harness.until(lambda: bool(stranger.of(Refused)))
        assert expected in stranger.of(Refused)[0].reason
        assert harness.router.cluster.by_id("x") is None


async def test_other_root_is_never_paired() -> None:
    """Engines whose weights were reset apart share nothing: the decode engine works alone."""
    async with Harness() as harness:
        await harness.add("p", "prefill", root=bytes([7]) * 32)
        await harness.add("d", "decode")
        assert (await harness.post(body()))[0] == 200
        assert harness.d.of(Reserve) == []


async def test_new_router_makes_movers_register_again() -> None:
    """A mover that a router does not know hears its boot id and can say Hello."""
    async with Harness() as harness:
        context = zmq.asyncio.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.IDENTITY, b"\0" + secrets.token_bytes(15))
        stranger.connect(harness.config.control)
        await stranger.send(encode(Load(MoverStats())))
        answer = await asyncio.wait_for(stranger.recv(), 5)
        assert b"Pong" in answer
        stranger.close(0)
        context.term()


async def test_stuck_transfer_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A transfer whose mover never says Ended is warned of once, with its ids."""
    async with pair(deadlines={"stuck_warning_s": 0.3}) as harness:
        harness.p.script = lambda message: isinstance(message, End)
        with caplog.at_level(logging.WARNING, "vllm_dualpath"):
            await harness.post(body())
            await harness.until(lambda: bool(harness.d.of(End)))
            (end,) = harness.d.of(End)
            await asyncio.sleep(1.0)
        lines = [record.getMessage() for record in caplog.records if "is open" in record.message]
        assert len(lines) == 1
        assert str(end.key) in lines[0]
        assert "waiting for the end at p" in lines[0]
        harness.p.say(Ended(end.key))
        await harness.idle()


async def test_bad_url_of_one_engine() -> None:
    """An address that nobody can connect to is refused; the router lives on."""
    async with pair() as harness:
        running = asyncio.ensure_future(harness.router.run())
        for name, url in (("x", "http://127.0.0.1:99999"), ("y", "localhost:8000"), ("z", "")):
            stranger = harness.movers[name] = type(harness.d)(
                harness, harness.d.server, "decode", engine_id=name, url=url
            )
            stranger.start()
            await harness.until(lambda each=stranger: bool(each.of(Refused)))
            assert "url: expected" in stranger.of(Refused)[0].reason
        assert (await harness.post(body()))[0] == 200
        assert not running.done()
        running.cancel()


async def test_two_engines_of_one_name() -> None:
    """The first one is told by name why it is out, and does not take the name back."""
    async with pair() as harness:
        first = harness.d
        second = await harness.add("d", "decode")
        await harness.until(lambda: bool(first.of(Refused)))
        assert "give each engine a name of its own" in first.of(Refused)[0].reason
        first.heartbeats = False
        first.say(first.hello())
        await harness.until(lambda: len(first.of(Refused)) > 1)
        assert harness.router.cluster.by_id("d").boot_id == second.boot_id
        second.heartbeats = False
        second.say(Goodbye("stopping"))
        await harness.until(lambda: harness.router.cluster.by_id("d") is None)
        first.say(first.hello())
        await harness.until(lambda: harness.serving("d"))
        await first.stop()
        await first.server.stop()


async def test_new_root_ends_the_transfers_of_its_mover() -> None:
    """A mover that registers anew under its boot id hears another router: it ends what is open."""
    async with pair(engine_wait_s=5) as harness:
        harness.p.script = lambda message: isinstance(message, Stage)
        call = asyncio.ensure_future(harness.post(body()))
        await harness.until(lambda: bool(harness.d.of(Stage)))
        harness.d.hello_changes = {"root": bytes([7]) * 32}
        harness.d.say(harness.d.hello())
        await harness.until(lambda: len(harness.d.router_boot_ids) == 2)
        assert harness.d.router_boot_ids[0] != harness.d.router_boot_ids[1]
        assert (await call)[0] == 200
        await harness.idle()


async def test_silent_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that accepts and never answers delays a request, and is asked no more."""
    monkeypatch.setattr("vllm_dualpath.router.upstream._ANSWER_S", 0.3)
    async with pair() as harness:
        await harness.add("d2", "decode")
        await harness.d.server.stop()
        writers: list[asyncio.StreamWriter] = []
        silent = await asyncio.start_server(
            lambda _reader, writer: writers.append(writer), "127.0.0.1", harness.d.server.port
        )
        for _ in range(2):
            assert (await harness.post(body(prompt="some text")))[0] == 200
        assert not harness.serving("d")
        for writer in writers:
            writer.close()
        silent.close()


async def test_router_that_stood_still_loses_nobody() -> None:
    """A blocked event loop hears no heartbeat: that is not the movers' silence."""
    async with pair() as harness:
        engines = harness.router.cluster.engines
        time.sleep(5 * harness.config.heartbeat_s)  # noqa: ASYNC251 - that is the point
        await asyncio.sleep(2 * harness.config.heartbeat_s)
        assert harness.router.cluster.engines == engines
        assert not any(engine.lost.is_set() for engine in engines)


async def test_huge_n_takes_no_slots() -> None:
    """What no message can carry goes to vLLM, which refuses it."""
    async with pair() as harness:
        for n in (1 << 33, 1 << 70):
            assert (await harness.post(body(n=n)))[0] == 200
        assert harness.d.of(Reserve) == []
