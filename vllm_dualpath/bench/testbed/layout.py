"""What a testbed consists of and what everything in it is called. Pure: makes nothing.

Three networks, each a bridge in the *switch* namespace: ``storage`` between nodes and storage
server, ``compute`` between the nodes, ``mgmt`` for HTTP and control, as the front-end network of a
real cluster. A node has a NIC in each; only storage and compute NICs are shaped. Every name and
address follows from the testbed's name, so that ``down`` works without the state file.

Addresses are from 198.18.0.0/15, kept for benchmarks of networks (RFC 2544); none of them is ever
in the host's own namespace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vllm_dualpath.errors import ConfigError

Network = Literal["storage", "compute", "mgmt"]
NETWORKS: tuple[Network, ...] = get_args(Network)

STATE_ROOT = Path("/var/tmp/vllm-dualpath-testbeds")
"""On a disk: GlusterFS wants a brick whose file system has extended attributes."""
NETNS_ROOT = Path("/run/netns")

MAX_NODES = 60
VOLUME = "kv"

_PREFIX = "dualpath"
_SUBNETS: dict[Network, str] = {"storage": "198.18.1", "compute": "198.18.2", "mgmt": "198.18.3"}
_FIRST_NODE_ADDRESS = 10
_NAME = re.compile(r"[a-z0-9]{1,24}")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_LEAST_RATE, _MOST_RATE = 10**6, 10**12
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def parse_rate(text: str, flag: str) -> int | None:
    """Bits a second of ``400mbit``, ``2.5gbit``; ``None`` of ``unlimited``.

    Raises ``ConfigError``.
    """
    if text == "unlimited":
        return None
    match = _RATE.fullmatch(text)
    rate = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if not _LEAST_RATE <= rate <= _MOST_RATE:
        raise ConfigError(
            f"{flag}: expected a rate of 1mbit to 1000gbit such as 400mbit, or unlimited;"
            f" found {text!r}"
        )
    return rate


def rate_text(rate: int | None) -> str:
    """A rate as people write it."""
    if rate is None:
        return "unlimited"
    unit, factor = ("gbit", 10**9) if rate >= 10**9 else ("mbit", 10**6)
    return f"{rate / factor:g}{unit}"


@dataclass(frozen=True, slots=True)
class Node:
    """One namespace with NICs: an engine's node, the storage server or the head.

    The *head* is where router and client are.
    """

    testbed: str
    name: str
    short: str
    """Two to three letters: what its ports at the switch begin with."""
    address_idx: int
    networks: tuple[Network, ...]

    @property
    def namespace(self) -> str:
        return f"{_PREFIX}-{self.testbed}-{self.name}"

    def address(self, network: Network) -> str:
        """Its address in one of its networks."""
        return f"{_SUBNETS[network]}.{self.address_idx}"

    def port(self, network: Network) -> str:
        """The switch's end of its NIC; the node's end is called like the network."""
        return f"{self.short}-{network}"


@dataclass(frozen=True, slots=True)
class TestbedSpec:
    """What to build. Raises ``ConfigError`` for what cannot be."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    name: str = "testbed"
    num_prefill: int = 1
    num_decode: int = 1
    storage_rate: int | None = None
    """Bits a second in either direction; ``None``: as fast as it goes."""
    compute_rate: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        counts = (self.num_prefill, self.num_decode)
        if min(counts) < 1 or sum(counts) > MAX_NODES:
            raise ConfigError(
                f"testbed: expected at least one prefill and one decode node and at most"
                f" {MAX_NODES} together, found {counts[0]} and {counts[1]}"
            )

    def engine_nodes(self) -> list[Node]:
        """The nodes with engines, named as ``bench.cluster`` names these."""
        names = [("prefill", idx) for idx in range(self.num_prefill)]
        names += [("decode", idx) for idx in range(self.num_decode)]
        return [
            Node(
                self.name,
                f"{role}-{idx}",
                f"{role[0]}{idx}",
                _FIRST_NODE_ADDRESS + position,
                NETWORKS,
            )
            for position, (role, idx) in enumerate(names)
        ]

    @property
    def storage(self) -> Node:
        return Node(self.name, "storage", "st", 1, ("storage",))

    @property
    def head(self) -> Node:
        return Node(self.name, "head", "hd", 2, ("mgmt",))

    def nodes(self) -> list[Node]:
        """All of them."""
        return [self.storage, self.head, *self.engine_nodes()]

    def rate(self, network: Network) -> int | None:
        """What the engine nodes' NICs in a network are shaped to."""
        return {"storage": self.storage_rate, "compute": self.compute_rate}.get(network)


def check_name(name: str) -> None:
    """Raise ``ConfigError`` for a testbed's name that cannot be part of a namespace's."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"testbed: expected a name of 1-24 of a-z and 0-9, found {name!r}")


def switch_namespace(testbed: str) -> str:
    """The namespace of the bridges."""
    return f"{_PREFIX}-{testbed}-switch"


def namespace_prefix(testbed: str) -> str:
    """What the name of each namespace of a testbed begins with."""
    return f"{_PREFIX}-{testbed}-"


def directory(testbed: str) -> Path:
    """Where everything of a testbed lies: state, brick, mounts, logs."""
    return STATE_ROOT / testbed


def mount_point(testbed: str, node: str) -> Path:
    """Where a node's mount of the volume is."""
    return directory(testbed) / "mnt" / node
