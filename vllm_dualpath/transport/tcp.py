"""Moving bytes over TCP: to peers that neither shared memory nor RDMA reaches.

The work is done by ``native.TcpEngine``: a connection and a thread each way to a peer. Pieces are
gathered from and scattered into the staging memories by the kernel; to another host large ones
leave this process without a copy. A connection is taken only from peers that know this transport's
token, which its region descriptors carry; what is sent is neither signed nor encrypted.
"""

from __future__ import annotations

import secrets

import msgspec

from vllm_dualpath import native
from vllm_dualpath.errors import TransportError
from vllm_dualpath.transport.base import Region
from vllm_dualpath.transport.engine import EngineTransport, check_advertised, kernel_id
from vllm_dualpath.transport.frames import pack, translated, unpack

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


class TcpTransport(EngineTransport):
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
        super().__init__()
        self._host = advertise_host or listen_host
        self._nonce = secrets.token_bytes(_TOKEN_BYTES)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        with translated():
            check_advertised(self._host)
            self._engine: native.TcpEngine = native.TcpEngine(
                listen_host,
                listen_port,
                self._token,
                _MAX_PUT_BYTES,
                first_id,
                -1 if traffic_class is None else traffic_class,
            )
            self._port = self._engine.listen_port

    @property
    def name(self) -> str:
        return f"tcp ({self._host}:{self._port})"

    @property
    def address(self) -> bytes:
        return pack(_Address(self._nonce, self._host, self._port, kernel_id()))

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
                by_reference=peer.kernel != kernel_id(),
            )
