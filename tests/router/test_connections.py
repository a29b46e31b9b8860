"""The router's own HTTP client, against servers that write every byte themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.router.cluster import hello_of
from vllm_dualpath.errors import PeerLost
from vllm_dualpath.router.cluster import Cluster
from vllm_dualpath.router.connections import Connection, Pool, origin_of
from vllm_dualpath.router.engine import Engine
from vllm_dualpath.router.upstream import Upstream

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[Pool, str]]:
    """A pool, and the URL of a server that runs ``serve`` for each connection."""

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    listening = await asyncio.start_server(closing, "127.0.0.1", 0)
    pool = Pool()
    port = listening.sockets[0].getsockname()[1]
    try:
        yield pool, f"http://127.0.0.1:{port}/base/"
    finally:
        pool.close()
        listening.close()
        await listening.wait_closed()


def answering(*answers: bytes, heard: list[bytes] | None = None) -> Serve:
    """One answer a request of this connection; then it is closed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            if heard is not None:
                heard.append(head)
            writer.write(answer)
            await writer.drain()

    return serve


async def connect(pool: Pool, url: str) -> Connection:
    return await pool.connection(origin_of(url))


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/x; a=b\r\n\r\nok"


async def test_a_released_connection_is_used_again() -> None:
    """The second request goes over the first one's connection; the head is what it should be."""
    heard: list[bytes] = []
    async with server(answering(PLAIN, PLAIN, heard=heard)) as (pool, url):
        first = await connect(pool, url)
        head = await first.ask("GET", "/a?b=c", {"X-One": "1"}, None)
        assert (head.status, head.content_type, head.length) == (200, "text/x", 2)
        assert await first.read_all() == b"ok"
        first.release()
        second = await connect(pool, url)
        assert second is first
        await second.ask("GET", "/", {}, None)
        assert await second.read_all() == b"ok"
    host = url.removeprefix("http://").removesuffix("/base/").encode()
    assert heard[0] == b"GET /base/a?b=c HTTP/1.1\r\nHost: %b\r\nX-One: 1\r\n\r\n" % host


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
    ],
)
async def test_every_way_to_end_a_body(answer: bytes) -> None:
    """Chunks, the end of the connection, and a length after an answer that is none yet."""
    async with server(answering(answer)) as (pool, url):
        connection = await connect(pool, url)
        head = await connection.ask("POST", "/", {}, b"x")
        assert (head.status, await connection.read_all()) == (200, b"ok")


async def test_a_head_has_no_body() -> None:
    """The length in an answer to HEAD is of what GET would get."""
    async with server(answering(PLAIN.removesuffix(b"ok"))) as (pool, url):
        connection = await connect(pool, url)
        await connection.ask("HEAD", "/", {}, None)
        assert await connection.read_all() == b""


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(answer: bytes) -> None:
    """A half answer never looks like a whole one."""
    async with server(answering(answer)) as (pool, url):
        connection = await connect(pool, url)
        with pytest.raises(ConnectionError):
            await connection.ask("GET", "/", {}, None)
            await connection.read_all()
        connection.release()
        assert not pool._idle


async def test_surplus_bytes_are_no_answer_to_the_next_request() -> None:
    """What an engine says unasked ends the connection: it is not used again."""
    surplus = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN)
        await surplus.wait()
        writer.write(PLAIN)
        assert await reader.read() == b""
        surplus.clear()

    async with server(serve) as (pool, url):
        first = await connect(pool, url)
        await first.ask("GET", "/", {}, None)
        assert await first.read_all() == b"ok"
        first.release()
        surplus.set()
        while pool._idle:  # noqa: ASYNC110 # the pool tells nobody
            await asyncio.sleep(0.01)
        assert await connect(pool, url) is not first


async def test_two_answers_at_once_are_not_one() -> None:
    """The first is delivered alone, and the connection is not used again."""
    async with server(answering(PLAIN + PLAIN)) as (pool, url):
        connection = await connect(pool, url)
        await connection.ask("GET", "/", {}, None)
        assert await connection.read_all() == b"ok"
        connection.release()
        assert not pool._idle


async def test_an_address_of_version_six_has_brackets() -> None:
    """In the Host header, but not where the connection goes to."""
    origin = origin_of("http://[::1]:8000")
    assert (origin.host, origin.authority) == ("::1", "[::1]:8000")


async def test_a_body_in_pieces_arrives_whole() -> None:
    """An upload is passed on as it comes, in chunks."""
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Transfer-Encoding: chunked" in await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            got.extend(await reader.readexactly(size))
            await reader.readexactly(2)
        writer.write(PLAIN)

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(64):
            yield bytes([number]) * 40_000

    async with server(serve) as (pool, url):
        connection = await connect(pool, url)
        assert (await connection.ask("PUT", "/", {}, pieces())).status == 200
    assert bytes(got) == b"".join([bytes([number]) * 40_000 for number in range(64)])


REFUSED = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n%b\r\nno"


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
async def test_an_engine_may_answer_before_the_whole_upload(header: bytes) -> None:
    """The answer is returned at once; the connection, with half a request on it, is not kept."""
    is_stopped = False

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"some\r\n")
        writer.write(REFUSED % header)
        if not header:
            await reader.read()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal is_stopped
        try:
            yield b"some"
            await asyncio.Event().wait()
        finally:
            is_stopped = True

    async with server(serve) as (pool, url):
        connection = await connect(pool, url)
        head = await connection.ask("PUT", "/", {}, endless())
        assert (head.status, await connection.read_all()) == (413, b"no")
        connection.release()
        assert not pool._idle
        assert is_stopped


async def test_an_upload_to_a_closed_connection_is_an_error() -> None:
    """An engine that goes away is a ConnectionError, however much is still to be sent."""
    lost = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"some"
        await lost.wait()
        yield b"more"

    async with server(answering(b"")) as (pool, url):
        connection = await connect(pool, url)
        dropped = connection.connection_lost

        def connection_lost(exc: Exception | None) -> None:
            lost.set()
            dropped(exc)

        connection.connection_lost = connection_lost  # type: ignore[method-assign]
        with pytest.raises(ConnectionError):
            await connection.ask("PUT", "/", {}, pieces())


async def test_an_upload_that_breaks_off_is_not_the_engines_fault() -> None:
    """What the source of a body raises is raised, and the engine sees no complete request."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            seen.append(await reader.read())

    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise ValueError("bad chunk")

    async with server(serve) as (pool, url):
        connection = await connect(pool, url)
        with pytest.raises(ValueError, match="bad chunk"):
            await connection.ask("PUT", "/", {}, broken())
        connection.release()
        assert not pool._idle
    assert not any(b"0\r\n\r\n" in data for data in seen)


async def test_an_answer_that_nobody_reads_stays_with_its_engine() -> None:
    """A slow client holds up the engine's sending, and gets everything in the end."""
    size = 32 << 20
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with server(serve) as (pool, url):
        connection = await connect(pool, url)
        await connection.ask("GET", "/", {}, None)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < size
        assert connection._buffered_bytes < 4 << 20
        assert len(await connection.read_all()) == size


async def test_a_header_cannot_smuggle_another() -> None:
    """Line breaks are refused before a byte is sent."""
    async with server(answering(PLAIN)) as (pool, url):
        for headers, path in (({"A": "b\r\nC: d"}, "/"), ({}, "/ HTTP/1.1\r\nA: b\r\n\r\n")):
            connection = await connect(pool, url)
            with pytest.raises(ValueError, match="line breaks"):
                await connection.ask("GET", path, headers, None)
            connection.close()


async def test_nobody_there_is_an_error() -> None:
    """A port that nobody listens on."""
    async with server(answering()) as (_, url):
        pass
    with pytest.raises(OSError, match=r"refused|failed|111"):
        await Pool().connection(origin_of(url))
    with pytest.raises(ValueError, match="expected http"):
        origin_of("nonsense")


async def test_a_connection_that_is_closing_is_not_used_again() -> None:
    """Its engine has closed it; that the loop has yet to say so must cost nobody a request."""
    async with server(answering(PLAIN)) as (pool, url):
        first = await connect(pool, url)
        await first.ask("GET", "/", {}, None)
        assert await first.read_all() == b"ok"
        first.release()
        first._transport.abort()
        second = await connect(pool, url)
        assert second is not first
        assert not second.was_kept


@pytest.mark.parametrize(("method", "is_repeated"), [("GET", True), ("POST", False)])
async def test_what_changes_nothing_is_asked_again(method: str, is_repeated: bool) -> None:
    """A kept connection is closed instead of an answer: only a GET may go over a fresh one."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            heard.append(await reader.readuntil(b"\r\n\r\n"))
            if len(heard) == 2:
                return
            writer.write(PLAIN)

    async with server(serve) as (_, url):
        upstream = Upstream(Cluster())
        engine = Engine(hello_of("decode", "decode", url), 0.0)
        (await upstream.ask(engine, "GET", "/", {}, None)).close()
        with contextlib.nullcontext() if is_repeated else pytest.raises(PeerLost):
            answer = await upstream.ask(engine, method, "/", {}, None)
            assert answer.first == b"ok"
        upstream.close()
    assert len(heard) == 2 + is_repeated
