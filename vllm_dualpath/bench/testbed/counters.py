"""The kernel's byte counters of every NIC of a testbed, read at the switch.

One end of each NIC's link is a port of the switch, and all ports are in one namespace: one file has
all counters. What a port sends its node receives.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import NamedTuple

from vllm_dualpath.bench.testbed.layout import Network, TestbedSpec, switch_namespace
from vllm_dualpath.bench.testbed.namespaces import inside

_MAX_BYTES = 1 << 20
_RX_BYTES, _TX_BYTES = 0, 8
"""Columns of /proc/net/dev after the name."""


class NicBytes(NamedTuple):
    """Since the NIC was made, as seen from the node."""

    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class Nic:
    """Whose NIC in which network."""

    node: str
    network: Network


class NicCounters:
    """Reads all counters of a testbed at once. Thread-safe; to be closed."""

    def __init__(self, spec: TestbedSpec) -> None:
        self._ports = {
            node.port(network): Nic(node.name, network)
            for node in spec.nodes()
            for network in node.networks
        }
        self._lock = threading.Lock()
        # An open file stays that of the namespace in which it was opened.
        self._fd = inside(
            switch_namespace(spec.name),
            lambda: os.open("/proc/thread-self/net/dev", os.O_RDONLY),
        )

    def read(self) -> dict[Nic, NicBytes]:
        """Every NIC's counters now."""
        with self._lock:
            text = os.pread(self._fd, _MAX_BYTES, 0).decode("ascii")
        found = {}
        for line in text.splitlines():
            name, separator, columns = line.partition(":")
            nic = self._ports.get(name.strip()) if separator else None
            if nic is not None:
                values = columns.split()
                found[nic] = NicBytes(int(values[_TX_BYTES]), int(values[_RX_BYTES]))
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
