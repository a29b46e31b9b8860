"""Requests to any OpenAI-compatible server, answers as token ids."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MODEL_NAME = "tiny"

_TIMEOUT_S = 120.0


class HttpError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:500]}")
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Answer:
    """What a completion request returned."""

    choices: tuple[tuple[int, ...], ...]
    """Token ids of each choice, by index."""
    body: Mapping[str, Any]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The only choice's."""
        (only,) = self.choices
        return only


def greedy(prompt: Sequence[Any], num_tokens: int, **options: object) -> dict[str, object]:
    """The body of a completion of exactly ``num_tokens``."""
    return {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def post(url: str, body: Mapping[str, object] | None) -> Any:
    """POST JSON, return JSON (or ``None`` for an empty answer). Raises ``HttpError``."""
    with _open(url, body) as response:
        content = response.read()
    return json.loads(content) if content else None


def complete(url: str, body: Mapping[str, object]) -> Answer:
    """One request to ``/v1/completions``. Raises ``HttpError``."""
    content = post(f"{url}/v1/completions", body)
    ordered = sorted(content["choices"], key=lambda choice: choice["index"])
    return Answer(tuple(tuple(choice["token_ids"]) for choice in ordered), content)


def complete_all(url: str, bodies: Sequence[Mapping[str, object]]) -> list[Answer]:
    """All requests at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: complete(url, body), bodies))


@contextlib.contextmanager
def stream(url: str, body: Mapping[str, object]) -> Iterator[Iterator[list[int]]]:
    """A streamed completion, as an iterator of new token ids; leaving the block closes it."""
    with _open(f"{url}/v1/completions", {**body, "stream": True}) as response:
        yield _stream_tokens(response)


def _stream_tokens(response: Any) -> Iterator[list[int]]:
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[len(b"data: ") :])
            for choice in event.get("choices", ()):
                yield list(choice.get("token_ids") or ())


@contextlib.contextmanager
def _open(url: str, body: Mapping[str, object] | None) -> Iterator[Any]:
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            yield response
    except urllib.error.HTTPError as exc:
        raise HttpError(exc.code, exc.read().decode("utf-8", "replace")) from exc
