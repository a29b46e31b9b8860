"""Which requests a transfer can serve, in one table; the others go to a decode engine alone.

Not an error and not a limit of what clients may send: vLLM itself answers those requests, or
refuses them; they reach it untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_dualpath.router.body import Ints

Body = Mapping[str, Any]

_MAX_COUNT = 1 << 24
"""The slot table counts claims, so ``n``, in 24 bits."""

_TEXT_PART_KEYS = frozenset({"type", "text", "cache_control"})


def alone_reason(body: Body) -> str:
    """Why this request goes to a decode engine alone; empty when a transfer can serve it."""
    for reason, applies in _TABLE:
        if applies(body):
            return reason
    return ""


def _list_of_prompts(body: Body) -> bool:
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or isinstance(prompt, Ints):
        return False
    return not all(type(token) is int for token in prompt)


def _no_prompt(body: Body) -> bool:
    """Neither text, token ids nor messages: vLLM says what is wrong with it."""
    if "messages" in body:
        return not isinstance(body["messages"], list) or "prompt" in body
    return not isinstance(body.get("prompt"), str | list) or not body["prompt"]


def _not_only_text(body: Body) -> bool:
    messages = body.get("messages")
    contents = [
        message.get("content") if isinstance(message, dict) else message
        for message in (messages if isinstance(messages, list) else ())
    ]
    return not all(_is_text(content) for content in contents)


def _is_text(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, str)
        or (
            isinstance(part, dict) and part.get("type") == "text" and part.keys() <= _TEXT_PART_KEYS
        )
        for part in content
    )


def _odd_counts(body: Body) -> bool:
    """``n`` or a token limit is no positive number of a sensible size: vLLM's to judge."""
    values = (body.get("n"), body.get("max_tokens"), body.get("max_completion_tokens"))
    return any(
        value is not None and (type(value) is not int or not 0 < value < _MAX_COUNT)
        for value in values
    )


def _odd_salt(body: Body) -> bool:
    salt = body.get("cache_salt")
    return salt is not None and (not isinstance(salt, str) or not salt)


def _present(*names: str) -> Callable[[Body], bool]:
    return lambda body: any([body.get(name) is not None for name in names])  # noqa: C419 # faster


def _truthy(name: str) -> Callable[[Body], bool]:
    return lambda body: bool(body.get(name))


_TABLE: tuple[tuple[str, Callable[[Body], bool]], ...] = (
    ("prompt_logprobs need every prompt token computed", _present("prompt_logprobs")),
    ("echo needs the prompt rendered", _truthy("echo")),
    ("prompt embeddings have no token ids", _present("prompt_embeds")),
    ("multimodal content is not covered yet", _not_only_text),
    ("multimodal options are not covered yet", _present("mm_processor_kwargs", "media_io_kwargs")),
    ("encoder cache transfers are not covered yet", _present("ec_transfer_params")),
    ("beam search is not covered yet", _truthy("use_beam_search")),
    ("a list of prompts is not covered yet", _list_of_prompts),
    ("a suffix needs the prompt as text", _present("suffix")),
    ("no usable prompt", _no_prompt),
    ("n or a token limit is not a positive integer", _odd_counts),
    ("cache_salt is not a non-empty string", _odd_salt),
)
