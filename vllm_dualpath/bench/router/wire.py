"""Just enough HTTP/1.1 to serve and ask for small JSON: the ends must cost little beside a router.

Both ends are ours or a router, so what is read is well formed; anything else ends the connection.
"""

from __future__ import annotations

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class MessageReader:
    """Cuts the bytes of one connection into messages of (head, body)."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head = b""
        self._body_start = 0
        self._length: int | None = None

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Take in bytes; the message that they complete, its head in lower case.

        One message at a time is under way: nobody here sends the next before the answer. Raises
        ``ValueError`` for what is no HTTP.
        """
        self._buffer += data
        if not self._head and not self._read_head():
            return None
        body = self._body()
        if body is None:
            return None
        message = self._head, body
        self._buffer.clear()
        self._head = b""
        return message

    def _read_head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return False
        self._head = bytes(self._buffer[: end + 2]).lower()
        self._body_start = end + len(_HEAD_END)
        at = self._head.find(b"\r\ncontent-length:")
        if at >= 0:
            self._length = int(self._head[at + 17 : self._head.index(b"\r\n", at + 2)])
        elif b"\r\ntransfer-encoding: chunked" in self._head:
            self._length = None
        else:
            self._length = 0
        return True

    def _body(self) -> bytes | None:
        if self._length is None:
            # Chunks are left as they are: nobody looks into such a body.
            whole = self._buffer.endswith(_LAST_CHUNK)
            return bytes(self._buffer[self._body_start :]) if whole else None
        end = self._body_start + self._length
        if len(self._buffer) < end:
            return None
        if len(self._buffer) > end:
            raise ValueError(f"HTTP: {len(self._buffer) - end} bytes after the end of a message")
        return bytes(self._buffer[self._body_start : end])


def status_of(head: bytes) -> int:
    """Of an answer. Raises ``ValueError`` for what is none."""
    if not head.startswith(b"http/1."):
        raise ValueError(f"HTTP: expected an answer, found {head[:40]!r}")
    return int(head[9:12])


def answer(body: bytes, status: int = 200) -> bytes:
    """A whole answer of JSON."""
    head = (
        f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        "\r\n\r\n"
    )
    return head.encode() + body
