"""Moving bytes over TCP: to peers that neither shared memory nor RDMA reaches.

The work is done by ``native.TcpEngine``: a connection and a thread each way to a peer. Pieces are
gathered from and scattered into the staging memories by the kernel; to another host large ones
leave this process without a copy. A connection is taken only from peers that know this transport's
token, which its region descriptors carry; what is sent is neither signed nor encrypted.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from vllm_dualpath import native
from vllm_dualpath.errors import TransportError
from vllm_dualpath.transport.base import Event, PutArray, Region, Transport
from vllm_dualpath.transport.frames import event_of, pack, translated, unpack

_MAX_PUT_BYTES = 1 << 30
_TOKEN_BYTES = 16


class _Address(msgspec.Struct, frozen=True, array_like=True, tag="tcp-address-2"):
    """TCP address."""

    nonce: bytes
    host: str
    port: int
    kernel: str
    """Of the host: its boot id."""


class _Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="tcp-region-1"):
    """TCP region descriptor."""

    nonce: bytes
    token: bytes
    address: int
    num_bytes: int


class TcpTransport(Transport):
    """One listener, and a connection to each peer.

    Args:
        listen_host: numeric IP address to accept peers on.
        listen_port: 0 picks a free one.
        advertise_host: numeric IP address peers connect to, where ``listen_host`` is a wildcard.
        first_id: peer and put ids count from here.
        traffic_class: of IP, for what is sent: DSCP in its upper six bits.

    Raises ``TransportError`` when it cannot listen there.
    """

    def __init__(
        self,
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        *,
        advertise_host: str | None = None,
        first_id: int = 1,
        traffic_class: int | None = None,
    ) -> None:
        self._host = advertise_host or listen_host
        self._nonce = secrets.token_bytes(_TOKEN_BYTES)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        with translated():
            if ipaddress.ip_address(self._host).is_unspecified:
                raise ValueError(f"peers cannot connect to {self._host}; set advertise_host")
            self._engine = native.TcpEngine(
                listen_host,
                listen_port,
                self._token,
                _MAX_PUT_BYTES,
                first_id,
                -1 if traffic_class is None else traffic_class,
            )
            self._port = self._engine.listen_port
        self._closed = False

    @property
    def name(self) -> str:
        return f"tcp ({self._host}:{self._port})"

    @property
    def address(self) -> bytes:
        return pack(_Address(self._nonce, self._host, self._port, _kernel()))

    def register(self, address: int, num_bytes: int, *, fd: int | None = None) -> Region:
        self._check_open()
        with translated():
            self._engine.register_region(address, num_bytes, -1 if fd is None else fd)
        descriptor = _Descriptor(self._nonce, self._token, address, num_bytes)
        return Region(address, num_bytes, pack(descriptor))

    def connect(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> int:
        del same_host  # one way for all
        self._check_open()
        peer = unpack(peer_address, _Address)
        region = unpack(region_descriptor, _Descriptor)
        if peer.nonce != region.nonce:
            raise TransportError("address and region descriptor are of different transports")
        with translated():
            return self._engine.connect(
                peer.host,
                peer.port,
                region.token,
                region.address,
                region.num_bytes,
                # Within one kernel the peer's socket would hold our own pages, not copies.
                by_reference=peer.kernel != _kernel(),
            )

    def put(self, peer_id: int, pieces: PutArray, notice: bytes) -> int:
        with translated():
            return self._engine.put(peer_id, np.ascontiguousarray(pieces, np.uint64), notice)

    def disconnect(self, peer_id: int) -> None:
        self._engine.disconnect(peer_id)

    def fileno(self) -> int:
        return self._engine.fileno()

    def poll(self) -> Sequence[Event]:
        return [event_of(*fields) for fields in self._engine.poll()]

    def close(self) -> None:
        self._closed = True
        self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")


def _kernel() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
