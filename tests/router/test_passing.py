"""What is not transferred: other paths, requests that a transfer cannot serve, and the edges."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import aiohttp
import pytest
from yarl import URL

from vllm_dualpath.config import RouterConfig
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.messages import Goodbye, Reserve, Welcome
from vllm_dualpath.router import Router
from vllm_dualpath.router.eligibility import alone_reason
from vllm_dualpath.router.relay import end_to_end
from vllm_dualpath.router.tokenize import tokenize_request
from vllm_dualpath.router.usage import EventCorrector, correct_cached_tokens

from .cluster import Harness, free_port, pair, stored_blocks
from .test_good_case import IDS, body

pytestmark = [pytest.mark.timeout(60)]

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]
SLY_IMAGE = [{"type": "text", "text": "hi", "image_url": "data:"}]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_logprobs": 0},
        {"echo": True},
        {"prompt_embeds": "x"},
        {"use_beam_search": True},
        {"prompt": ["a", "b"]},
        {"prompt": [[1, 2]]},
        {"prompt": [True]},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": 7},
        {"suffix": "x"},
        {"n": 0},
        {"n": "2"},
        {"max_tokens": 0},
        {"cache_salt": ""},
        {"cache_salt": 3},
        {"mm_processor_kwargs": {}},
        {"messages": [{"role": "user", "content": IMAGE}], "prompt": None},
        {"messages": [{"role": "user", "content": SLY_IMAGE}], "prompt": None},
        {"messages": "x"},
    ],
)
def test_requests_that_go_alone(change: dict[str, Any]) -> None:
    """Each entry of the table is recognised."""
    request = {name: value for name, value in body(**change).items() if value is not None}
    assert alone_reason(request)


@pytest.mark.parametrize(
    "request_body",
    [
        body(),
        body(prompt="text", n=None, echo=False, max_tokens=None),
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
    ],
)
def test_requests_that_are_transferred(request_body: dict[str, Any]) -> None:
    """Plain requests are not turned away by mistake."""
    assert alone_reason(request_body) == ""


def test_tokenize_request_carries_what_renders() -> None:
    """Every field that changes a chat's ids is passed on, as the chat endpoint would take it."""
    messages = [{"role": "assistant", "content": "x", "reasoning_content": "r"}]
    chat = {
        "model": "m",
        "messages": messages,
        "tools": [{"type": "function"}],
        "documents": [{"title": "t"}],
        "reasoning_effort": "low",
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
        "chat_template_kwargs": {"a": 1},
        "temperature": 1,
        "max_tokens": 3,
    }
    kwargs = {"a": 1, "documents": chat["documents"], "reasoning_effort": "low"}
    assert tokenize_request(chat, "m") == {
        "model": "m",
        "messages": [{"role": "assistant", "content": "x", "reasoning": "r"}],
        "tools": chat["tools"],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
        "chat_template_kwargs": {**kwargs, "enable_thinking": True},
    }
    assert tokenize_request({**CHAT, "n": 2}, "m") == CHAT
    prompt = {"model": "m", "prompt": "x", "add_special_tokens": False}
    assert tokenize_request({**prompt, "top_k": 3}, "m") == prompt


def test_tokenize_request_knows_its_limits() -> None:
    """Where /tokenize would make other ids than the real endpoint, it is not asked."""
    tools = {**CHAT, "tools": [{"type": "function"}]}
    assert tokenize_request(tools, "m") is not None
    assert tokenize_request({**tools, "tool_choice": "none"}, "m") is None
    assert tokenize_request({**CHAT, "truncate_prompt_tokens": 4}, "m") is None
    assert tokenize_request({**CHAT, "chat_template_kwargs": [1]}, "m") is None
    assert tokenize_request(CHAT, "openai/gpt-oss-20b") is None
    assert tokenize_request({"prompt": "x"}, "openai/gpt-oss-20b") == {"prompt": "x"}


@pytest.mark.asyncio
async def test_alone_is_untouched_but_for_forged_params() -> None:
    """A request that goes alone arrives as it was sent, without kv_transfer_params."""
    async with pair() as harness:
        sent = body(echo=True, unknown_field=[1])
        await harness.post({**sent, "kv_transfer_params": {"x": 1}, "vllm_xargs": {"a": 1}})
        await harness.post({**sent, "vllm_xargs": {"kv_transfer_params": "x", "a": 1}})
        expected = {**sent, "vllm_xargs": {"a": 1}}
        assert harness.bodies("d:leg") == [expected, expected]
        assert harness.d.of(Reserve) == []


@pytest.mark.asyncio
async def test_short_prompts_are_computed_where_they_are_decoded() -> None:
    """By tokens where they are known, else by the bytes of the request; as they were sent."""
    async with pair(short_prompt_tokens=len(IDS)) as harness:
        text = {"model": "m", "prompt": "four bytes a token, or so", "max_tokens": 5}
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        await harness.post(body())
        await harness.post(text)
        await harness.post(chat, "/v1/chat/completions")
        assert harness.d.of(Reserve) == []
        assert harness.bodies("d:leg") == [body(), text, chat]
        await harness.post(body(prompt=[*IDS, 1]))
        await harness.post({**text, "prompt": "x" * 72})
        assert len(harness.d.of(Reserve)) == 2
        _, metrics = await harness.get("/metrics")
        assert 'dualpath_router_requests_total{outcome="short"} 3.0' in metrics


@pytest.mark.asyncio
async def test_model_names() -> None:
    """An alias of the base model is transferred, a LoRA's and an unknown name go alone."""
    async with pair() as harness:
        for name in ("alias", "lora", "nonsense", ["m"]):
            await harness.post(body(model=name))
        assert len(harness.d.of(Reserve)) == 1
        assert [leg["model"] for leg in harness.bodies("d:leg")][1:] == ["lora", "nonsense", ["m"]]


@pytest.mark.asyncio
async def test_too_long_requests_go_alone() -> None:
    """VLLM judges a request beyond the model's length; no transfer is wasted on it."""
    async with pair() as harness:
        await harness.post(body(max_tokens=983))
        assert harness.d.of(Reserve) == []
        await harness.post(body(max_tokens=982))
        assert len(harness.d.of(Reserve)) == 1


@pytest.mark.asyncio
async def test_other_paths_pass_through() -> None:
    """Method, query, body, status and headers pass both ways; forged parameters do not."""
    async with pair() as harness:
        url = URL(harness.url + "/some%2Fpath?x=1&y=a%20b", encoded=True)
        async with harness.client.put(url, data=b"abc") as got:
            assert (got.status, await got.read()) == (418, b"cba")
            assert got.headers["X-Engine"] == "d"
        assert harness.bodies("d:PUT /some%2Fpath?x=1&y=a%20b") == [b"abc"]
        await harness.post({"input": 1, "kv_transfer_params": {"x": 1}}, "/v1/responses")
        assert harness.bodies("d:POST /v1/responses") == [b'{"input":1}']
        status, models = await harness.get("/v1/models")
        assert (status, models["data"][0]["id"]) == (200, "alias")


@pytest.mark.asyncio
@pytest.mark.parametrize(("path", "status"), [("/v1/completions", b"200"), ("/other", b"418")])
async def test_a_client_that_asks_before_it_sends_is_told_to(path: str, status: bytes) -> None:
    """Expect: 100-continue is answered at once, and is no engine's business."""
    async with pair() as harness:
        reader, writer = await asyncio.open_connection(*harness.config.listen.split(":"))
        data = json.dumps(body(prompt="text")).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode())
        told = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(data)
        assert (await reader.readuntil(b"\r\n")).split()[1] == status
        writer.close()
    assert end_to_end({"Expect": "100-continue", "X-One": "1"}) == {"X-One": "1"}


@pytest.mark.asyncio
async def test_bad_bodies() -> None:
    """A body that is too large is a 413 of the router's; what is no JSON object a 400."""
    async with pair(max_body_bytes=1000) as harness:
        status, content = await harness.post(body(prompt="x" * 2000))
        assert status == 413
        assert b'"error"' in content
        headers = {"Content-Type": "application/json"}
        for path in ("/v1/completions", "/other"):
            url = harness.url + path
            async with harness.client.post(url, data=b"{", headers=headers) as got:
                assert got.status == 400
        assert harness.bodies("d:POST /other") == []
        assert harness.d.of(Reserve) == []
    async with pair() as harness:
        data = b'{"model":"m","prompt":[1],"n":' + b"1" * 5000 + b"}"
        async with harness.client.post(harness.url + "/v1/completions", data=data) as got:
            assert got.status == 400
        await harness.idle()


@pytest.mark.asyncio
async def test_snapshot_is_asked_of_another_mover() -> None:
    """The mover that was to send the store's content leaves before it did: the next one does."""
    async with Harness() as harness:
        first = await harness.add("a", "decode", stored_blocks(IDS, 2))
        assert first.of(Welcome)[0].send_snapshot
        await harness.until(lambda: harness.router.cluster.stores.num_pending == 0)
        second = await harness.add("b", "decode", stored_blocks(IDS, 3))
        assert not second.of(Welcome)[0].send_snapshot
    async with Harness() as harness:
        # "a" never sends its snapshot.
        server = await harness.add("b", "decode", store="file:///elsewhere")
        a = type(server)(harness, server.server, "decode", engine_id="a")
        harness.movers["a"] = a
        a.script = lambda _message: True
        a.start()
        await harness.until(lambda: bool(a.of(Welcome)))
        c = await harness.add("c", "decode", stored_blocks(IDS, 3))
        assert not c.of(Welcome)[0].send_snapshot
        a.say(Goodbye("stopping"))
        await harness.until(lambda: harness.router.cluster.stores.num_blocks == 3)
        assert c.of(Welcome)[-1].send_snapshot


@pytest.mark.asyncio
@pytest.mark.parametrize("taken", ["listen", "control"])
async def test_taken_address_is_a_config_error(taken: str) -> None:
    """A port in use ends the start with a message that names the address."""
    async with Harness() as harness:
        config = harness.config.model_dump()
        other = "control" if taken == "listen" else "listen"
        address = f"127.0.0.1:{free_port()}"
        config[other] = address if other == "listen" else f"tcp://{address}"
        router = Router(RouterConfig(**config))
        with pytest.raises(ConfigError, match=str(config[taken])):
            await router.start()


@pytest.mark.asyncio
async def test_sigterm_stops_the_process() -> None:
    """run_router serves until SIGTERM and then returns."""
    listen, control = f"127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    code = (
        "from vllm_dualpath.config import RouterConfig;"
        "from vllm_dualpath.router import run_router;"
        f"run_router(RouterConfig(listen={listen!r}, control={control!r}))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    try:
        async with aiohttp.ClientSession() as client:
            for _ in range(200):
                try:
                    async with client.get(f"http://{listen}/health") as response:
                        assert response.status == 503
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()


def test_event_corrector_at_every_split() -> None:
    """However the bytes arrive, the same bytes leave, with the count replaced once."""
    text = r'{"text": "\"prompt_tokens_details\":{\"cached_tokens\": 9} ✓"}'.encode()
    usage = b'{"usage":{"prompt_tokens_details":{"cached_tokens":123}}}'
    stream = b"data: " + text + b"\n\n: ping\r\n\r\ndata: " + usage + b"\n\ndata: [DONE]\n\n"
    expected = stream.replace(b'"cached_tokens":123', b'"cached_tokens":8')
    for split in range(len(stream) + 1):
        corrector = EventCorrector(8)
        out = corrector.feed(stream[:split]) + corrector.feed(stream[split:]) + corrector.close()
        assert out == expected, split


def test_absent_count_stays_absent() -> None:
    """Only a field that vLLM itself put there is replaced."""
    for content in (b'{"usage":{"prompt_tokens":3}}', b'{"prompt_tokens_details":null}', b""):
        assert correct_cached_tokens(content, 5) == content
