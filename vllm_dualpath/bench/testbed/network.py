"""Namespaces, bridges and shaped NICs of a testbed, made with ``ip`` and ``tc``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_dualpath.bench.testbed.commands import run
from vllm_dualpath.bench.testbed.layout import (
    NETNS_ROOT,
    NETWORKS,
    Network,
    Node,
    TestbedSpec,
    namespace_prefix,
    switch_namespace,
)

_MTU = 9000
"""As on storage and compute networks. ``tc`` counts the headers of each packet, the NIC's counters
one for a whole segmented send: with packets this large the two agree to within a per cent."""

_BURST_S = 0.004
_MIN_BURST_BYTES = 1 << 17
"""The kernel hands over up to 64 KiB at a time, which must fit or is cut up."""
_QUEUE_S = 0.04
_MIN_QUEUE_BYTES = 1 << 20

_SHAPED: tuple[Network, ...] = ("storage", "compute")


def build(spec: TestbedSpec) -> None:
    """Make all namespaces, links and addresses, and shape. Raises ``LaunchError``."""
    switch = switch_namespace(spec.name)
    run("ip", "netns", "add", switch)
    for network in NETWORKS:
        run("ip", "-n", switch, "link", "add", network, "mtu", str(_MTU), "type", "bridge")
        run("ip", "-n", switch, "link", "set", network, "up")
    for node in spec.nodes():
        run("ip", "netns", "add", node.namespace)
        run("ip", "-n", node.namespace, "link", "set", "lo", "up")
        for network in node.networks:
            _connect(node, network, switch)
    shape(spec)


def _connect(node: Node, network: Network, switch: str) -> None:
    port, namespace = node.port(network), node.namespace
    run(
        *("ip", "link", "add", port, "mtu", str(_MTU), "netns", switch, "type", "veth"),
        *("peer", "name", network, "mtu", str(_MTU), "netns", namespace),
    )
    run("ip", "-n", switch, "link", "set", port, "master", network, "up")
    run("ip", "-n", namespace, "link", "set", network, "up")
    run("ip", "-n", namespace, "addr", "add", f"{node.address(network)}/24", "dev", network)


def shape(spec: TestbedSpec) -> None:
    """Shape the NICs of all engine nodes, each direction at the end that sends.

    May be called again with other rates while bytes flow. Raises ``LaunchError``.
    """
    switch = switch_namespace(spec.name)
    for node in spec.engine_nodes():
        for network in _SHAPED:
            _shape_end(switch, node.port(network), spec.rate(network))
            _shape_end(node.namespace, network, spec.rate(network))


def _shape_end(namespace: str, device: str, rate: int | None) -> None:
    if rate is None:
        # Nothing to delete is no error: the NIC is not shaped, as asked.
        run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
        return
    burst = max(_MIN_BURST_BYTES, int(rate / 8 * _BURST_S))
    queue = max(_MIN_QUEUE_BYTES, int(rate / 8 * _QUEUE_S))
    run(
        *("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"),
        *("rate", f"{rate}bit", "burst", f"{burst}b", "limit", f"{queue}b"),
    )


def namespaces(testbed: str) -> list[str]:
    """The testbed's namespaces that exist now."""
    prefix = namespace_prefix(testbed)
    if not NETNS_ROOT.is_dir():
        return []
    return sorted(path.name for path in NETNS_ROOT.iterdir() if path.name.startswith(prefix))


def processes_in(namespace: str) -> list[int]:
    """Ids of the processes that run in a namespace: proof enough that they are the testbed's."""
    wanted = (NETNS_ROOT / namespace).stat()

    def runs_there(process: Path) -> bool:
        own = (process / "ns" / "net").stat()
        return (own.st_dev, own.st_ino) == (wanted.st_dev, wanted.st_ino)

    return processes(runs_there)


def processes(wanted: Callable[[Path], bool]) -> list[int]:
    """Ids of the processes whose directory in ``/proc`` is ``wanted``; not those that end while it
    looks.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found += [int(entry.name)] if wanted(entry) else []
    return sorted(found)


def delete(testbed: str) -> None:
    """Delete the namespaces and with them links, bridges and shaping. May be repeated."""
    for namespace in namespaces(testbed):
        run("ip", "netns", "delete", namespace)
