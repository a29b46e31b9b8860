"""Moving bytes between staging memories, behind one protocol (``base``).

``ucx`` is the one for use, ``loopback`` the one for tests inside a process. Knows nothing of
blocks, slots or requests.
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


def make_transport(kind: str, listen_host: str = "127.0.0.1", listen_port: int = 0) -> Transport:
    """Start a transport. Raises ``ConfigError`` for an unknown kind.

    ``ucx`` also raises ``NativeUnavailable`` without a usable UCX and ``TransportError`` when it
    cannot listen there.
    """
    if kind == "ucx":
        # Only here: the loopback works without the compiled core.
        from vllm_dualpath.transport.ucx import UcxTransport

        return UcxTransport(listen_host, listen_port)
    if kind == "loopback":
        from vllm_dualpath.transport.loopback import LoopbackTransport

        return LoopbackTransport()
    raise ConfigError(f"transport: expected 'ucx' or 'loopback', found {kind!r}")
