"""The router's real socket, driven from synchronous tests."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import TracebackType

from vllm_dualpath.control.bus import RouterSocket


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class CurveRouter:
    """A ``RouterSocket`` with an event loop of its own."""

    def __init__(self, keys: Path | None, endpoint: str | None = None) -> None:
        self.endpoint = endpoint or free_endpoint()
        self._runner = asyncio.Runner()
        self._received: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self._socket, self._task = self._runner.run(self._open(keys))

    async def _open(self, keys: Path | None) -> tuple[RouterSocket, asyncio.Task[None]]:
        opened = RouterSocket(self.endpoint, keys)
        take = opened.receive(lambda *message: self._received.put_nowait(message))
        return opened, asyncio.create_task(take)

    def recv(self, timeout_s: float) -> tuple[bytes, bytes]:
        """Raises ``TimeoutError``."""
        return self._runner.run(self._recv(timeout_s))

    async def _recv(self, timeout_s: float) -> tuple[bytes, bytes]:
        async with asyncio.timeout(timeout_s):
            return await self._received.get()

    def send(self, identity: bytes, payload: bytes) -> None:
        self._runner.run(self._send(identity, payload))

    async def _send(self, identity: bytes, payload: bytes) -> None:
        self._socket.send(identity, payload)

    def __enter__(self) -> CurveRouter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._task.cancel()
        self._runner.close()
        self._socket.close()
