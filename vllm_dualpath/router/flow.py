"""The life of one generation request in the router: plan, attempts, both legs, fallbacks.

Every way out ends the transfer at every mover, and answers the client unless the client has left.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass

from aiohttp import web

from vllm_dualpath.config import RouterConfig
from vllm_dualpath.errors import PeerLost
from vllm_dualpath.messages import LegParams, TransferKey
from vllm_dualpath.plan import ReadPlan
from vllm_dualpath.router.body import Body, TokenIds
from vllm_dualpath.router.booking import Assignment
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.eligibility import alone_reason
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.failure import EVICTED
from vllm_dualpath.router.legs import (
    decode_leg,
    forges_params,
    leg_headers,
    prefill_leg,
    without_params,
)
from vllm_dualpath.router.movers import Movers
from vllm_dualpath.router.placing import MAX_ATTEMPTS, Placement, Placer
from vllm_dualpath.router.relay import error_response, relay
from vllm_dualpath.router.telemetry import Telemetry
from vllm_dualpath.router.tokenize import ModelNames, Tokenizer
from vllm_dualpath.router.transfer import Transfer
from vllm_dualpath.router.upstream import JSON_HEADERS, Upstream
from vllm_dualpath.router.usage import reported_cached_tokens

logger = logging.getLogger(__name__)

_TEXT_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Core:
    """The router's parts, as a request needs them."""

    config: RouterConfig
    cluster: Cluster
    movers: Movers
    upstream: Upstream
    placer: Placer
    names: ModelNames
    tokenizer: Tokenizer
    telemetry: Telemetry


class Flow:
    """One request. ``run`` is called once."""

    def __init__(self, core: Core, request: web.BaseRequest, raw: bytes, body: Body) -> None:
        self._core = core
        self._request = request
        self._path = request.path
        self._headers = leg_headers(request.headers)
        self._body = body
        self._raw = raw
        self._outcome = "failed"

    async def run(self) -> web.StreamResponse:
        """Answer the request."""
        try:
            return await self._answer()
        except (asyncio.CancelledError, ConnectionError):
            # The client has left.
            self._outcome = "cancelled"
            raise
        finally:
            self._core.telemetry.requests.labels(self._outcome).inc()

    async def _answer(self) -> web.StreamResponse:
        if not await self._core.cluster.wait_for_decode(self._core.config.engine_wait_s):
            return await self._alone("no decode engine is registered", waited=True)
        body = self._body
        reason = alone_reason(body)
        if reason:
            return await self._alone(reason)
        num_tokens = self._num_tokens_about()
        if num_tokens <= self._core.config.short_prompt_tokens:
            # A decode engine computes it sooner than it would get it.
            return await self._alone("a short prompt", short_tokens=num_tokens)
        ids = await self._token_ids(body)
        if ids is None:
            return await self._alone("no prefill engine, another model, or no token ids")
        return await self._with_transfer(body, ids)

    def _num_tokens_about(self) -> int:
        """No less than the prompt has, mostly. An engine would know, but takes longer to ask."""
        prompt = self._body.get("prompt")
        if isinstance(prompt, list):
            return len(prompt)
        return len(self._raw) // _TEXT_BYTES_PER_TOKEN

    async def _token_ids(self, body: Body) -> TokenIds | None:
        engine = self._core.cluster.some_decode()
        if not self._core.cluster.roster.views or engine is None:
            return None
        now_s = asyncio.get_running_loop().time()
        if not await self._core.names.is_base(body.get("model"), engine, self._headers, now_s):
            return None
        return await self._core.tokenizer.token_ids(engine, self._path, body, self._headers)

    # --- with a transfer ---

    async def _with_transfer(self, body: Body, ids: TokenIds) -> web.StreamResponse:
        salt, num_releases = body.get("cache_salt"), body.get("n") or 1
        try:
            placement = await self._core.placer.first(ids.ids, salt, num_releases)
        except ValueError:
            return await self._alone("token ids that no model has")
        transfer_id = secrets.token_bytes(16)
        preferred: Engine | None = None
        for attempt in range(MAX_ATTEMPTS):
            if placement is None:
                break
            if _too_long(body, ids, placement.decode):
                preferred = placement.decode
                placement.booking.release()
                break
            transfer = self._open(TransferKey(transfer_id, attempt), placement)
            response = await self._attempt(transfer, body, ids)
            if response is not None:
                return response
            if transfer.leg_sent:
                return await self._alone("a leg or the commit failed", placement.decode)
            more = attempt + 1 < MAX_ATTEMPTS
            placement = (
                self._core.placer.after(transfer, attempt + 1, ids.ids, salt) if more else None
            )
        return await self._alone("no pair of engines can take it", preferred)

    def _open(self, key: TransferKey, placement: Placement) -> Transfer:
        transfer = Transfer(
            key,
            placement.prompt,
            placement.plan,
            placement.prefill,
            placement.decode,
            placement.donors,
            placement.booking,
            lambda: self._divide_reads(placement),
            self._core.movers.send,
            self._core.config.deadlines,
        )
        self._core.cluster.open(transfer)
        return transfer

    def _divide_reads(self, placement: Placement) -> ReadPlan:
        plan = self._core.placer.divide_reads(placement)
        block_tokens = placement.decode.hello.geometry.block_tokens
        sides = {placement.prefill.engine_id: "prefill", placement.decode.engine_id: "decode"}
        for segment in plan.segments:
            role = sides.get(segment.reader, "donor")
            planned = self._core.telemetry.planned_tokens.labels(role)
            planned.inc(segment.num_blocks * block_tokens)
        if plan.num_cached_blocks:
            planned = self._core.telemetry.planned_tokens.labels("cache")
            planned.inc(plan.num_cached_blocks * block_tokens)
        return plan

    async def _attempt(
        self, transfer: Transfer, body: Body, ids: TokenIds
    ) -> web.StreamResponse | None:
        """One attempt; ``None`` when something else has to be tried. The transfer is ended."""
        booking = transfer.booking
        drain, reason = False, "given up"
        try:
            transfer.start()
            if not await transfer.wait_ready():
                return None
            if not booking.stay.arrive():
                transfer.fail(EVICTED)
                return None
            leg = await self._prefill(transfer, body, ids)
            booking.prefill.release()
            if leg is None:
                return None
            status, content_type, content = leg
            if status != 200:
                self._outcome = reason = "rejected"
                return _pass_on(status, content_type, content)
            self._core.placer.computed(transfer)
            transfer.end_prefill(drain=True, reason="the leg has returned")
            if not await transfer.wait_committed():
                return None
            cached = max(transfer.num_loaded_tokens, reported_cached_tokens(content))
            response = await self._decode(transfer, body, ids, cached)
            drain, reason = response is not None, "done"
            return response
        except (asyncio.CancelledError, ConnectionError):
            reason = "the client has left"
            raise
        finally:
            booking.release()
            failure = transfer.failure
            if failure is not None:
                self._core.telemetry.attempts_failed.labels(failure.label).inc()
            self._core.cluster.close(transfer, drain=drain, reason=reason)

    async def _prefill(
        self, transfer: Transfer, body: Body, ids: TokenIds
    ) -> tuple[int, str, bytes] | None:
        """The prefill leg; ``None`` when it failed, or the transfer did meanwhile."""
        transfer.leg_sent = True
        params = _params(transfer, transfer.prefill, len(ids))
        data = prefill_leg(body, params, ids)
        fetch = self._core.upstream.fetch(transfer.prefill, self._path, self._headers, data)
        leg = asyncio.create_task(fetch)
        transfer.when_failed(leg.cancel)
        try:
            result = await leg
            if result[0] < 500:
                return result
            transfer.fail(f"prefill leg: status {result[0]}", transfer.prefill.engine_id)
        except PeerLost as exc:
            transfer.fail(f"prefill leg: {exc}", transfer.prefill.engine_id)
        except asyncio.CancelledError:
            if transfer.failure is None or _is_cancelled():
                raise
        finally:
            transfer.when_failed(None)
        return None

    async def _decode(
        self, transfer: Transfer, body: Body, ids: TokenIds, cached_tokens: int
    ) -> web.StreamResponse | None:
        params = _params(transfer, transfer.decode, len(ids))
        data = decode_leg(body, params, ids)
        headers = {**self._headers, **JSON_HEADERS}
        transfer.booking.decode.take_kv()
        try:
            answer = await self._core.upstream.ask(
                transfer.decode, "POST", self._path, headers, data
            )
        except PeerLost as exc:
            transfer.fail(f"decode leg: {exc}", transfer.decode.engine_id)
            return None
        self._outcome = "transferred" if answer.status < 400 else "rejected"
        return await relay(self._request, answer, cached_tokens)

    # --- without ---

    async def _alone(
        self,
        reason: str,
        preferred: Engine | None = None,
        *,
        waited: bool = False,
        short_tokens: int = 0,
    ) -> web.StreamResponse:
        """Let one decode engine handle the request by itself; another one if it does not answer.

        ``short_tokens``: of a prompt that goes alone because it is short.
        """
        if not waited:
            # The only one may have been lost, or have registered anew, since the request came.
            await self._core.cluster.wait_for_decode(self._core.config.engine_wait_s)
        logger.debug("request %s goes alone: %s", self._headers["X-Request-Id"], reason)
        # A preferred engine that does not serve any more has just been tried.
        tried = {preferred} if preferred is not None and not preferred.serving else set()
        engine = self._core.cluster.least_loaded_decode(tried) if tried else preferred
        engine = engine or self._core.cluster.least_loaded_decode(tried)
        if engine is None and not tried:
            return error_response(503, "NoEngine", f"{reason}; try again later")
        while engine is not None:
            tried.add(engine)
            load = Assignment(engine, short_tokens)
            load.take_kv()
            try:
                headers = {**self._headers, **JSON_HEADERS}
                answer = await self._core.upstream.ask(
                    engine, "POST", self._path, headers, self._clean_raw()
                )
                served = "short" if short_tokens else "alone"
                self._outcome = served if answer.status < 400 else "rejected"
                return await relay(self._request, answer)
            except PeerLost as exc:
                logger.warning("%s", exc)
            finally:
                load.release()
            engine = self._core.cluster.least_loaded_decode(excluded=tried)
        return error_response(502, "EngineLost", "no decode engine answered; try again")

    def _clean_raw(self) -> bytes:
        """The client's own bytes, unless the router's field is in them."""
        if not forges_params(self._body):
            return self._raw
        return self._body.encode(without_params(self._body))


def _is_cancelled() -> bool:
    """Whether this task itself is, and not only one that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _params(transfer: Transfer, engine: Engine, num_tokens: int) -> LegParams:
    return LegParams.make(engine.boot_id, transfer.key, transfer.num_hit_blocks, num_tokens)


def _pass_on(status: int, content_type: str, content: bytes) -> web.Response:
    return web.Response(status=status, body=content, headers={"Content-Type": content_type})


def _too_long(body: Body, ids: TokenIds, engine: Engine) -> bool:
    """VLLM will refuse it, or shorten the answer; neither is worth a transfer."""
    wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return len(ids) + wanted > engine.hello.max_model_len
