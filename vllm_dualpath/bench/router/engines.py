"""Two engines that do nothing, in one process: they answer at once, whatever they are asked.

As vLLM does they serve HTTP, and each has a mover that registers with our router and says what a
mover with nothing in its way would say, over the real control network. Real movers are no use here:
a page that no engine computes is never pushed, so a transfer between them is never committed.
``python -m vllm_dualpath.bench.router.engines``: one line of JSON on stdin says what to be; ends
when stdin does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from vllm_dualpath.bench.router.loop import run
from vllm_dualpath.bench.router.movers import DoNothingMover
from vllm_dualpath.bench.router.prompts import MODEL, tokenized
from vllm_dualpath.bench.router.wire import MessageReader, answer
from vllm_dualpath.messages import Committed, TransferKey

_USAGE = {"prompt_tokens": 8000, "completion_tokens": 1, "total_tokens": 8001}
_PARAMS = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [1, 2, 3]}
_COMPLETION = {
    "id": "cmpl-0",
    "object": "text_completion",
    "created": 1,
    "model": MODEL,
    "choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE | {"prompt_tokens_details": {"cached_tokens": 0}},
    # What a connector of vLLM gives the prefill leg's sender to pass on.
    "kv_transfer_params": _PARAMS,
}
_MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "parent": None}]}
_ANSWER = answer(json.dumps(_COMPLETION).encode())
_OTHERS = {
    b"/health": answer(b"{}"),
    b"/v1/models": answer(json.dumps(_MODELS).encode()),
}
_NOT_FOUND = answer(b'{"error": {"message": "not found"}}', 404)
_KEY = re.compile(rb'"transfer": ?"([0-9a-f]{32})", ?"attempt": ?(\d+)')

Notify = Callable[[bytes], None]


class EngineProtocol(asyncio.Protocol):
    """One connection to an engine; ``on_leg`` is told the body of each generation request."""

    def __init__(self, on_leg: Notify) -> None:
        self._on_leg = on_leg
        self._reader = MessageReader()
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        message = self._reader.feed(data)
        if message is not None:
            self._transport.write(self._answer(*message))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        path = head.split(b" ", 2)[1]
        if path in (b"/v1/completions", b"/v1/chat/completions"):
            self._on_leg(body)
            return _ANSWER
        if path == b"/tokenize":
            return answer(tokenized(body))
        return _OTHERS.get(path, _NOT_FOUND)


async def serve(spec: dict[str, Any]) -> None:
    """Two engines until stdin ends."""
    loop = asyncio.get_running_loop()
    movers: list[DoNothingMover] = []
    if spec["control"] is not None:
        for role in ("prefill", "decode"):
            url = f"http://127.0.0.1:{spec[role]}"
            movers.append(DoNothingMover(role, url, spec["control"]))

    def prefilled(body: bytes) -> None:
        """With the prefill leg's end every page is where it belongs."""
        found = _KEY.search(body, body.rfind(b'"dualpath"')) if movers else None
        if found is not None:
            key = TransferKey(bytes.fromhex(found[1].decode()), int(found[2]))
            movers[1].say(Committed(key))

    for role, on_leg in (("prefill", prefilled), ("decode", _ignore)):
        await loop.create_server(partial(EngineProtocol, on_leg), "127.0.0.1", spec[role])
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for mover in movers:
        mover.close()


def _ignore(_body: bytes) -> None:
    """The decode leg needs nothing of a mover but what it has got."""


def main() -> None:
    """See the module's docstring."""
    spec = json.loads(sys.stdin.readline())
    gc.disable()
    run(serve(spec))


if __name__ == "__main__":
    main()
