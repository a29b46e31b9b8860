"""HTTP/1.1 to engines: connections that are kept and used again, answers as they arrive.

A router sends three or four requests for each one it gets, so a general client's comfort is most of
its own cost; here is what engines need. Failures are ``ConnectionError`` (and ``TimeoutError``
while connecting); which engine that concerns the caller knows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import httptools
from yarl import URL

_CONNECT_S = 5.0
_KEEP_S = 2.0
"""Shorter than the 5 s of vLLM's server: none is reused just while the server closes it."""
_MAX_BUFFERED_BYTES = 1 << 18
"""An answer that nobody reads stays with its engine."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine listens, and what its paths begin with."""

    host: str
    port: int
    is_tls: bool
    authority: str
    base_path: str


@lru_cache(maxsize=4096)
def origin_of(url: str) -> Origin:
    """Raises ``ValueError`` for what is no URL of a server."""
    parsed = URL(url)
    if parsed.host is None or parsed.port is None:
        raise ValueError(f"url: expected http://host:port, found {url!r}")
    is_tls = parsed.scheme == "https"
    base = parsed.raw_path.rstrip("/")
    name = f"[{parsed.host}]" if ":" in parsed.host else parsed.raw_host
    return Origin(parsed.host, parsed.port, is_tls, f"{name}:{parsed.port}", base)


@dataclass(slots=True)
class Head:
    """Status and headers of an answer; the names as they came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    length: int | None = None
    """``None``: known only at its end."""


class Connection(asyncio.Protocol):
    """One connection; one request at a time. ``close`` it, or ``release`` it to its pool."""

    def __init__(self, pool: Pool, origin: Origin) -> None:
        self.origin = origin
        self.head = Head()
        self.was_kept = False
        """It has carried another request: its engine may be about to close it."""
        self._pool = pool
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._has_head = False
        self._is_complete = True
        self._is_head_only = False
        self._can_be_kept = False
        self._is_chunked = False
        self._ends_with_connection = False
        self._error: ConnectionError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._upload: asyncio.Task[None] | None = None
        self._upload_error: BaseException | None = None
        self._is_sent = False

    @property
    def has_answered(self) -> bool:
        """Whether the head of this request's answer has arrived."""
        return self._has_head

    @property
    def is_closing(self) -> bool:
        """Closed already, though nobody may have been told yet."""
        return self._transport.is_closing()

    # --- asking ---

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: bytes | AsyncIterator[bytes] | None,
    ) -> Head:
        """Send a request; return when its answer's head has arrived."""
        self.head = Head()
        self._has_head = self._is_complete = self._can_be_kept = False
        self._is_chunked = self._ends_with_connection = False
        self._is_head_only = method == "HEAD"
        self._upload = self._upload_error = None
        head = _request_head(self.origin, method, path, headers, data)
        if data is None or isinstance(data, bytes):
            self._transport.writelines((head, data) if data else (head,))
            self._is_sent = True
        else:
            self._transport.write(head)
            self._is_sent = False
            # Beside the wait for the head: an engine may answer before it has everything.
            self._upload = asyncio.create_task(self._send_chunks(data))
            self._upload.add_done_callback(self._upload_ended)
        while not self._has_head:
            if self._upload_error is not None:
                raise self._upload_error  # the client's fault, not the engine's
            await self._progress()
        return self.head

    async def read(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        while not self._chunks:
            if self._is_complete:
                return b""
            await self._progress()
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._buffered_bytes < _MAX_BUFFERED_BYTES <= self._buffered_bytes + len(chunk):
            self._transport.resume_reading()
        return chunk

    async def read_all(self) -> bytes:
        """The whole body."""
        parts = []
        while chunk := await self.read():
            parts.append(chunk)
        return b"".join(parts)

    def release(self) -> None:
        """The answer is done with; where it, or the request, has no end the connection goes."""
        is_whole = self._is_sent and self._is_complete and not self._chunks
        if is_whole and self._can_be_kept and self._error is None:
            self._timer = asyncio.get_running_loop().call_later(_KEEP_S, self.close)
            self._pool.keep(self)
        else:
            self.close()

    def close(self) -> None:
        """An engine that is at work on a request takes this as the order to stop."""
        self._pool.forget(self)
        self._end_upload()
        self._transport.abort()

    def taken(self) -> None:
        """It leaves the pool for another request."""
        if self._timer is not None:
            self._timer.cancel()

    async def _send_chunks(self, data: AsyncIterator[bytes]) -> None:
        async for chunk in data:
            if self._transport.is_closing():
                return  # uvloop raises RuntimeError where asyncio drops the bytes
            if chunk:
                self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if self._drained is not None:
                await self._drained
        if not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")
            self._is_sent = True

    def _upload_ended(self, upload: asyncio.Task[None]) -> None:
        """What was to be sent could not be had: half a request gets no answer."""
        if upload.cancelled() or (exc := upload.exception()) is None:
            return
        self._upload_error = exc
        self._error = self._error or ConnectionError(f"the request's body broke off: {exc!r}")
        self._transport.abort()
        self._wake()

    def _end_upload(self) -> None:
        """Nobody reads the rest of it."""
        if self._upload is not None and not self._upload.done():
            self._upload.cancel()

    async def _progress(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._is_complete:
            self.close()  # whatever that is, it is no answer to the next request
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._error = ConnectionError(f"no HTTP answer: {exc!r}")
            self._transport.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._end_upload()
        if self._error is None and exc is None and self._ends_with_connection:
            self._is_complete = True
        elif self._error is None:
            self._error = ConnectionError(f"connection closed{f': {exc}' if exc else ''}")
        self.resume_writing()
        self._wake()

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # --- the parser's side ---

    def on_message_begin(self) -> None:
        if self._has_head:
            raise ConnectionError("two answers to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1")
        text = value.decode("utf-8", "surrogateescape")
        self.head.headers[key] = text
        match key.lower():
            case "content-length":
                self.head.length = int(text)
            case "content-type":
                self.head.content_type = text.partition(";")[0].strip().lower()
            case "transfer-encoding":
                self._is_chunked = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.head.status = status
        self._has_head = True
        self._ends_with_connection = self.head.length is None and not self._is_chunked
        self._is_complete = self._is_head_only

    def on_body(self, body: bytes) -> None:
        if self._is_head_only:
            return
        self._chunks.append(body)
        before, self._buffered_bytes = self._buffered_bytes, self._buffered_bytes + len(body)
        if before < _MAX_BUFFERED_BYTES <= self._buffered_bytes:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if not self._has_head:
            self.head = Head()  # of 100 Continue and the like: the answer is still to come
            return
        self._is_complete = True
        self._end_upload()
        self._ends_with_connection = False
        self._can_be_kept = self._parser.should_keep_alive() and not self._is_head_only


class Pool:
    """Idle connections by origin, the one used last first."""

    def __init__(self) -> None:
        self._idle: dict[Origin, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._tls: ssl.SSLContext | None = None

    async def connection(self, origin: Origin) -> Connection:
        """One to ask on. Raises ``OSError`` (``TimeoutError`` too) when there is none to be had."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            connection.taken()
            if not connection.is_closing:
                connection.was_kept = True
                return connection
        async with asyncio.timeout(_CONNECT_S):
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                lambda: Connection(self, origin),
                origin.host,
                origin.port,
                ssl=self._tls_context() if origin.is_tls else None,
            )
        self._open.add(connection)
        return connection

    def keep(self, connection: Connection) -> None:
        self._idle.setdefault(connection.origin, []).append(connection)

    def forget(self, connection: Connection) -> None:
        """It is closed, or will be."""
        connection.taken()
        self._open.discard(connection)
        idle = self._idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.origin]

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._open):
            connection.close()

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _request_head(
    origin: Origin,
    method: str,
    path: str,
    headers: Mapping[str, str],
    data: bytes | AsyncIterator[bytes] | None,
) -> bytes:
    lines = [f"{method} {origin.base_path}{path} HTTP/1.1", f"Host: {origin.authority}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if isinstance(data, bytes):
        lines.append(f"Content-Length: {len(data)}")
    elif data is not None:
        lines.append("Transfer-Encoding: chunked")
    elif method in ("POST", "PUT", "PATCH"):
        lines.append("Content-Length: 0")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a request's line or header must not contain line breaks")
    return text.encode("utf-8", "surrogateescape") + b"\r\n\r\n"
