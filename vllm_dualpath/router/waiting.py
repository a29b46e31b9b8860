"""The line of requests that no engine can take yet: one for each group of engines, FIFO.

Nothing here looks at a clock but the deadline of each request: a line moves when something has
changed, and a request whose deadline passes leaves it for the policy's choice without limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from vllm_dualpath.policy import WaitingLine

_PlacedT = TypeVar("_PlacedT")


class NotNow(Enum):
    """The answer of an attempt to place the head of a line: it stays there."""

    NOT_NOW = 0


Attempt = Callable[[WaitingLine], "_PlacedT | NotNow | None"]
"""Tries to place one request: its place, ``None`` where it can have none, or ``NOT_NOW``."""


@dataclass(slots=True, eq=False)
class _Waiter(Generic[_PlacedT]):
    attempt: Attempt[_PlacedT]
    discard: Callable[[_PlacedT], None]
    future: asyncio.Future[_PlacedT | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Line(Generic[_PlacedT]):
    """Owned by the event loop's thread."""

    def __init__(self) -> None:
        self._line = WaitingLine()
        self._waiters: dict[int, _Waiter[_PlacedT]] = {}
        self._woken: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    async def place(
        self,
        num_tokens: int,
        attempt: Attempt[_PlacedT],
        discard: Callable[[_PlacedT], None],
        timeout_s: float,
    ) -> _PlacedT | None:
        """Wait for a place. Raises ``TimeoutError`` after ``timeout_s``.

        ``attempt`` runs when the request is the head of the line and something has changed, at once
        if nobody is before it. A place that comes when its request has just left is discarded.
        """
        waiter = _Waiter(attempt, discard)
        ticket = self._line.push(num_tokens)
        self._waiters[ticket] = waiter
        try:
            if len(self._waiters) == 1:
                self._advance()
            if waiter.future.done():
                return waiter.future.result()
            # Not wait_for: until Python 3.12 it forgets a cancellation that meets a result.
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(waiter.future)
        except BaseException:
            self._leave(ticket, waiter)
            raise

    def wake(self) -> None:
        """Something has changed. The line moves soon, once for all changes until then."""
        if self._waiters and self._woken is None:
            self._woken = asyncio.get_running_loop().call_soon(self._wake_up)

    def _wake_up(self) -> None:
        self._woken = None
        self._advance()

    def _advance(self) -> None:
        while self._waiters:
            ticket = self._line.head()
            waiter = self._waiters[ticket]
            try:
                place = waiter.attempt(self._line)
            except Exception as exc:
                self._take_out(ticket)
                waiter.future.set_exception(exc)
                continue
            if isinstance(place, NotNow):
                return
            self._take_out(ticket)
            waiter.future.set_result(place)

    def _take_out(self, ticket: int) -> None:
        del self._waiters[ticket]
        self._line.cancel(ticket)

    def _leave(self, ticket: int, waiter: _Waiter[_PlacedT]) -> None:
        if ticket in self._waiters:
            was_head = self._line.head() == ticket
            self._take_out(ticket)
            if was_head:
                self.wake()  # the next one may be smaller
            return
        if waiter.future.exception() is None:
            place = waiter.future.result()
            if place is not None:
                waiter.discard(place)
