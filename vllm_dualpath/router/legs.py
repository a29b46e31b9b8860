"""The bodies and headers of the requests that engines get, made from a client's. Pure functions.

Field names are those of vLLM's request classes, in
``entrypoints/openai/{completion,chat_completion}/protocol.py``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_dualpath.messages import LegParams

JsonBody = dict[str, Any]

PARAMS_FIELD = "kv_transfer_params"

_PASSED_HEADERS = (
    "Authorization",
    "X-Vllm-Priority",
    "X-Session-ID",
    "traceparent",
    "tracestate",
)

_NOT_FOR_PREFILL = (
    # How the answer is delivered and where it ends: the prefill leg's one token is thrown away.
    "stream",
    "stream_options",
    "stream_interval",
    "min_tokens",
    "max_completion_tokens",
    "stop",
    "stop_token_ids",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "return_prompt_text",
    "best_of",
    # Grammars: costly to build, and without an effect on the prompt's KV.
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    # The token ids are already truncated.
    "truncate_prompt_tokens",
    "truncation_side",
)


def without_params(body: Mapping[str, Any]) -> JsonBody:
    """The client's body without ``kv_transfer_params``: those are the router's to give."""
    cleaned = {key: value for key, value in body.items() if key != PARAMS_FIELD}
    extra = cleaned.get("vllm_xargs")
    if isinstance(extra, dict) and PARAMS_FIELD in extra:
        # vLLM puts both into one dictionary.
        cleaned["vllm_xargs"] = {k: v for k, v in extra.items() if k != PARAMS_FIELD}
    return cleaned


def prefill_leg(body: Mapping[str, Any], params: LegParams, token_ids: Sequence[int]) -> JsonBody:
    """One token on the prefill engine; the prompt as ids, so that nothing is rendered again."""
    leg = _leg(body, params, token_ids)
    for name in _NOT_FOR_PREFILL:
        leg.pop(name, None)
    leg["max_tokens"] = 1
    leg["n"] = 1
    if leg.get("tools"):
        # With tools vLLM's default is "auto", which needs a tool parser and may build a grammar.
        leg["tool_choice"] = "none"
    return leg


def decode_leg(body: Mapping[str, Any], params: LegParams, token_ids: Sequence[int]) -> JsonBody:
    """The client's request on the decode engine."""
    leg = _leg(body, params, token_ids)
    # Without it vLLM does not tell the connector of a request that it rejects.
    leg[PARAMS_FIELD]["do_remote_prefill"] = True
    return leg


def _leg(body: Mapping[str, Any], params: LegParams, token_ids: Sequence[int]) -> JsonBody:
    leg = without_params(body)
    leg[PARAMS_FIELD] = dict(params.to_params())
    if "messages" in leg:
        leg[PARAMS_FIELD]["prompt_token_ids"] = list(token_ids)
    else:
        leg["prompt"] = list(token_ids)
    return leg


def leg_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers for every request made on a client's behalf; both legs carry one ``X-Request-Id``.

    Two engines may share it: vLLM makes it unique within an engine by a suffix of its own.
    """
    passed = {name: headers[name] for name in _PASSED_HEADERS if name in headers}
    passed["X-Request-Id"] = headers.get("X-Request-Id") or uuid.uuid4().hex
    return passed
