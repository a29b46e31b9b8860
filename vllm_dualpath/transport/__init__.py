"""Moving bytes between staging memories, behind one protocol (``base``).

``auto`` is the one for use: it takes ``ucx`` or ``tcp``, whichever is better to a peer.
``loopback`` is the one for tests inside a process. Knows nothing of blocks, slots or requests.
"""

from __future__ import annotations

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.transport.base import (
    Event,
    NoticeReceived,
    PeerClosed,
    PutArray,
    PutDone,
    Region,
    Transport,
)

__all__ = [
    "Event",
    "NoticeReceived",
    "PeerClosed",
    "PutArray",
    "PutDone",
    "Region",
    "Transport",
    "make_transport",
]


def make_transport(
    kind: str,
    listen_host: str = "127.0.0.1",
    *,
    require_rdma: bool = False,
    service_level: int | None = None,
    traffic_class: int | None = None,
) -> Transport:
    """Start a transport. Raises ``ConfigError`` for an unknown kind. The options are ``auto``'s.

    ``auto`` and ``ucx`` also raise ``NativeUnavailable`` without a usable UCX, ``auto`` a
    ``ConfigError`` without the RDMA device that ``require_rdma`` asks for, and all but the loopback
    ``TransportError`` when they cannot listen there.
    """
    # Imported here: the loopback works without the compiled core.
    if kind == "auto":
        from vllm_dualpath.transport.auto import AutoTransport

        return AutoTransport(
            listen_host,
            require_rdma=require_rdma,
            service_level=service_level,
            traffic_class=traffic_class,
        )
    if kind == "ucx":
        from vllm_dualpath.transport.ucx import UcxTransport

        return UcxTransport(listen_host)
    if kind == "tcp":
        from vllm_dualpath.transport.tcp import TcpTransport

        return TcpTransport(listen_host)
    if kind == "loopback":
        from vllm_dualpath.transport.loopback import LoopbackTransport

        return LoopbackTransport()
    raise ConfigError(f"transport: expected auto, ucx, tcp or loopback, found {kind!r}")
