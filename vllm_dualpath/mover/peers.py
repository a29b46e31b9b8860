"""Connections to other movers: puts with an outcome each, notices, proof that a peer is dead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import numpy as np

from vllm_dualpath.control.host import process_alive
from vllm_dualpath.errors import ProtocolError, TransportError
from vllm_dualpath.messages import Notice, Peer, decode_notice, encode
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.transport.base import (
    Event,
    NoticeReceived,
    PeerClosed,
    PutArray,
    PutDone,
    Transport,
)

logger = logging.getLogger(__name__)

_NOTIFY_RETRY_S = 1.0
_NOTIFY_RETRY_MAX_S = 30.0

_NO_PIECES: PutArray = np.empty((0, 3), dtype=np.uint64)


class PutOutcome(Enum):
    """How a put ended; only ``DONE`` says that the bytes are there."""

    DONE = "done"
    REFUSED = "refused"
    """Nothing was sent."""
    AMBIGUOUS = "ambiguous"
    """Any part may have arrived, or may yet arrive, behind what a new connection delivers."""


PutCallback = Callable[[PutOutcome], None]


def _outcome(event: PutDone) -> PutOutcome:
    if event.ok:
        return PutOutcome.DONE
    return PutOutcome.REFUSED if event.untouched else PutOutcome.AMBIGUOUS


@dataclass(slots=True)
class _Connection:
    peer: Peer
    peer_id: int
    open_puts: dict[int, PutCallback] = field(default_factory=dict)
    """By put id: what to call."""
    progress_s: float = 0.0
    """When a put last ended, or the first of those open was submitted."""


class PeerDirectory:
    """Made lazily by boot id: a restarted peer is another peer. Owned by the loop's thread."""

    def __init__(
        self,
        transport: Transport,
        loop: EventLoop,
        own_host_id: str,
        counters: Counters,
        on_notice: Callable[[Notice], None],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._own_host_id = own_host_id
        self._counters = counters
        self._on_notice = on_notice
        self._current: dict[bytes, _Connection] = {}
        """By boot id: endpoints that take new puts."""
        self._by_peer_id: dict[int, _Connection] = {}
        """These and the closing ones, until ``PeerClosed``: late outcomes find their callbacks."""
        loop.watch(transport, self._poll)

    def put(self, peer: Peer, pieces: PutArray, notice: Notice, done: PutCallback) -> None:
        """Write ``pieces`` into the peer's staging memory, then deliver ``notice``.

        ``done(outcome)`` runs exactly once, later, on the loop.
        """
        try:
            connection = self._connect(peer)
            put_id = self._transport.put(connection.peer_id, pieces, encode(notice))
        except TransportError as exc:
            logger.warning("push to %s failed: %s", peer.engine_id, exc)
            self._loop.call_later(0.0, partial(done, PutOutcome.REFUSED))
            return
        if not connection.open_puts:
            connection.progress_s = self._loop.now_s()
        connection.open_puts[put_id] = done

    def notify(self, peer: Peer, notice: Notice, retry_s: float = _NOTIFY_RETRY_S) -> None:
        """Deliver a notice after everything put to the peer before; repeat until it is or it died.

        The notices sent this way free memory at the peer: losing one would leak its slots.
        """
        if self.proven_dead(peer):
            return

        def retry(outcome: PutOutcome) -> None:
            if outcome is not PutOutcome.DONE:
                next_s = min(2 * retry_s, _NOTIFY_RETRY_MAX_S)
                self._loop.call_later(retry_s, partial(self.notify, peer, notice, next_s))

        self.put(peer, _NO_PIECES, notice, retry)

    def proven_dead(self, peer: Peer) -> bool:
        """Whether the peer's process is gone for certain. Between hosts this cannot be told."""
        return peer.host_id == self._own_host_id and not process_alive(peer.pid, peer.pid_start)

    def forget(self, boot_id: bytes) -> None:
        """Close the endpoint to a peer proven dead; its open puts end as failed."""
        connection = self._current.pop(boot_id, None)
        if connection is not None:
            self._transport.disconnect(connection.peer_id)

    def left(self, boot_id: bytes) -> None:
        """A peer left the cluster: close its endpoint unless it may live and a put is under way."""
        connection = self._current.get(boot_id)
        if connection is not None and (
            not connection.open_puts or self.proven_dead(connection.peer)
        ):
            self.forget(boot_id)

    def stalled(self, now_s: float, deadline_s: float) -> set[bytes]:
        """Boot ids of peers to which puts are open and none has ended for ``deadline_s``.

        Their endpoints stay: what was put through a closed one may still arrive, later than a
        ``WriterStopped`` sent through the next.
        """
        return {
            boot_id
            for boot_id, connection in self._current.items()
            if connection.open_puts and now_s - connection.progress_s > deadline_s
        }

    @property
    def num_open_puts(self) -> int:
        return sum(len(connection.open_puts) for connection in self._by_peer_id.values())

    def close(self) -> None:
        self._loop.unwatch(self._transport)
        self._transport.close()

    def _connect(self, peer: Peer) -> _Connection:
        connection = self._current.get(peer.boot_id)
        if connection is None:
            peer_id = self._transport.connect(
                peer.address, peer.region, same_host=peer.host_id == self._own_host_id
            )
            connection = self._current[peer.boot_id] = _Connection(peer, peer_id)
            self._by_peer_id[peer_id] = connection
        return connection

    def _poll(self) -> None:
        for event in self._transport.poll():
            self._loop.guard(partial(self._handle, event))

    def _handle(self, event: Event) -> None:
        if isinstance(event, PutDone):
            self._put_done(event)
        elif isinstance(event, NoticeReceived):
            self._notice(event)
        else:
            self._peer_closed(event)

    def _put_done(self, event: PutDone) -> None:
        for connection in self._by_peer_id.values():
            found = connection.open_puts.pop(event.put_id, None)
            if found is not None:
                if not event.ok:
                    logger.warning("push failed: %s", event.error)
                connection.progress_s = self._loop.now_s()
                found(_outcome(event))
                return

    def _notice(self, event: NoticeReceived) -> None:
        try:
            notice = decode_notice(event.payload)
        except ProtocolError as exc:
            self._counters.rejected_messages += 1
            logger.warning("notice rejected: %s", exc)
            return
        self._on_notice(notice)

    def _peer_closed(self, event: PeerClosed) -> None:
        connection = self._by_peer_id.pop(event.peer_id, None)
        if connection is None:
            return
        for boot_id in [key for key, value in self._current.items() if value is connection]:
            logger.warning("connection to peer %s ended: %s", boot_id.hex()[:12], event.error)
            del self._current[boot_id]
        open_puts, connection.open_puts = connection.open_puts, {}
        for callback in open_puts.values():
            callback(PutOutcome.AMBIGUOUS)
