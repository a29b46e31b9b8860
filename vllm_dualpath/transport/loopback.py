"""A transport inside one process: the rules of ``base`` with ``memmove`` for a network.

For tests and single-process use. Instances find each other by address. ``pause`` holds deliveries,
so that a test can look at the time between ``put`` and its outcome.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dualpath.errors import PeerLost, TransportError
from vllm_dualpath.transport.base import (
    Event,
    NoticeReceived,
    PeerClosed,
    PutArray,
    PutDone,
    Region,
    Transport,
)

_MAX_NOTICE_BYTES = 4096
_NONCE_BYTES = 16

# Guards every instance and the registry: instances of several threads write into each other.
_lock = threading.RLock()
_open_instances: dict[bytes, LoopbackTransport] = {}


@dataclass(frozen=True, slots=True)
class _Peer:
    nonce: bytes
    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)  # held batches are told apart by identity
class _Batch:
    put_id: int
    peer_id: int
    pieces: PutArray
    notice: bytes


class LoopbackTransport(Transport):
    """One endpoint of the loopback; see the module's docstring."""

    def __init__(self) -> None:
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events: list[Event] = []
        self._regions: list[tuple[int, int]] = []
        self._peers: dict[int, _Peer] = {}
        self._held: deque[_Batch] = deque()
        self._paused = False
        self._closed = False
        self._next_id = 1
        with _lock:
            _open_instances[self._nonce] = self

    @property
    def name(self) -> str:
        return "loopback"

    @property
    def address(self) -> bytes:
        return self._nonce

    def register(self, address: int, num_bytes: int, *, fd: int | None = None) -> Region:
        del fd  # everything is in one process
        self._check_open()
        if address <= 0 or num_bytes <= 0:
            raise TransportError("a region needs an address and a size")
        with _lock:
            self._regions.append((address, num_bytes))
        descriptor = self._nonce + np.array([address, num_bytes], dtype=np.dtype("<u8")).tobytes()
        return Region(address, num_bytes, descriptor)

    def connect(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> int:
        del same_host  # there is no other host
        self._check_open()
        peer = _parse(peer_address, region_descriptor)
        with _lock:
            peer_id = self._new_id()
            self._peers[peer_id] = peer
            if peer.nonce not in _open_instances:
                self._close_peer(peer_id, "no such loopback transport")
        return peer_id

    def put(self, peer_id: int, pieces: PutArray, notice: bytes) -> int:
        with _lock:
            peer = self._peers.get(peer_id)
            if peer is None:
                raise PeerLost(f"peer {peer_id} is closed")
            if len(notice) > _MAX_NOTICE_BYTES:
                raise TransportError(f"a notice has at most 4096 bytes, got {len(notice)}")
            pieces = np.array(pieces, dtype=np.uint64)
            self._check_pieces(peer, pieces)
            put_id = self._new_id()
            self._held.append(_Batch(put_id, peer_id, pieces, bytes(notice)))
            if not self._paused:
                self._deliver()
            return put_id

    def disconnect(self, peer_id: int) -> None:
        with _lock:
            if peer_id in self._peers:
                self._close_peer(peer_id, "disconnected")

    def fileno(self) -> int:
        return self._event_fd

    def poll(self) -> Sequence[Event]:
        with _lock:
            events, self._events = self._events, []
            if events and self._event_fd >= 0:
                os.eventfd_read(self._event_fd)
        return events

    def close(self) -> None:
        with _lock:
            if self._closed:
                return
            self._closed = True
            del _open_instances[self._nonce]
            for peer_id in list(self._peers):
                self._close_peer(peer_id, "the transport was closed")
            for other in _open_instances.values():
                other._lose(self._nonce)
            os.close(self._event_fd)
            self._event_fd = -1

    def pause(self) -> None:
        """Hold deliveries from here on: batches wait, as on a slow network."""
        self._paused = True

    def resume(self) -> None:
        """Deliver what was held, in order, and everything after it at once."""
        with _lock:
            self._paused = False
            self._deliver()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _push(self, event: Event) -> None:
        self._events.append(event)
        if len(self._events) == 1 and self._event_fd >= 0:
            os.eventfd_write(self._event_fd, 1)

    def _check_pieces(self, peer: _Peer, pieces: PutArray) -> None:
        if pieces.ndim != 2 or pieces.shape[1] != 3:
            raise TransportError("pieces must have the shape (num_pieces, 3)")
        for local, remote, num_bytes in pieces.tolist():
            what = f"piece (local {local:#x}, remote {remote:#x}, {num_bytes} bytes)"
            if num_bytes == 0:
                raise TransportError(f"{what} is empty")
            if not _inside(remote, num_bytes, peer.address, peer.num_bytes):
                raise TransportError(f"{what} is outside the peer's region")
            if not any(_inside(local, num_bytes, *region) for region in self._regions):
                raise TransportError(f"{what} is outside the registered regions")

    def _deliver(self) -> None:
        while self._held:
            batch = self._held.popleft()
            target = _open_instances[self._peers[batch.peer_id].nonce]
            for local, remote, num_bytes in batch.pieces.tolist():
                ctypes.memmove(remote, local, num_bytes)
            if batch.notice:
                target._push(NoticeReceived(batch.notice))
            self._push(PutDone(batch.put_id, True, ""))

    def _close_peer(self, peer_id: int, error: str) -> None:
        del self._peers[peer_id]
        for batch in [held for held in self._held if held.peer_id == peer_id]:
            self._held.remove(batch)
            self._push(PutDone(batch.put_id, False, error))
        self._push(PeerClosed(peer_id, error))

    def _lose(self, nonce: bytes) -> None:
        for peer_id in [each for each, peer in self._peers.items() if peer.nonce == nonce]:
            self._close_peer(peer_id, "the peer was closed")


def _inside(address: int, num_bytes: int, base: int, size: int) -> bool:
    return base <= address and address + num_bytes <= base + size


def _parse(peer_address: bytes, descriptor: bytes) -> _Peer:
    if len(peer_address) != _NONCE_BYTES or len(descriptor) != _NONCE_BYTES + 16:
        raise TransportError("not a loopback address and region descriptor")
    if descriptor[:_NONCE_BYTES] != peer_address:
        raise TransportError("address and region descriptor are of different transports")
    address, num_bytes = np.frombuffer(descriptor[_NONCE_BYTES:], dtype="<u8").tolist()
    return _Peer(peer_address, address, num_bytes)
