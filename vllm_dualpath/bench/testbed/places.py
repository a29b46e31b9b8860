"""Where the parts of a cluster run in a testbed: which namespace, address, NIC and mount."""

from __future__ import annotations

from pathlib import Path

from vllm_dualpath.bench.cluster import ROUTER
from vllm_dualpath.bench.place import Place
from vllm_dualpath.bench.testbed.commands import in_namespace
from vllm_dualpath.bench.testbed.layout import Node, TestbedSpec, directory, mount_point

_KEYS = "keys"
_BIND = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


def store_path(testbed: str) -> Path:
    """Where every node sees its own mount: the same path on all of them, as in a real cluster."""
    return directory(testbed) / "store"


def keys_path(testbed: str) -> Path:
    """The CURVE keys of control, which is not on loopback here."""
    return directory(testbed) / _KEYS


def node_prefix(node: Node) -> tuple[str, ...]:
    """What a command begins with to run on an engine's node, with that node's mount."""
    mount = mount_point(node.testbed, node.name)
    return (
        *in_namespace(node.namespace),
        *("unshare", "--mount", "--propagation", "slave", "sh", "-c", _BIND, "sh"),
        *(str(mount), str(store_path(node.testbed))),
    )


def places(spec: TestbedSpec) -> dict[str, Place]:
    """The router's and every engine's place.

    HTTP and control use the management network. Staging memory is pushed by our own TCP over the
    compute NIC: processes of one machine could reach each other's memory, past every NIC.
    """
    head = spec.head
    found = {ROUTER: Place(head.address("mgmt"), tuple(in_namespace(head.namespace)))}
    for node in spec.engine_nodes():
        found[node.name] = Place(
            node.address("mgmt"),
            node_prefix(node),
            {
                "listen": node.address("compute"),
                "transport": "tcp",
                "keys": str(keys_path(spec.name)),
                "insecure": True,  # of the data path, which has no authentication yet
                "runtime_dir": str(directory(spec.name) / "runtime"),
            },
        )
    return found


def store_uri(spec: TestbedSpec) -> str:
    """The store, as every engine names it."""
    return f"file://{store_path(spec.name)}"


def router_args(spec: TestbedSpec) -> tuple[str, ...]:
    """What a router needs off loopback."""
    return ("--keys", str(keys_path(spec.name)))
