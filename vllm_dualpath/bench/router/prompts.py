"""The requests: as ids, as text and as chat, of a number that makes each one's prompt its own.

The ids behind a text are nobody's tokenizer's: a number in the text, and a fixed rest. An engine
that does nothing finds them as fast as it can answer at all.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Kind = Literal["ids", "text", "chat"]
KINDS: tuple[Kind, ...] = ("ids", "text", "chat")
MODEL = "m"

STORED = 1_000_000
"""The number of the prompts that the engines' store holds; requests without hits count on."""

_MARK = "request "
_DIGITS = 7
_VOCABULARY = 150_000
_SHORT_TOKENS = 100
_SHORT_BYTES = 4000
"""No body of a short prompt is longer, none of a long one shorter."""
_TURNS = 8
_LETTERS_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class RequestBytes:
    """A whole HTTP request, but for its number."""

    before: bytes
    after: bytes

    def numbered(self, number: int) -> bytes:
        """The request; ``number`` has seven digits."""
        return b"%b%d%b" % (self.before, number, self.after)


def token_ids(number: int, num_tokens: int) -> list[int]:
    """The ids of a prompt, in whatever form it is sent."""
    return [number, *_rest(num_tokens)]


@cache
def _rest(num_tokens: int) -> tuple[int, ...]:
    drawn = random.Random(num_tokens)
    return tuple(drawn.randrange(1000, _VOCABULARY) for _ in range(num_tokens - 1))


def request_bytes(kind: Kind, num_tokens: int) -> RequestBytes:
    """A request for a few tokens; compact JSON, as OpenAI's client sends."""
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    body = {"model": MODEL} | _prompt(kind, num_tokens) | {"max_tokens": 16, "temperature": 0}
    content = json.dumps(body, separators=(",", ":"))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    before, after = (head + content).split(str(STORED), 1)
    return RequestBytes(before.encode(), after.encode())


def _prompt(kind: Kind, num_tokens: int) -> dict[str, Any]:
    if kind == "ids":
        return {"prompt": token_ids(STORED, num_tokens)}
    text = _text(num_tokens)
    if kind == "text":
        return {"prompt": text}
    step = -(-len(text) // _TURNS)
    parts = [text[start : start + step] for start in range(0, len(text), step)]
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[i % 2], "content": part} for i, part in enumerate(parts)]}


def _text(num_tokens: int) -> str:
    drawn = random.Random(num_tokens)
    words = [f"{_MARK}{STORED}"]
    while sum(map(len, words)) + len(words) < num_tokens * _LETTERS_A_TOKEN:
        words += ["".join(drawn.choices("abcdefghij", k=drawn.randint(2, 8))) for _ in range(64)]
    return " ".join(words)[: num_tokens * _LETTERS_A_TOKEN]


def tokenized(body: bytes) -> bytes:
    """What ``/tokenize`` answers."""
    at = body.index(_MARK.encode()) + len(_MARK)
    return b'{"tokens":[%b,%b' % (
        body[at : at + _DIGITS],
        _tokenized_rest(len(body) > _SHORT_BYTES),
    )


@cache
def _tokenized_rest(long: bool) -> bytes:
    num_tokens = 8000 if long else _SHORT_TOKENS
    ids = ",".join(map(str, _rest(num_tokens)))
    return f'{ids}],"count":{num_tokens},"max_model_len":200000,"token_strs":null}}'.encode()
