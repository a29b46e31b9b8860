"""The contract of a transport: moving bytes between the staging memories of two movers.

A transport owns an endpoint to each peer and knows nothing of blocks, slots or requests. Transfers
are one-sided: the initiator names local and remote addresses, the target's program takes no part.

Rules every implementation keeps (``tests/transport/contract.py``):

* ``put`` returns at once. Its outcome arrives as exactly one ``PutDone``.
* A notice is delivered to the target only after every byte of its batch, and of every batch
  submitted earlier to the same peer, is visible in the target's memory.
* Until its ``PutDone`` arrives, the local memory of a batch must not change.
* ``PutDone(ok=False)`` proves nothing about which bytes arrived, unless it is ``untouched``.
* Events are read with ``poll`` by one thread. ``fileno`` becomes readable when there are some;
  nothing spins, and an idle transport uses no CPU.
* All methods may be called from one owner thread only, ``close`` included; no callback enters
  Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

PutArray = npt.NDArray[np.uint64]
"""Shape ``(num_pieces, 3)``: local address, remote address, bytes."""


@dataclass(frozen=True, slots=True)
class Region:
    """Local memory that peers may write to and puts may read from."""

    address: int
    num_bytes: int
    descriptor: bytes
    """Opaque: base address, length and remote key, for a peer's ``connect``."""


@dataclass(frozen=True, slots=True)
class PutDone:
    """A batch left this side: with ``ok`` its bytes are in the target's memory."""

    put_id: int
    ok: bool
    error: str
    untouched: bool = False
    """Not ``ok``, and no byte was sent nor will be: there is nothing to wait for."""


@dataclass(frozen=True, slots=True)
class NoticeReceived:
    """A peer's notice. It is data from outside: decode and check it."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The endpoint to ``peer_id`` failed or was closed by the other side; its puts have ended."""

    peer_id: int
    error: str


Event = PutDone | NoticeReceived | PeerClosed


class Transport(Protocol):
    """See the module's docstring for the rules."""

    @property
    def name(self) -> str:
        """For logs and ``doctor``: e.g. ``ucx 1.22 (tcp,cma)``."""

    @property
    def address(self) -> bytes:
        """What a peer passes to ``connect``. Opaque; changes with every instance."""

    def register(self, address: int, num_bytes: int, *, fd: int | None = None) -> Region:
        """Make ``[address, address + num_bytes)`` usable in puts of both directions.

        ``fd``: the shared file whose start is mapped there, open until ``close``. Peers on this
        host may then map it too.
        """

    def connect(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> int:
        """Return a peer id at once; wire-up happens behind.

        Raises ``TransportError`` on bad input.
        """

    def put(self, peer_id: int, pieces: PutArray, notice: bytes) -> int:
        """Write all pieces into the peer's region, then deliver ``notice``. Returns a put id.

        ``notice`` is at most 4096 bytes; empty means none. Raises ``PeerLost`` for a peer id that
        is closed and ``TransportError`` for a piece outside the registered or the remote region.
        """

    def disconnect(self, peer_id: int) -> None:
        """Close the endpoint.

        Outstanding puts still end in a ``PutDone`` each, then ``PeerClosed`` follows.
        """

    def fileno(self) -> int:
        """A descriptor that polls readable while events wait."""

    def poll(self) -> Sequence[Event]:
        """Return all events that wait, oldest first; never blocks."""

    def close(self) -> None:
        """End the progress thread and destroy every endpoint: late writes of peers are rejected."""
