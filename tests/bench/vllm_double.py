"""A small HTTP server that speaks vLLM's streaming completions: real sockets, no model.

The answer to a prompt is a function of all its tokens, so that a client that sends a wrong prompt
gets a wrong answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


def answer(prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens this server gives to ``prompt``."""
    digest = hashlib.sha256(bytes(token % 256 for token in prompt)).digest()
    return [digest[idx % len(digest)] for idx in range(num_tokens)]


@dataclass
class VllmDouble:
    """Collects the bodies it got; misbehaves as told."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    refuse_from: int | None = None
    """HTTP 500 from this request on, counted from 0."""
    drop_tokens: int = 0
    """Leave out so many tokens at the end."""
    broken: bool = False
    """End the connection after the first token."""
    delay_s: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.refuse_from is not None and len(self.bodies) > self.refuse_from:
            return web.json_response({"error": "engine dead"}, status=500)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = answer(body["prompt"], body["max_tokens"] - self.drop_tokens)
        for token in tokens:
            await asyncio.sleep(self.delay_s)
            await self._event(response, {"choices": [{"text": "?", "token_ids": [token]}]})
            if self.broken and request.transport is not None:
                request.transport.close()
                return response
        usage = {"prompt_tokens_details": {"cached_tokens": 3}}
        await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _event(response: web.StreamResponse, content: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Serve on a free port of loopback; yields the URL."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
