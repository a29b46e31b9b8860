"""The one correction of a decode engine's answer: how many prompt tokens were cached.

vLLM's decode side takes the whole prompt from staging and reports all of it as cached. True is what
was not computed anywhere. Only the digits are replaced; every other byte passes as it is.
"""

from __future__ import annotations

import re

import msgspec

# In JSON text a quote inside a string is escaped, so this matches keys only.
_CACHED = re.compile(rb'("prompt_tokens_details":\s*\{[^{}]*?"cached_tokens":\s*)(\d+)')
_EVENT_END = re.compile(rb"\r?\n\r?\n")


def correct_cached_tokens(body: bytes, cached_tokens: int) -> bytes:
    """Replace the count where vLLM itself put the field."""
    digits = b"%d" % cached_tokens
    return _CACHED.sub(lambda found: found[1] + digits, body)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_ANSWERS = msgspec.json.Decoder(_Answer)


def reported_cached_tokens(body: bytes) -> int:
    """What an answer that is not streamed reports; 0 where it says nothing."""
    try:
        usage = _ANSWERS.decode(body).usage
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    details = None if usage is None else usage.prompt_tokens_details
    return 0 if details is None else details.cached_tokens or 0


class EventCorrector:
    """The correction for a stream of server-sent events: whole events go through at once."""

    def __init__(self, cached_tokens: int) -> None:
        self._cached_tokens = cached_tokens
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take in bytes as they arrive; return those of the events that are complete."""
        data = self._tail + chunk
        end = 0
        for match in _EVENT_END.finditer(data):
            end = match.end()
        self._tail = data[end:]
        return correct_cached_tokens(data[:end], self._cached_tokens)

    def close(self) -> bytes:
        """What is left at the end of the stream."""
        tail, self._tail = self._tail, b""
        return correct_cached_tokens(tail, self._cached_tokens)
