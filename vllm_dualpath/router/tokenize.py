"""A request's token ids: given by the client, or rendered once by an engine.

vLLM's ``/render`` endpoints run the very code that the request itself would run (template, tools,
reasoning options, truncation, Harmony), which ``/tokenize`` does not; both legs then carry the ids,
so a difference would be a wrong answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.upstream import Upstream

logger = logging.getLogger(__name__)

_NAMES_FRESH_S = 30.0


@dataclass(frozen=True, slots=True)
class Rejected:
    """vLLM refused the request while rendering it; the client gets this as it is."""

    status: int
    content_type: str
    body: bytes


async def token_ids_of(
    upstream: Upstream,
    engine: Engine,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
) -> list[int] | Rejected | None:
    """The prompt's ids; ``None`` when they cannot be had and the engine shall handle it alone."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and body.get("truncate_prompt_tokens") is None:
        return prompt
    try:
        status, content_type, content = await upstream.fetch(
            engine, f"{path}/render", headers, body
        )
    except PeerLost as exc:
        logger.warning("rendering a prompt failed: %s", exc)
        return None
    if status == 200:
        return _ids_in(content)
    if 400 <= status < 500 and status not in (404, 405):
        return Rejected(status, content_type, content)
    # An unknown model, an engine without the endpoint, or a failing one: the real endpoint knows.
    return None


def _ids_in(content: bytes) -> list[int] | None:
    """Ids of the only rendered prompt; a chat's is an object, a completion's a list of one."""
    try:
        rendered = json.loads(content)
        if isinstance(rendered, list):
            (rendered,) = rendered
        ids = rendered["token_ids"]
        if rendered.get("features"):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("an engine's rendered prompt has an unknown form")
        return None
    return ids if isinstance(ids, list) and all(type(token) is int for token in ids) else None


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
            status, _, content = await self._upstream.fetch(engine, "/v1/models", headers, None)
            models = json.loads(content)["data"] if status == 200 else []
            return frozenset(model["id"] for model in models if model.get("parent") is None)
        except (PeerLost, ValueError, KeyError, TypeError, AttributeError) as exc:
            logger.debug("no model names from %s: %r", engine.engine_id, exc)
            return frozenset()
