"""The best way to each peer: shared memory or RDMA through ``ucx``, else ``tcp``.

Both transports run side by side; a peer is one of the two for as long as it is connected. UCX's own
TCP is not used: ours moves the same pieces faster and with fewer copies (docs/performance.md).
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Sequence

import msgspec

from vllm_dualpath.errors import ConfigError, TransportError
from vllm_dualpath.transport.base import Event, PutArray, Region, Transport
from vllm_dualpath.transport.frames import pack, unpack
from vllm_dualpath.transport.tcp import TcpTransport
from vllm_dualpath.transport.ucx import UcxTransport

logger = logging.getLogger(__name__)

_FIRST_TCP_ID = 1 << 62
"""Peers and puts from here on are of ``tcp``."""

_INSTALL_RDMA = (
    "with an RDMA device, install a UCX that has its providers (OFED, HPC-X, or your"
    " distribution's libucx0), or point DUALPATH_UCX_LIBRARY at its libucp.so.0"
)


class _Pair(msgspec.Struct, frozen=True, array_like=True, tag="auto-1"):
    """Transport address or region descriptor."""

    ucx: bytes
    tcp: bytes


class AutoTransport(Transport):
    """See ``UcxTransport`` for the arguments and errors.

    ``service_level`` (InfiniBand) and ``traffic_class`` (RoCE and TCP) put what is sent in a lane
    of its own; UCX hears of them by its environment in this process. ``require_rdma`` raises
    ``ConfigError`` where UCX has no RDMA device, and refuses peers on other hosts that have none.
    """

    def __init__(
        self,
        listen_host: str = "127.0.0.1",
        *,
        advertise_host: str | None = None,
        require_rdma: bool = False,
        service_level: int | None = None,
        traffic_class: int | None = None,
    ) -> None:
        # UCX takes these from the environment alone where its InfiniBand module is not loaded yet.
        for name, value in (("SL", service_level), ("TRAFFIC_CLASS", traffic_class)):
            if value is not None:
                os.environ[f"UCX_IB_{name}"] = str(value)
        self._ucx = UcxTransport(listen_host, advertise_host=advertise_host)
        self._require_rdma = require_rdma
        report = self._ucx.report
        if require_rdma and not report.has_rdma:
            self._ucx.close()
            raise ConfigError(
                f"require_rdma: UCX {report.version} ({report.path}) offers"
                f" {', '.join(report.transports)}: no RDMA transport with a device;"
                f" {_INSTALL_RDMA}, or set require_rdma to false"
            )
        try:
            self._tcp = TcpTransport(
                listen_host,
                advertise_host=advertise_host,
                first_id=_FIRST_TCP_ID,
                traffic_class=traffic_class,
            )
        except TransportError:
            self._ucx.close()
            raise
        # Readable while either has events: one descriptor for the caller's loop.
        self._epoll = select.epoll()
        for transport in (self._ucx, self._tcp):
            self._epoll.register(transport.fileno(), select.EPOLLIN)
        self._closed = False
        if not report.has_rdma:
            logger.info("no RDMA device: bytes to other hosts will go by TCP")

    @property
    def name(self) -> str:
        return f"{self._ucx.name}, {self._tcp.name}"

    @property
    def address(self) -> bytes:
        return pack(_Pair(self._ucx.address, self._tcp.address))

    def register(self, address: int, num_bytes: int, *, fd: int | None = None) -> Region:
        ucx = self._ucx.register(address, num_bytes, fd=fd)
        tcp = self._tcp.register(address, num_bytes, fd=fd)
        return Region(address, num_bytes, pack(_Pair(ucx.descriptor, tcp.descriptor)))

    def connect(self, peer_address: bytes, region_descriptor: bytes, *, same_host: bool) -> int:
        peer = unpack(peer_address, _Pair)
        region = unpack(region_descriptor, _Pair)
        if self._ucx.suits(peer.ucx, region.ucx, same_host=same_host):
            return self._ucx.connect(peer.ucx, region.ucx, same_host=same_host)
        if self._require_rdma and not same_host:
            raise TransportError(f"require_rdma: the peer has no RDMA device; {_INSTALL_RDMA}")
        peer_id = self._tcp.connect(peer.tcp, region.tcp, same_host=same_host)
        self._warn_of_tcp(same_host)
        return peer_id

    def put(self, peer_id: int, pieces: PutArray, notice: bytes) -> int:
        return self._of(peer_id).put(peer_id, pieces, notice)

    def disconnect(self, peer_id: int) -> None:
        self._of(peer_id).disconnect(peer_id)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def poll(self) -> Sequence[Event]:
        return [*self._ucx.poll(), *self._tcp.poll()]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._ucx.close()
        self._tcp.close()

    def _of(self, peer_id: int) -> Transport:
        return self._tcp if peer_id >= _FIRST_TCP_ID else self._ucx

    def _warn_of_tcp(self, same_host: bool) -> None:
        if same_host:
            logger.warning(
                "no shared memory with a peer on this host (UCX_TLS, another PID namespace, or "
                "forbidden): bytes to it go by TCP; see `vllm-dualpath doctor`"
            )
        else:
            logger.warning(
                "no RDMA to a peer: bytes to it go by TCP, which is slower and costs CPU; %s",
                _INSTALL_RDMA,
            )
