"""A request that is transferred: who hears what, in which order, and what the client gets."""

from __future__ import annotations

import asyncio
import json

import pytest

from vllm_dualpath.blocks import chain_hashes, chain_root, prompt_digest
from vllm_dualpath.messages import (
    Dropped,
    End,
    Evict,
    GeometrySpec,
    Reserve,
    SegmentDone,
    Stage,
    Stored,
)

from .cluster import BLOCK_TOKENS, ROOT, Harness, pair, stored_blocks

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

IDS = list(range(100, 118))
"""18 tokens: four full blocks and two tokens."""


def body(**changes: object) -> dict[str, object]:
    return {"model": "m", "prompt": IDS, "max_tokens": 5, **changes}


async def test_order_of_a_transfer() -> None:
    """Decode slots before prefill slots, Stage to both at once, each leg before its end."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        status, content = await harness.post(body())
        assert status == 200
        assert b"from d" in content
        await harness.idle()
        events = harness.events("Reserve", "Stage", "leg")
        assert events[:2] == ["d:Reserve", "p:Reserve"]
        # The prefill leg may be there before the decode mover has been heard to get its Stage.
        assert sorted(events[2:5]) == ["d:Stage", "p:Stage", "p:leg"]
        assert events.index("p:Stage") < events.index("p:leg")
        assert events[5:] == ["d:leg"]
        assert [end.drain for end in harness.p.of(End) + harness.d.of(End)] == [True, True]
        ends = harness.events("End", "leg")
        assert ends.index("p:leg") < ends.index("p:End")
        assert ends.index("d:leg") < ends.index("d:End")


async def test_stage_tells_everything() -> None:
    """Stage carries plan, hashes, digest, the peer's slots, and n to the decode side."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        await harness.post(body(n=3))
        (to_p,), (to_d,) = harness.p.of(Stage), harness.d.of(Stage)
        assert (to_p.pool, to_d.pool) == ("prefill", "decode")
        assert (to_p.num_releases, to_d.num_releases) == (1, 3)
        for stage in (to_p, to_d):
            assert stage.num_tokens == len(IDS)
            assert stage.num_hit_blocks == 3
            assert stage.block_hashes == tuple(chain_hashes(ROOT, IDS, BLOCK_TOKENS))
            assert stage.digest == prompt_digest(ROOT, IDS)
            assert [part.reader for part in stage.segments] == ["p"]
        assert to_p.peer.boot_id == harness.d.boot_id
        assert to_p.peer.slots == tuple(range(5))
        assert to_d.peer.address == b"address of p"
        (first,), (second,) = harness.d.of(Reserve), harness.p.of(Reserve)
        assert first.peer.slots == ()
        assert second.peer.slots == tuple(range(5))


async def test_bodies_of_both_legs() -> None:
    """The prefill leg is one unstreamed token; the decode leg is the client's with our params."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        params = {"do_remote_prefill": True, "dualpath": {"forged": 1}, "other": 2}
        await harness.post(
            body(
                n=2,
                min_tokens=3,
                logprobs=2,
                stop=["x"],
                seed=4,
                response_format={"type": "json_object"},
                kv_transfer_params=params,
            )
        )
        (prefill,), (decode,) = harness.bodies("p:leg"), harness.bodies("d:leg")
        assert prefill.keys() == {"model", "prompt", "max_tokens", "n", "kv_transfer_params"}
        assert (prefill["max_tokens"], prefill["n"], prefill["prompt"]) == (1, 1, IDS)
        assert prefill["kv_transfer_params"].keys() == {"dualpath"}
        leg = prefill["kv_transfer_params"]["dualpath"]
        assert leg["boot_id"] == harness.p.boot_id.hex()
        assert (leg["num_hit_blocks"], leg["num_tokens"], leg["attempt"]) == (3, len(IDS), 0)
        assert decode["kv_transfer_params"].keys() == {"dualpath", "do_remote_prefill"}
        assert decode["kv_transfer_params"]["do_remote_prefill"] is True
        other = decode["kv_transfer_params"]["dualpath"]
        assert other["boot_id"] == harness.d.boot_id.hex()
        assert other["transfer"] == leg["transfer"]
        assert (decode["n"], decode["min_tokens"], decode["stop"]) == (2, 3, ["x"])


async def test_a_prompt_of_128k_ids_is_transferred() -> None:
    """The longest prompts go the way of all others: the same bytes in both legs, and one plan."""
    ids = [1000 + number % 8999 for number in range(128 * 1024)]
    spec = GeometrySpec(64, 16, (64, 64), "LBHNC", 1, "bfloat16")
    changes = {"geometry": spec, "max_model_len": 1 << 18, "num_slots": 4096}
    async with Harness() as harness:
        await harness.add("p", "prefill", **changes)
        await harness.add("d", "decode", **changes)
        large = asyncio.create_task(harness.post(body(prompt=ids)))
        small = asyncio.create_task(harness.post(body()))
        assert [(await task)[0] for task in (large, small)] == [200, 200]
        for server in ("p", "d"):
            prompts = [leg["prompt"] for leg in harness.bodies(f"{server}:leg")]
            assert sorted(prompts, key=len) == [IDS, ids]
        stage = max(harness.d.of(Stage), key=lambda each: each.num_tokens)
        assert stage.digest == prompt_digest(ROOT, ids)
        assert stage.block_hashes == tuple(chain_hashes(ROOT, ids, 64))
        await harness.idle()


async def test_chat_is_rendered_once_and_sent_as_ids() -> None:
    """A chat's ids come from an engine's renderer and go to both legs; tools stay."""
    async with pair() as harness:
        tools = [{"type": "function", "function": {"name": "f"}}]
        chat = {
            "model": "m",
            "messages": [{"role": "user", "content": "hello there"}],
            "tools": tools,
            "tool_choice": "required",
            "max_completion_tokens": 5,
            "reasoning_effort": "low",
        }
        status, _ = await harness.post(chat, "/v1/chat/completions")
        assert status == 200
        (rendered,) = harness.bodies("d:render")
        assert rendered == chat
        (prefill,), (decode,) = harness.bodies("p:leg"), harness.bodies("d:leg")
        ids = [ord(letter) for letter in "hello there"]
        for leg in (prefill, decode):
            assert leg["kv_transfer_params"]["prompt_token_ids"] == ids
            assert leg["messages"] == chat["messages"]
            assert leg["tools"] == tools
        assert prefill["tool_choice"] == "none"
        assert "max_completion_tokens" not in prefill
        assert decode["tool_choice"] == "required"


async def test_text_prompt_is_rendered_by_an_engine() -> None:
    """A text prompt costs one render call; what is refused there is left to the real endpoint."""
    async with pair() as harness:
        status, _ = await harness.post(body(prompt="some text"))
        assert status == 200
        assert harness.bodies("p:leg")[0]["prompt"] == [ord(letter) for letter in "some text"]
        await harness.post(body(prompt="refuse me"))
        assert harness.bodies("d:leg")[1] == body(prompt="refuse me")
        assert len(harness.bodies("p:leg")) == 1


async def test_engines_without_render_endpoints_tokenize() -> None:
    """The first render call is refused; from then on /tokenize is asked at once."""
    async with pair() as harness:
        harness.d.server.renders = False
        for _ in range(2):
            assert (await harness.post(body(prompt="some text")))[0] == 200
        assert harness.events("render", "tokenize") == ["d:render", "d:tokenize", "d:tokenize"]
        assert harness.bodies("p:leg")[1]["prompt"] == [ord(letter) for letter in "some text"]


async def test_cache_salt_makes_another_root() -> None:
    """A salted request has its own chain: it neither finds nor names anybody else's blocks."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        await harness.post(body(cache_salt="secret"))
        (stage,) = harness.d.of(Stage)
        assert stage.root == chain_root(ROOT, "secret")
        assert stage.num_hit_blocks == 0


async def test_at_least_one_token_is_computed() -> None:
    """A prompt that is stored to its last token keeps its last block uncounted."""
    async with pair(stored_blocks(IDS[:16], 4)) as harness:
        await harness.post(body(prompt=IDS[:16]))
        assert harness.d.of(Stage)[0].num_hit_blocks == 3


@pytest.mark.parametrize(("stored", "on_prefill", "expected"), [(3, 0, 12), (1, 9, 9)])
async def test_cached_tokens_are_true(stored: int, on_prefill: int, expected: int) -> None:
    """Usage reports what nobody computed, not what the decode engine took from staging."""
    async with pair(stored_blocks(IDS, stored)) as harness:
        harness.p.server.cached_tokens = on_prefill
        harness.d.server.cached_tokens = 17
        _, content = await harness.post(body())
        answer = json.loads(content)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected
        assert '"cached_tokens": 7' in answer["choices"][0]["text"]


async def test_stream_passes_byte_for_byte() -> None:
    """A stream arrives as the engine wrote it, but for the digits of the cached tokens."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        harness.d.server.cached_tokens = 17
        _, content = await harness.post(body(stream=True))
        async with harness.client.post(
            harness.d.server.url + "/v1/completions", json={"stream": True}
        ) as direct:
            expected = (await direct.read()).replace(b'cached_tokens": 17', b'cached_tokens": 12')
        assert content == expected
        assert harness.bodies("p:leg")[0].get("stream") is None


async def test_headers_of_both_legs() -> None:
    """Authorization, priority and trace headers reach both legs, with one request id."""
    sent = {
        "Authorization": "Bearer key",
        "X-Vllm-Priority": "3",
        "traceparent": "00-1-2-03",
        "X-Other": "stays",
    }
    async with pair() as harness:
        await harness.post(body(), headers=sent)
        (prefill,), (decode,) = harness.p.server.headers, harness.d.server.headers
        for leg in (prefill, decode):
            assert {name: leg[name] for name in sent if name != "X-Other"} == {
                name: value for name, value in sent.items() if name != "X-Other"
            }
            assert "X-Other" not in leg
        assert prefill["X-Request-Id"] == decode["X-Request-Id"] != ""
        await harness.post(body(), headers={"X-Request-Id": "mine"})
        assert harness.d.server.headers[-1]["X-Request-Id"] == "mine"


async def test_metrics_and_status() -> None:
    """Counters say what happened; the status shows engines with a fresh Load and no tokens."""
    async with pair(stored_blocks(IDS, 3), mode="prefill_only") as harness:
        await harness.post(body())
        await harness.idle()
        _, text = await harness.get("/metrics")
        assert 'dualpath_router_requests_total{outcome="transferred"} 1.0' in text
        assert 'dualpath_router_planned_tokens_total{reader_role="prefill"} 12.0' in text
        assert "dualpath_router_decision_seconds_count 1.0" in text
        assert 'dualpath_storage_nic_queue_tokens{engine="p"} 0.0' in text
        status, shown = await harness.get("/dualpath/status")
        assert status == 200
        assert (shown["mode"], shown["transfers"]) == ("prefill_only", [])
        assert [engine["role"] for engine in shown["engines"]] == ["decode", "prefill"]
        assert shown["engines"][0]["slots"]["free"] == 64
        assert shown["index"] == {
            "num_blocks": 3,
            "total_bytes": 3 * 8192,
            "snapshots_pending": 0,
        }


async def test_stored_and_dropped_blocks_change_the_plan() -> None:
    """The index follows the movers' events."""
    blocks = stored_blocks(IDS, 3)
    async with pair() as harness:
        harness.d.say(Stored(tuple(blocks)))
        await harness.until(lambda: harness.router.cluster.stores.num_blocks == 3)
        harness.p.say(Dropped((blocks[2].hash,), gone=True))
        await harness.until(lambda: harness.router.cluster.stores.num_blocks == 2)
        await harness.post(body())
        assert harness.d.of(Stage)[0].num_hit_blocks == 2
        # Unreadable, not gone: it still takes its place, but is no hit.
        harness.p.say(Dropped((blocks[1].hash,), gone=False))
        # Heard in order: once this one has gone, the one before has been taken in.
        harness.p.say(Dropped((blocks[0].hash,), gone=True))
        await harness.until(lambda: harness.router.cluster.stores.num_blocks == 1)
        harness.p.say(Stored((blocks[0],)))
        await harness.until(lambda: harness.router.cluster.stores.num_blocks == 2)
        await harness.post(body())
        assert harness.d.of(Stage)[1].num_hit_blocks == 1
        assert harness.router.cluster.stores.num_blocks == 2


async def test_dual_reads_where_the_queue_is_shorter() -> None:
    """A reader that has not finished keeps its tokens queued; the next plan reads elsewhere."""
    async with pair(stored_blocks(IDS, 3)) as harness:
        harness.p.script = lambda message: isinstance(message, Stage)
        first = harness.client.post(harness.url + "/v1/completions", json=body())
        waiting = asyncio.ensure_future(first)
        await harness.until(lambda: bool(harness.p.of(Stage)))
        engine = harness.router.cluster.by_id("p")
        assert engine is not None
        assert engine.read_queue_tokens == 12
        harness.p.script = lambda _message: False
        await harness.post(body())
        assert [part.reader for part in harness.p.of(Stage)[1].segments] == ["d"]
        key = harness.p.of(Stage)[0].key
        harness.p.say(SegmentDone(key, 0, 3, 3, ""))
        await harness.until(lambda: engine.read_queue_tokens == 0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await harness.idle()


async def test_over_quota_evicts_least_recently_used() -> None:
    """A store above its quota is brought below it, by one mover, children first."""
    blocks = stored_blocks(IDS, 4)
    async with Harness() as harness:
        await harness.add("d", "decode", store_quota_bytes=3 * 8192)
        harness.d.say(Stored(tuple(blocks)))
        await harness.until(lambda: bool(harness.d.of(Evict)))
        hashes = [h for order in harness.d.of(Evict) for h in order.hashes]
        assert hashes == [blocks[3].hash, blocks[2].hash]
