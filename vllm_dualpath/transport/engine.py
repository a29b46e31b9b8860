"""What the transports over a native engine have in common."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_dualpath import native
from vllm_dualpath.errors import TransportError
from vllm_dualpath.transport.base import Event, PutArray, Transport
from vllm_dualpath.transport.frames import event_of, translated


class EngineTransport(Transport):
    """Puts, events and the end, by ``_engine``; subclasses make it, register and connect."""

    _engine: native.UcxEngine | native.TcpEngine

    def __init__(self) -> None:
        self._closed = False

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


def check_advertised(host: str) -> None:
    """Raise ``ValueError`` unless ``host`` is a numeric address that peers can connect to."""
    if ipaddress.ip_address(host).is_unspecified:
        raise ValueError(f"peers cannot connect to {host}; set advertise_host")


def kernel_id() -> str:
    """Equal for two processes only if they run on one kernel, since one boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
