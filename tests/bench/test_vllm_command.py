"""The command line and environment of a vLLM server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllm_dualpath.bench import vllm_command
from vllm_dualpath.bench.cluster import ClusterSpec, LocalCluster
from vllm_dualpath.errors import ConfigError

EXTRA = {"role": "prefill", "store": "file:///kv", "router": "tcp://127.0.0.1:9100"}


def test_the_connector_gets_its_configuration() -> None:
    """Both sides are kv_both and recompute on failure; our keys go in as they are."""
    transfer = vllm_command.kv_transfer_config(EXTRA)
    command = vllm_command.server_command("M", 8001, transfer, ["--dtype", "float32"], on_gpu=False)
    parsed = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert parsed["kv_connector"] == "DualPathConnector"
    assert (parsed["kv_role"], parsed["kv_load_failure_policy"]) == ("kv_both", "recompute")
    assert parsed["kv_connector_extra_config"] == EXTRA
    assert command[-2:] == ["--dtype", "float32"], "the caller's arguments come last and win"


def test_a_wrong_key_is_found_before_anything_starts() -> None:
    """The launcher parses what it passes on."""
    with pytest.raises(ConfigError, match="rolle"):
        vllm_command.kv_transfer_config({**EXTRA, "rolle": "prefill"})


def test_the_cpu_recipe_yields_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device the recipe applies, except where the caller says otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    env = vllm_command.server_env(str(tmp_path), None)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in vllm_command.server_env("org/name", None)


def test_engines_share_gpus_only_when_there_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine a device; with fewer devices each engine gets its part of the memory."""
    monkeypatch.setattr(vllm_command, "gpus", lambda: ["4", "6"])
    assert [vllm_command.device_for(idx, 2) for idx in range(2)] == [("4", []), ("6", [])]
    assert vllm_command.device_for(2, 3)[0] == "4"
    assert vllm_command.device_for(0, 3)[1] == ["--gpu-memory-utilization", "0.425"]
    monkeypatch.setattr(vllm_command, "gpus", list)
    assert vllm_command.device_for(0, 3) == (None, [])


def test_free_ports_are_distinct() -> None:
    """Ports handed out together never collide."""
    assert len(set(vllm_command.free_ports(20))) == 20


def test_a_cluster_names_its_engines_and_gives_each_a_port(tmp_path: Path) -> None:
    """2P1D: three servers, their roles in their configuration, one router address."""
    store = tmp_path / "store"
    store.mkdir()
    spec = ClusterSpec(
        "M", f"file://{store}", num_prefill=2, extra_config={"block_tokens": 128}, log_dir=tmp_path
    )
    cluster = LocalCluster(spec)
    assert [engine.name for engine in cluster.engines] == ["prefill-0", "prefill-1", "decode-0"]
    assert len({engine.url for engine in cluster.engines}) == 3
    command = cluster.engines[2].process.command
    extra = json.loads(command[command.index("--kv-transfer-config") + 1])[
        "kv_connector_extra_config"
    ]
    assert (extra["role"], extra["name"], extra["block_tokens"]) == ("decode", "decode-0", 128)
    assert extra["url"] == cluster.engines[2].url
    router = cluster.router.command
    assert router[:4] == (sys.executable, "-m", "vllm_dualpath.cli", "router")
    assert extra["router"] in router


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A store that is not mounted must not be made on the local disk."""
    with pytest.raises(ConfigError, match="mkdir"):
        LocalCluster(ClusterSpec("M", f"file://{tmp_path}/missing", log_dir=tmp_path))


def test_a_cluster_without_decode_engines_is_refused() -> None:
    """Both roles are needed."""
    with pytest.raises(ConfigError, match="found 1 and 0"):
        ClusterSpec("M", "file:///kv", num_decode=0)
