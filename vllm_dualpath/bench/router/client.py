"""The load: some connections, each of which asks again as soon as it has an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import cast

from vllm_dualpath.bench.router.prompts import RequestBytes
from vllm_dualpath.bench.router.wire import MessageReader, status_of
from vllm_dualpath.errors import LaunchError

_ANSWER_S = 20.0


class _Connection(asyncio.Protocol):
    """Asks until ``ends_s``; times every answer."""

    def __init__(self, request: RequestBytes, numbers: Iterator[int], ends_s: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.times_s: list[float] = []
        self._request = request
        self._numbers = numbers
        self._ends_s = ends_s
        self._reader = MessageReader()
        self._sent_s = 0.0
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.WriteTransport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        answer = self._reader.feed(data)
        if answer is None:
            return
        now_s = time.perf_counter()
        self.times_s.append(now_s - self._sent_s)
        if (status := status_of(answer[0])) != 200:
            self._fail(f"status {status}: {answer[1][:200]!r}")
        elif now_s < self._ends_s:
            self._ask()
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection ended: {exc}")

    def close(self) -> None:
        """Nothing more is asked."""
        self._transport.close()

    def _ask(self) -> None:
        data = self._request.numbered(next(self._numbers))
        self._sent_s = time.perf_counter()
        self._transport.write(data)

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(LaunchError(f"a router under load failed: {reason}"))


async def load(
    port: int,
    request: RequestBytes,
    num_connections: int,
    duration_s: float,
    numbers: Iterator[int],
) -> list[float]:
    """Seconds of every answer, all connections together.

    Raises ``LaunchError`` for an answer that is none, or none in time.
    """
    loop = asyncio.get_running_loop()
    ends_s = time.perf_counter() + duration_s
    connections = []
    for _ in range(num_connections):
        _, connection = await loop.create_connection(
            lambda: _Connection(request, numbers, ends_s), "127.0.0.1", port
        )
        connections.append(connection)
    try:
        async with asyncio.timeout(duration_s + _ANSWER_S):
            await asyncio.gather(*(connection.done for connection in connections))
    except TimeoutError as exc:
        raise LaunchError(f"port {port}: no answer in {_ANSWER_S:.0f} s") from exc
    finally:
        for connection in connections:
            connection.close()
    return [time_s for connection in connections for time_s in connection.times_s]
