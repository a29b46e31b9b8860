"""The router's HTTP server: which path goes where. Generation is ``flow.py``'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.body import BadBody, parse_body
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.flow import Core, Flow
from vllm_dualpath.router.legs import PARAMS_FIELD, forges_params, without_params
from vllm_dualpath.router.relay import end_to_end, error_response, relay
from vllm_dualpath.router.status import status_of

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STATUS_WAIT_S = 1.0
_CLIENT_LEFT = 499
"""No standard status: as nginx logs it."""


class Handlers:
    """Request handlers over the router's parts."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._routes: dict[tuple[str, str], _Handler] = {
            ("POST", "/v1/completions"): self.generate,
            ("POST", "/v1/chat/completions"): self.generate,
            ("GET", "/health"): self.health,
            ("GET", "/metrics"): self.metrics,
            ("GET", "/dualpath/status"): self.status,
        }
        """Paths not named here pass through."""

    def server(self) -> web.Server:
        """Aiohttp's server without its application: six paths need no machinery to be found."""
        return web.Server(
            self._answer, request_factory=self._request, handler_cancellation=True, access_log=None
        )

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            asyncio.get_running_loop(),
            client_max_size=self._core.config.max_body_bytes,
        )

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request. Our own errors have the form that OpenAI's clients expect."""
        method = "GET" if request.method == "HEAD" else request.method
        path = request.rel_url.raw_path
        handler = self._routes.get((method, path), self.pass_through)
        try:
            if not path.startswith("/"):  # OPTIONS * and CONNECT: nothing that an engine serves
                raise web.HTTPNotFound
            await _invite_body(request)
            return await handler(request)
        except web.HTTPException as exc:
            return error_response(exc.status, type(exc).__name__, exc.text or exc.reason)
        except BadBody as exc:
            return error_response(400, "BadRequest", str(exc))
        except ConnectionError as exc:
            # The client has left: nobody hears an answer, and there is nothing to be logged as an
            # error.
            logger.debug("%s %s: %s", request.method, path, exc)
            return web.Response(status=_CLIENT_LEFT)
        except TimeoutError:
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return error_response(500, "InternalServerError", "the router failed; see its log")

    async def generate(self, request: web.BaseRequest) -> web.StreamResponse:
        raw = await request.read()
        body = parse_body(raw)
        if body is None:
            raise BadBody("expected a JSON object as the body, found something else")
        return await Flow(self._core, request, raw, body).run()

    async def health(self, _request: web.BaseRequest) -> web.Response:
        counts = {role: len(self._core.cluster.usable(role)) for role in ("prefill", "decode")}
        if counts["decode"]:
            return web.json_response({"status": "ok", **counts})
        reason = "no decode engine serves; start one, or wait until it has loaded its model"
        return web.json_response({"status": "unavailable", "reason": reason, **counts}, status=503)

    async def metrics(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(
            body=self._core.telemetry.render(), headers={"Content-Type": _METRICS_TYPE}
        )

    async def status(self, _request: web.BaseRequest) -> web.Response:
        await self._core.movers.fresh_loads(_STATUS_WAIT_S)
        return web.json_response(status_of(self._core))

    async def pass_through(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any other request, to a decode engine, or to a prefill engine where there is none."""
        await self._core.cluster.wait_for_decode(self._core.config.engine_wait_s)
        engine = self._engine()
        if engine is None:
            return error_response(503, "NoEngine", "no engine is registered; try again later")
        data = await self._body(request)
        try:
            answer = await self._core.upstream.ask(
                engine,
                request.method,
                request.rel_url.raw_path_qs,
                end_to_end(request.headers),
                data,
            )
        except PeerLost as exc:
            logger.warning("%s", exc)
            return error_response(502, "EngineLost", f"engine {engine.engine_id} did not answer")
        return await relay(request, answer)

    def _engine(self) -> Engine | None:
        prefill = self._core.cluster.usable("prefill")
        return self._core.cluster.least_loaded_decode() or next(iter(prefill), None)

    async def _body(self, request: web.BaseRequest) -> bytes | AsyncIterator[bytes] | None:
        """The body as it comes; JSON without the parameters that are the router's to give."""
        if not request.can_read_body:
            return None
        if "json" not in request.content_type:
            return request.content.iter_any()
        raw = await request.read()
        body = parse_body(raw)
        if body is None and raw:
            raise BadBody("expected a JSON object as the body, found something else")
        if body is None or not forges_params(body):
            return raw
        logger.debug("%s of a client dropped", PARAMS_FIELD)
        return body.encode(without_params(body))


async def _invite_body(request: web.BaseRequest) -> None:
    """A client may wait for this before it sends a body; aiohttp's own answer is its router's."""
    expected = request.headers.get("Expect", "").lower()
    if request.version >= HttpVersion11 and expected == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer has been sent
