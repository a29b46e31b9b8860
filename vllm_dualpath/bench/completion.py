"""One streamed completion of token ids, timed. Works with any vLLM or vllm-dualpath server."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_dualpath.errors import RequestError

# A request may wait for its turn for long; a stream that then falls silent is broken.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
_MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens of one answer and when each arrived, in seconds after the request was sent."""

    token_ids: tuple[int, ...]
    arrival_s: tuple[float, ...]
    cached_tokens: int | None = None
    """Prompt tokens the server says it did not compute; ``None`` if it does not say."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrival_s[0]

    @property
    def ttst_s(self) -> float | None:
        """Time from the first token to the second."""
        return self.arrival_s[1] - self.arrival_s[0] if len(self.arrival_s) > 1 else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens after the first."""
        gaps = len(self.arrival_s) - 1
        return (self.arrival_s[-1] - self.arrival_s[0]) / gaps if gaps else None


def open_session() -> aiohttp.ClientSession:
    """A session without a limit of connections: every agent of a replay has its own request."""
    return aiohttp.ClientSession(
        timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0), raise_for_status=False
    )


async def served_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first model that ``url`` serves. Raises ``RequestError``."""
    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise RequestError(f"{url}/v1/models: HTTP {response.status}; name it: --model")
            return str((await response.json())["data"][0]["id"])
    except aiohttp.ClientConnectionError as exc:
        raise RequestError(
            f"no server answers at {url}/v1/models: {exc}; start one, or name another address"
        ) from exc
    except (aiohttp.ClientError, KeyError, IndexError, ValueError) as exc:
        raise RequestError(f"{url}/v1/models: no answer that names a model: {exc!r}") from exc


async def complete(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], num_tokens: int
) -> Completion:
    """Generate exactly ``num_tokens`` greedily. Raises ``RequestError``."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    start_s = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                text = (await response.text())[:_MAX_ERROR_CHARS]
                raise RequestError(f"{url}: HTTP {response.status}: {text}")
            completion = await _collect(response, start_s)
    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
        raise RequestError(f"{url}: the request broke off: {exc!r}") from exc
    if len(completion.token_ids) != num_tokens:
        raise RequestError(f"{url}: expected {num_tokens} tokens, {len(completion.token_ids)} came")
    return completion


async def _collect(response: aiohttp.ClientResponse, start_s: float) -> Completion:
    token_ids: list[int] = []
    arrival_s: list[float] = []
    cached_tokens = None
    async for event in _events(response):
        if "error" in event:
            raise RequestError(f"error in the stream: {str(event['error'])[:_MAX_ERROR_CHARS]}")
        for choice in event.get("choices") or ():
            new = choice.get("token_ids") or ()
            token_ids.extend(new)
            arrival_s.extend([time.perf_counter() - start_s] * len(new))
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached_tokens = details.get("cached_tokens", cached_tokens)
    return Completion(tuple(token_ids), tuple(arrival_s), cached_tokens)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event up to ``[DONE]``."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            return
        yield json.loads(payload)
