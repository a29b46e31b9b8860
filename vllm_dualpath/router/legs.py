"""The bodies and headers of the requests that engines get, made from a client's. Pure functions.

Field names are those of vLLM's request classes, in
``entrypoints/openai/{completion,chat_completion}/protocol.py``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from vllm_dualpath.messages import LegParams
from vllm_dualpath.router.body import Body, JsonBody, TokenIds

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
    # A generator for a token that is thrown away; vLLM's CPU build dies of one that it offsets.
    "seed",
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


def forges_params(body: Mapping[str, Any]) -> bool:
    """Whether the client's body has ``kv_transfer_params``: those are the router's to give."""
    if PARAMS_FIELD in body:
        return True
    extra = body.get("vllm_xargs")
    # vLLM puts both into one dictionary.
    return (isinstance(extra, dict) and PARAMS_FIELD in extra) or _sampling_extra(body) is not None


def _sampling_extra(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a body with vLLM's own sampling parameters, their dictionary with the router's field."""
    sampling = body.get("sampling_params")
    extra = sampling.get("extra_args") if isinstance(sampling, dict) else None
    return extra if isinstance(extra, dict) and PARAMS_FIELD in extra else None


def without_params(body: Body) -> JsonBody:
    """The client's fields without ``kv_transfer_params``."""
    fields = body.fields()
    if forges_params(body):
        fields.pop(PARAMS_FIELD, None)
        extra = body.get("vllm_xargs")
        if isinstance(extra, dict):
            fields["vllm_xargs"] = _without_field(extra)
        if (extra := _sampling_extra(body)) is not None:
            sampling = {**body["sampling_params"], "extra_args": _without_field(extra)}
            fields["sampling_params"] = sampling
    return fields


def _without_field(extra: JsonBody) -> JsonBody:
    return {name: value for name, value in extra.items() if name != PARAMS_FIELD}


def prefill_leg(body: Body, params: LegParams, token_ids: TokenIds) -> bytes:
    """One token on the prefill engine; the prompt as ids, so that nothing is rendered again."""
    leg = _leg(body, params, token_ids, {})
    for name in _NOT_FOR_PREFILL:
        leg.pop(name, None)
    leg["max_tokens"] = 1
    leg["n"] = 1
    if body.get("tools"):
        # With tools vLLM's default is "auto", which needs a tool parser and may build a grammar.
        leg["tool_choice"] = "none"
    return body.encode(leg)


def decode_leg(body: Body, params: LegParams, token_ids: TokenIds) -> bytes:
    """The client's request on the decode engine."""
    # Without it vLLM does not tell the connector of a request that it rejects.
    return body.encode(_leg(body, params, token_ids, {"do_remote_prefill": True}))


def _leg(body: Body, params: LegParams, token_ids: TokenIds, extra: JsonBody) -> JsonBody:
    leg = without_params(body)
    leg_params = leg[PARAMS_FIELD] = dict(params.to_params()) | extra
    if "messages" in body:
        leg_params["prompt_token_ids"] = token_ids.raw
    else:
        leg["prompt"] = token_ids.raw
    return leg


def leg_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers for every request made on a client's behalf; both legs carry one ``X-Request-Id``.

    Two engines may share it: vLLM makes it unique within an engine by a suffix of its own.
    """
    passed = {name: headers[name] for name in _PASSED_HEADERS if name in headers}
    passed["X-Request-Id"] = headers.get("X-Request-Id") or secrets.token_hex(16)
    return passed
