"""Answers to clients: an engine's, passed on as it comes, and the router's own errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from aiohttp import web

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.upstream import Answer
from vllm_dualpath.router.usage import EventCorrector, correct_cached_tokens

logger = logging.getLogger(__name__)

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "expect",
        "host",
    }
)
_BROKEN_OFF = (
    b'data: {"error": {"message": "the engine\'s answer broke off",'
    b' "type": "EngineLost", "param": null, "code": 502}}\n\n'
)


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a proxy passes on."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def error_response(status: int, kind: str, message: str) -> web.Response:
    """An error of the router's own, in the form of vLLM's."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


async def relay(
    request: web.BaseRequest, answer: Answer, cached_tokens: int | None = None
) -> web.StreamResponse:
    """Pass an answer on; with ``cached_tokens`` its usage is corrected, nothing else."""
    headers = end_to_end(answer.head.headers)
    try:
        if not answer.streamed:
            body = answer.first
            if cached_tokens is not None:
                body = correct_cached_tokens(body, cached_tokens)
            return web.Response(status=answer.status, headers=headers, body=body)
        return await _relay_stream(request, answer, headers, cached_tokens)
    finally:
        answer.close()


async def _relay_stream(
    request: web.BaseRequest, answer: Answer, headers: dict[str, str], cached_tokens: int | None
) -> web.StreamResponse:
    is_events = answer.head.content_type == "text/event-stream"
    corrector = EventCorrector(cached_tokens) if is_events and cached_tokens is not None else None
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in answer.chunks():
            data = corrector.feed(chunk) if corrector else chunk
            if data:
                await response.write(data)
        if corrector and (tail := corrector.close()):
            await response.write(tail)
        await response.write_eof()
    except PeerLost as exc:
        logger.warning("%s", exc)
        # A clean end would look like a complete answer.
        if is_events:
            await response.write(_BROKEN_OFF)
        if request.transport is not None:
            request.transport.abort()
    return response
