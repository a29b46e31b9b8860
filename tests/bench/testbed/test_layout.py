"""What a testbed's parts are called, and what is refused before anything is made."""

from __future__ import annotations

import pytest

from vllm_dualpath.bench.testbed import commands
from vllm_dualpath.bench.testbed.layout import TestbedSpec, parse_rate, rate_text
from vllm_dualpath.bench.testbed.places import node_prefix, places, store_uri
from vllm_dualpath.config import parse_engine_config
from vllm_dualpath.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "rate"),
    [("400mbit", 400_000_000), ("2.5gbit", 2_500_000_000), ("8000kbit", 8_000_000)],
)
def test_rates_are_read_as_tc_writes_them(text: str, rate: int) -> None:
    """Decimal units, and what is written again is read as the same."""
    assert parse_rate(text, "--storage-nic") == rate
    assert parse_rate(rate_text(rate), "--storage-nic") == rate


def test_unlimited_is_no_rate() -> None:
    """A NIC that is not shaped has no rate."""
    assert parse_rate("unlimited", "--storage-nic") is None
    assert rate_text(None) == "unlimited"


@pytest.mark.parametrize("text", ["", "400", "400 mbit", "-1mbit", "1kbit", "fast"])
def test_other_rates_are_refused_with_the_flag(text: str) -> None:
    """The message names the flag and what was found."""
    with pytest.raises(ConfigError, match="--storage-nic: expected a rate"):
        parse_rate(text, "--storage-nic")


def test_names_ports_and_addresses_are_distinct() -> None:
    """No two nodes share a namespace, a port of the switch or an address; ports fit the kernel."""
    nodes = TestbedSpec("t", 30, 30).nodes()
    ports = [node.port(network) for node in nodes for network in node.networks]
    addresses = [node.address(network) for node in nodes for network in node.networks]
    assert len({node.namespace for node in nodes}) == len(nodes)
    assert len(set(ports)) == len(ports)
    assert len(set(addresses)) == len(addresses)
    assert max(map(len, ports)) <= 15


def test_a_testbed_without_decode_nodes_is_refused() -> None:
    """Both roles are needed."""
    with pytest.raises(ConfigError, match="at least one prefill and one decode node"):
        TestbedSpec("t", 1, 0)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "UP", "a" * 25])
def test_names_that_could_leave_the_directory_are_refused(name: str) -> None:
    """A name becomes part of paths that ``down`` removes."""
    with pytest.raises(ConfigError, match="expected a name"):
        TestbedSpec(name)


def test_engines_push_over_the_compute_nic_by_tcp_only() -> None:
    """Each engine's configuration is accepted, listens on its compute NIC, shares no memory."""
    spec = TestbedSpec("t", 1, 2)
    found = places(spec)
    for node in spec.engine_nodes():
        place = found[node.name]
        config = parse_engine_config(
            {
                "role": "prefill",
                "store": store_uri(spec),
                "router": f"tcp://{found['router'].host}:1",
                **place.extra_config,
            }
        )
        assert config.transport == "tcp"
        assert config.listen == node.address("compute")
        assert place.host == node.address("mgmt")
        assert place.prefix == node_prefix(node)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root and packages the refusal names them and how to get them."""
    monkeypatch.setattr(commands.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"root .*iproute2.*apt-get install"):
        commands.check_requirements()
