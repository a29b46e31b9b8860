"""HTTP to the engines: answers as they come; engines that do not answer are noticed.

``ask`` raises ``PeerLost`` while nothing of an answer has arrived: another engine may be asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.engine import Engine

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_KEEPALIVE_S = 2.0
"""Shorter than the 5 s of vLLM's server: none is reused just while the server closes it."""
_PROBE_S = 5.0
_ANSWER_S = 10.0
"""Engines tokenize the longest prompts within seconds."""
_PROBE_INTERVAL_S = 0.5


@dataclass(slots=True)
class Answer:
    """An engine's answer: the whole body, or its first bytes and the rest to come."""

    engine: Engine
    response: aiohttp.ClientResponse
    first: bytes
    streamed: bool

    @property
    def status(self) -> int:
        return self.response.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ``PeerLost`` when it breaks off."""
        yield self.first
        if not self.streamed:
            return
        try:
            async for chunk in self.response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise PeerLost(f"{self.engine.engine_id}: the answer broke off: {exc}") from exc

    def close(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        self.response.close() if not self.response.content.at_eof() else self.response.release()


class Upstream:
    """See the module's docstring."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

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
            response = await self._session.request(
                method,
                _url(engine, path),
                headers=headers,
                data=data,
                allow_redirects=False,
            )
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as exc:
            self._doubt(engine)
            raise PeerLost(f"{engine.engine_id}: no answer to {method} {path}: {exc!r}") from exc
        try:
            streamed = response.content_length is None
            first = await (response.content.readany() if streamed else response.content.read())
        except (aiohttp.ClientError, ConnectionError) as exc:
            response.close()
            self._doubt(engine)
            raise PeerLost(f"{engine.engine_id}: the answer broke off: {exc!r}") from exc
        except BaseException:
            response.close()
            raise
        return Answer(engine, response, first, streamed)

    async def fetch_soon(
        self, engine: Engine, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[int, str, bytes]:
        """As ``fetch``, for what takes no generation: an engine that is silent is a lost one."""
        try:
            return await asyncio.wait_for(self.fetch(engine, path, headers, data), _ANSWER_S)
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
            content = b"".join([chunk async for chunk in answer.chunks()])
            return answer.status, answer.response.content_type, content
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
            async with self._session.get(
                _url(engine, "/health"), timeout=aiohttp.ClientTimeout(total=_PROBE_S)
            ) as response:
                self._cluster.set_serving(engine, response.status == 200)
        except (TimeoutError, aiohttp.ClientError, ConnectionError, ValueError) as exc:
            logger.debug("engine %s does not serve yet: %r", engine.engine_id, exc)
        if engine.serving:
            logger.info("engine %s serves at %s", engine.engine_id, engine.hello.url)
        return engine.serving


def _url(engine: Engine, path: str) -> URL:
    """``path`` is passed on as the client encoded it."""
    return URL(engine.hello.url.rstrip("/") + path, encoded=True)


JSON_HEADERS = {"Content-Type": "application/json"}
