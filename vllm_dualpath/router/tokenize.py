"""A request's token ids: given by the client, or made once by an engine.

Both legs carry the ids, so ids that differ from what vLLM would make of the request are a wrong
answer. vLLM's ``/render`` endpoints run the very code of the real endpoints, but need
``--enable-scale-out``. ``/tokenize`` is always there and knows fewer fields: what it cannot express
goes to a decode engine alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.body import Body, TokenIds
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.legs import without_params
from vllm_dualpath.router.upstream import Upstream

logger = logging.getLogger(__name__)

_NAMES_FRESH_S = 30.0

_NO_RENDER_STATUSES = (403, 404, 405, 501)

_CHAT_FIELDS = (
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "tools",
)

_OWN_CHAT_CODE = ("gpt-oss", "gpt_oss", "mistral", "mixtral", "kimi-k3")
"""Models whose chats vLLM renders by code that ``/tokenize`` does not run."""


class Tokenizer:
    """Asks engines; remembers on the engine which endpoint it has."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def token_ids(
        self, engine: Engine, path: str, body: Body, headers: Mapping[str, str]
    ) -> TokenIds | None:
        """The prompt's ids; ``None`` when they cannot be had, or vLLM refuses the request.

        In both cases the engine shall handle the request alone: its refusal is the client's answer.
        """
        prompt = body.get("prompt")
        if isinstance(prompt, list) and body.get("truncate_prompt_tokens") is None:
            return body.token_ids()
        if engine.renders:
            whole = body.encode(without_params(body))
            status, content = await self._post(engine, f"{path}/render", whole, headers)
            if status not in _NO_RENDER_STATUSES:
                return rendered_ids(content) if status == 200 else None
            engine.renders = False
        request = tokenize_request(body, engine.hello.model)
        if request is None:
            return None
        status, content = await self._post(engine, "/tokenize", body.encode(request), headers)
        return tokenized_ids(content) if status == 200 else None

    async def _post(
        self, engine: Engine, path: str, data: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        try:
            status, _, content = await self._upstream.fetch_soon(engine, path, headers, data)
        except PeerLost as exc:
            logger.warning("%s", exc)
            return 503, b""
        return status, content


def tokenize_request(body: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    """What to ask ``/tokenize``; ``None`` when it cannot say what vLLM will make of the request.

    Source: ``ChatCompletionRequest.build_chat_params`` and ``TokenizeChatRequest`` of vLLM 0.32.
    """
    if body.get("truncate_prompt_tokens") is not None:
        return None
    request = {"model": body["model"]} if "model" in body else {}
    if "prompt" in body:
        request["prompt"] = body["prompt"]
        return request | _picked(body, ("add_special_tokens",))
    own_kwargs = body.get("chat_template_kwargs") or {}
    # A server flag decides whether tools are shown to the model when none may be called.
    tools_unsure = body.get("tools") and body.get("tool_choice") == "none"
    if tools_unsure or not isinstance(own_kwargs, dict):
        return None
    if any(name in model.lower() for name in _OWN_CHAT_CODE):
        return None
    kwargs = own_kwargs | _picked(body, ("documents", "reasoning_effort"))
    effort = body.get("reasoning_effort")
    if effort is not None and "enable_thinking" not in own_kwargs:
        kwargs["enable_thinking"] = effort != "none"
    request["messages"] = [_with_reasoning(message) for message in body["messages"]]
    request |= _picked(body, _CHAT_FIELDS)
    return request | ({"chat_template_kwargs": kwargs} if kwargs else {})


class _Rendered(msgspec.Struct):
    token_ids: msgspec.Raw
    features: Any = None


class _Tokenized(msgspec.Struct):
    tokens: msgspec.Raw


_RENDERED = msgspec.json.Decoder(list[_Rendered] | _Rendered)
_TOKENIZED = msgspec.json.Decoder(_Tokenized)


def rendered_ids(content: bytes) -> TokenIds | None:
    """Ids of the only rendered prompt; a chat's is an object, a completion's a list of one."""
    try:
        rendered = _RENDERED.decode(content)
        if isinstance(rendered, list):
            (rendered,) = rendered
        return None if rendered.features else TokenIds.decode(rendered.token_ids)
    except (ValueError, msgspec.MsgspecError):
        logger.warning("an engine's rendered prompt has an unknown form")
        return None


def tokenized_ids(content: bytes) -> TokenIds | None:
    """Ids in an answer of ``/tokenize``."""
    try:
        return TokenIds.decode(_TOKENIZED.decode(content).tokens)
    except msgspec.MsgspecError:
        logger.warning("an engine's tokenized prompt has an unknown form")
        return None


def _picked(body: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}


def _with_reasoning(message: Any) -> Any:
    """Chat requests, but not ``/tokenize``, take ``reasoning_content`` for ``reasoning``."""
    if not isinstance(message, dict) or message.get("reasoning_content") is None:
        return message
    renamed = {name: value for name, value in message.items() if name != "reasoning_content"}
    if renamed.get("reasoning") is None:
        renamed["reasoning"] = message["reasoning_content"]
    return renamed


class ModelNames:
    """Which model names mean the base model; a LoRA's name, or an unknown one, does not."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._base_names: dict[bytes, tuple[float, frozenset[str]]] = {}

    async def is_base(
        self, name: object, engine: Engine, headers: Mapping[str, str], now_s: float
    ) -> bool:
        """Asks the engine, at most every half minute, about a name that its mover did not tell."""
        if name is None or name in ("", engine.hello.model):
            return True
        if not isinstance(name, str):
            return False
        asked_s, names = self._base_names.get(engine.boot_id, (-_NAMES_FRESH_S, frozenset()))
        if name not in names and now_s - asked_s >= _NAMES_FRESH_S:
            names = await self._ask(engine, headers)
            self._base_names = {engine.boot_id: (now_s, names)}
        return name in names

    async def _ask(self, engine: Engine, headers: Mapping[str, str]) -> frozenset[str]:
        try:
            status, _, content = await self._upstream.fetch_soon(
                engine, "/v1/models", headers, None
            )
            models = json.loads(content)["data"] if status == 200 else []
            return frozenset(model["id"] for model in models if model.get("parent") is None)
        except (PeerLost, ValueError, KeyError, TypeError, AttributeError) as exc:
            logger.debug("no model names from %s: %r", engine.engine_id, exc)
            return frozenset()
