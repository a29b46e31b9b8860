"""Packing and checking what peers tell each other out of band: addresses and descriptors.

The checksum finds cut or damaged ones before they reach a parser that does not know where they end
(UCX's). It is no defence against an enemy: these bytes travel over authenticated control only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from vllm_dualpath import native
from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport.base import Event, NoticeReceived, PeerClosed, PutDone

_PUT_DONE, _NOTICE = 0, 1  # TransportEvent::Kind in csrc/core/event_queue.hpp; 2 is a closed peer

_FrameT = TypeVar("_FrameT", bound=msgspec.Struct)


def pack(frame: msgspec.Struct) -> bytes:
    """A checksum, then the frame."""
    payload = msgspec.msgpack.encode(frame)
    return _checksum(payload) + payload


def unpack(data: bytes, frame_type: type[_FrameT]) -> _FrameT:
    """Decode what ``pack`` made of a ``frame_type``, or raise ``TransportError``.

    The type's tag holds its version, its docstring is its name.
    """
    name = str(frame_type.__doc__).rstrip(".")
    checksum, payload = bytes(data[:4]), bytes(data[4:])
    if not payload or _checksum(payload) != checksum:
        raise TransportError(f"not a {name}: damaged or cut off")
    try:
        return msgspec.msgpack.decode(payload, type=frame_type)
    except msgspec.DecodeError as exc:
        raise TransportError(f"not a {name}: {exc}") from exc


def event_of(kind: int, event_id: int, ok: bool, text: bytes, untouched: bool) -> Event:
    """A native event as ``base`` has it."""
    if kind == _NOTICE:
        return NoticeReceived(text)
    error = text.decode(errors="replace")
    if kind == _PUT_DONE:
        return PutDone(event_id, ok, error, untouched)
    return PeerClosed(event_id, error)


@contextmanager
def translated() -> Iterator[None]:
    """Native errors become ours."""
    try:
        yield
    except native.PeerClosedError as exc:
        raise PeerLost(str(exc)) from exc
    except (RuntimeError, ValueError, OverflowError, TypeError, OSError) as exc:
        raise TransportError(str(exc)) from exc


def _checksum(payload: bytes) -> bytes:
    return native.crc32c(native.buffer_address(payload), len(payload)).to_bytes(4, "little")
