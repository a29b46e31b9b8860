"""HTTP to the engines: answers as they come; engines that do not answer are noticed.

``ask`` raises ``PeerLost`` while nothing of an answer has arrived: another engine may be asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.connections import Connection, Head, Pool, origin_of
from vllm_dualpath.router.engine import Engine

logger = logging.getLogger(__name__)

_PROBE_S = 5.0
_ANSWER_S = 10.0
"""Engines tokenize the longest prompts within seconds."""
_PROBE_INTERVAL_S = 0.5


@dataclass(slots=True)
class Answer:
    """An engine's answer: the whole body, or its first bytes and the rest to come."""

    engine: Engine
    connection: Connection
    head: Head
    first: bytes

    @property
    def streamed(self) -> bool:
        return self.head.length is None

    @property
    def status(self) -> int:
        return self.head.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ``PeerLost`` when it breaks off."""
        yield self.first
        try:
            while self.streamed and (chunk := await self.connection.read()):
                yield chunk
        except ConnectionError as exc:
            raise PeerLost(f"{self.engine.engine_id}: the answer broke off: {exc}") from exc

    def close(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        self.connection.release()


class Upstream:
    """See the module's docstring."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pool = Pool()

    def close(self) -> None:
        self._pool.close()

    async def ask(
        self,
        engine: Engine,
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: bytes | AsyncIterator[bytes] | None,
    ) -> Answer:
        """Send one request; return with the first bytes of a streamed body, or all of a plain one.

        Cancelling closes the connection, which makes vLLM abort the request.
        """
        try:
            return await self._ask(engine, method, path, headers, data)
        except OSError as exc:
            self._doubt(engine)
            raise PeerLost(f"{engine.engine_id}: no answer to {method} {path}: {exc!r}") from exc

    async def _ask(
        self,
        engine: Engine,
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: bytes | AsyncIterator[bytes] | None,
    ) -> Answer:
        while True:
            connection = await self._pool.connection(origin_of(engine.hello.url))
            try:
                head = await connection.ask(method, path, headers, data)
                read = connection.read if head.length is None else connection.read_all
                return Answer(engine, connection, head, await read())
            except ConnectionError:
                connection.close()
                # An engine closes what was long unused. Only what changes nothing is said again:
                # of anything else nobody knows whether it was heard.
                if connection.has_answered or not connection.was_kept or method not in _SAFE:
                    raise
            except BaseException:
                connection.close()
                raise

    async def fetch_soon(
        self, engine: Engine, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[int, str, bytes]:
        """As ``fetch``, for what takes no generation: an engine that is silent is a lost one."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self.fetch(engine, path, headers, data)
        except TimeoutError as exc:
            self._doubt(engine)
            raise PeerLost(f"{engine.engine_id}: no answer to {path} in {_ANSWER_S:.0f} s") from exc

    async def fetch(
        self, engine: Engine, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[int, str, bytes]:
        """Ask for JSON; return (status, content type, whole body). ``data`` None is a GET."""
        method = "GET" if data is None else "POST"
        answer = await self.ask(engine, method, path, {**headers, **JSON_HEADERS}, data)
        try:
            content = answer.first
            if answer.streamed:
                content = b"".join([chunk async for chunk in answer.chunks()])
            return answer.status, answer.head.content_type, content
        finally:
            answer.close()

    def _doubt(self, engine: Engine) -> None:
        """Give it no requests until it has answered a probe."""
        self._cluster.set_serving(engine, False)
        self._cluster.notify()

    async def probe_forever(self) -> None:
        """Find out which engines' HTTP servers answer. Engines that do are left alone."""
        while True:
            waiting = [engine for engine in self._cluster.engines if not engine.serving]
            if any(await asyncio.gather(*(self._probe(engine) for engine in waiting))):
                self._cluster.notify()
            if all(engine.serving for engine in self._cluster.engines):
                await self._cluster.wait_for_change(timeout_s=_PROBE_S)
            else:
                await asyncio.sleep(_PROBE_INTERVAL_S)

    async def _probe(self, engine: Engine) -> bool:
        try:
            async with asyncio.timeout(_PROBE_S):
                answer = await self._ask(engine, "GET", "/health", {}, None)
            answer.close()
            self._cluster.set_serving(engine, answer.status == 200)
        except (OSError, ValueError) as exc:
            logger.debug("engine %s does not serve yet: %r", engine.engine_id, exc)
        if engine.serving:
            logger.info("engine %s serves at %s", engine.engine_id, engine.hello.url)
        return engine.serving


JSON_HEADERS = {"Content-Type": "application/json"}
_SAFE = ("GET", "HEAD")
