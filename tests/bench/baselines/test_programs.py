"""What a baseline's processes are told. That they then run, only a testbed shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_dualpath.bench.baselines.environments import (
    BASELINES,
    REQUIREMENTS,
    BaselineName,
    Environment,
)
from vllm_dualpath.bench.baselines.programs import (
    BaselineSpec,
    Program,
    engine_programs,
    router_program,
    tier_programs,
)
from vllm_dualpath.bench.testbed.layout import TestbedSpec


def spec(name: BaselineName, scratch: Path) -> BaselineSpec:
    """One prefill and two decode nodes."""
    return BaselineSpec(
        Environment(name, Path("/envs")),
        TestbedSpec("t", 1, 2),
        Path("/model"),
        ("--max-model-len", "99"),
        {"VLLM_CPU_KVCACHE_SPACE": "3"},
        staging_bytes=3 << 29,
        pool_bytes=5 << 20,
        scratch=scratch,
    )


def transfer(program: Program) -> dict[str, object]:
    """The engine's ``--kv-transfer-config``."""
    command = program.command
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", BASELINES)
def test_every_engine_is_of_the_baseline_s_environment_and_bound_to_its_compute_nic(
    name: BaselineName, tmp_path: Path
) -> None:
    """Nothing of this environment leaks in, and nothing but TCP over that NIC is tried."""
    for program, node in zip(
        engine_programs(spec(name, tmp_path)),
        spec(name, tmp_path).testbed.engine_nodes(),
        strict=True,
    ):
        assert f"/envs/{name}/bin/python" in program.command
        assert program.command[-2:] == ("--max-model-len", "99")
        assert program.env["UCX_NET_DEVICES"] == "compute"
        assert program.env["UCX_TLS"] == "tcp"
        assert program.env["VLLM_HOST_IP"] == node.address("compute")
        assert program.env["VLLM_CPU_KVCACHE_SPACE"] == "3"
        assert "PYTHONPATH" not in program.env


@pytest.mark.parametrize(
    ("name", "tier"), [("nixl_lmcache", "LMCacheMP"), ("nixl_mooncake", "MooncakeStore")]
)
def test_prefill_engines_load_through_the_tier_and_decode_engines_get_kv_over_nixl(
    name: BaselineName, tier: str, tmp_path: Path
) -> None:
    """NIXL first: a MultiConnector loads from the first that has hits."""
    prefill, *decode = [transfer(program) for program in engine_programs(spec(name, tmp_path))]
    extra = prefill["kv_connector_extra_config"]
    assert isinstance(extra, dict)
    children = [child["kv_connector"] for child in extra["connectors"]]
    assert children == ["NixlConnector", f"{tier}Connector"]
    assert [config["kv_connector"] for config in decode] == ["NixlConnector"] * 2


def test_nixl_alone_has_no_tier(tmp_path: Path) -> None:
    """It recomputes what it has not."""
    alone = spec("nixl", tmp_path)
    assert tier_programs(alone) == []
    assert {transfer(program)["kv_connector"] for program in engine_programs(alone)} == {
        "NixlConnector"
    }


def test_the_router_knows_every_engine(tmp_path: Path) -> None:
    """By the addresses of the management network."""
    command = router_program(spec("nixl", tmp_path)).command
    urls = [word for word in command if word.startswith("http://")]
    assert [command[command.index(url) - 1] for url in urls] == [
        "--prefill",
        "--decode",
        "--decode",
    ]
    assert len(set(urls)) == 3


def test_memory_of_the_tiers(tmp_path: Path) -> None:
    """LMCache loads through as much as our movers do; Mooncake keeps what the plan gives it."""
    (server,) = tier_programs(spec("nixl_lmcache", tmp_path))
    assert server.command[server.command.index("--l1-size-gb") + 1] == "1.50"
    engine_programs(spec("nixl_mooncake", tmp_path))
    config = json.loads((tmp_path / "mooncake.json").read_text())
    assert config["global_segment_size"] == 5 << 20
    assert config["protocol"] == "tcp"


def test_an_environment_with_the_same_requirements_is_not_made_again(tmp_path: Path) -> None:
    """Minutes each time, otherwise."""
    environment = Environment("nixl", tmp_path)
    environment.path.mkdir()
    (environment.path / ".ready").write_text(str(REQUIREMENTS["nixl"]))
    said: list[str] = []
    environment.ensure(said.append)
    assert said == []
