"""The processes of a baseline on a testbed: commands and configuration. Starts nothing.

Prefill engines load and save through the tier beneath NIXL, decode engines get KV over NIXL alone,
as the tiers' documentation sets them up; vllm-router in front. Everything pushed crosses the
compute NICs (UCX and Mooncake over TCP, bound to them), all files the storage NICs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.baselines.environments import BaselineName, Environment
from vllm_dualpath.bench.testbed.commands import in_namespace
from vllm_dualpath.bench.testbed.layout import Node, TestbedSpec, mount_point
from vllm_dualpath.bench.testbed.places import node_prefix, store_path
from vllm_dualpath.bench.vllm_command import server_command, server_env

ENGINE_PORT = 8100
ROUTER_PORT = 8200
MASTER_HTTP_PORT = 8300
_MASTER_PORT = 8301
_LMCACHE_PORT = 8302
_LMCACHE_HTTP_PORT = 8303
_SIDE_CHANNEL_PORT = 8304

_MIB = 1 << 20
_FILES = "baselines"
_OWN_SYSFS = 'mount -t sysfs sysfs /sys && exec "$@"'
"""UCX lists network devices by /sys, which shows those of the namespace that mounted it."""


@dataclass(frozen=True, slots=True)
class Program:
    """One process: what it is called, its command, its environment."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    health_url: str
    """Answers 200 when it is ready."""


@dataclass(frozen=True, slots=True)
class BaselineSpec:
    """One baseline on one testbed."""

    environment: Environment
    testbed: TestbedSpec
    model: Path
    engine_args: tuple[str, ...]
    engine_env: Mapping[str, str]
    staging_bytes: int
    """What LMCache gets on each prefill node to load through: as much as our movers."""
    pool_bytes: int
    """What Mooncake gets on each prefill node to keep KV in."""
    scratch: Path
    """For configuration and logs, on this host."""

    @property
    def name(self) -> BaselineName:
        return self.environment.name

    @property
    def files(self) -> Path:
        """Where its file-system tier writes, as every node sees it."""
        return store_path(self.testbed.name) / _FILES / self.name

    @property
    def files_seen_here(self) -> Path:
        """The same through one node's mount, outside the nodes."""
        return mount_point(self.testbed.name, "prefill-0") / _FILES / self.name

    @property
    def router_url(self) -> str:
        return f"http://{self.testbed.head.address('mgmt')}:{ROUTER_PORT}"

    @property
    def master_url(self) -> str:
        """Of Mooncake's master, for its metrics."""
        return f"http://{self.testbed.head.address('mgmt')}:{MASTER_HTTP_PORT}"


def tier_programs(spec: BaselineSpec) -> list[Program]:
    """What has to run before the engines."""
    if spec.name == "nixl_lmcache":
        return [_lmcache_server(spec, node) for node in _nodes(spec, "prefill")]
    if spec.name == "nixl_mooncake":
        return [_mooncake_master(spec)]
    return []


def engine_programs(spec: BaselineSpec) -> list[Program]:
    """VLLM on every engine node."""
    return [_engine(spec, node) for node in spec.testbed.engine_nodes()]


def router_program(spec: BaselineSpec) -> Program:
    """vllm-router on the head, round robin: its default weighs prefixes, of which each engine's
    cache has none here.
    """
    host = spec.testbed.head.address("mgmt")
    command = [*in_namespace(spec.testbed.head.namespace), spec.environment.program("vllm-router")]
    command += ["--host", host, "--port", str(ROUTER_PORT), "--vllm-pd-disaggregation"]
    command += ["--kv-connector", "nixl", "--policy", "round_robin", "--prometheus-host", host]
    for role in ("prefill", "decode"):
        for node in _nodes(spec, role):
            command += [f"--{role}", _engine_url(node)]
    return Program("router", tuple(command), _clean_env(), f"{spec.router_url}/health")


def _engine(spec: BaselineSpec, node: Node) -> Program:
    host = node.address("mgmt")
    command = server_command(
        str(spec.model),
        ENGINE_PORT,
        _transfer_config(spec, node),
        spec.engine_args,
        on_gpu=False,
        host=host,
        python=spec.environment.program("python"),
    )
    env = {**_clean_env(server_env(str(spec.model), None)), **spec.engine_env}
    env |= {
        # The side channel and Mooncake's segments are found by these.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_SIDE_CHANNEL_PORT),
        "VLLM_HOST_IP": node.address("compute"),
        "UCX_TLS": "tcp",
        "UCX_NET_DEVICES": "compute",
        # Equal prompts have equal block hashes in every process and after every restart.
        "PYTHONHASHSEED": "0",
    }
    if spec.name == "nixl_mooncake":
        env["MOONCAKE_CONFIG_PATH"] = str(_write_mooncake_config(spec))
    prefix = (*node_prefix(node), "sh", "-c", _OWN_SYSFS, "sh")
    return Program(node.name, (*prefix, *command), env, f"{_engine_url(node)}/health")


def _transfer_config(spec: BaselineSpec, node: Node) -> dict[str, Any]:
    is_prefill = node.name.startswith("prefill")
    nixl = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if is_prefill else "kv_consumer",
        "kv_buffer_device": "cpu",
    }
    tier = _tier_connector(spec)
    if tier is None or not is_prefill:
        return nixl
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [nixl, tier]},
        # As NixlConnector asks of every configuration that contains it.
        "kv_buffer_device": "cpu",
    }


def _tier_connector(spec: BaselineSpec) -> dict[str, Any] | None:
    if spec.name == "nixl_lmcache":
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": _LMCACHE_PORT,
            },
        }
    if spec.name == "nixl_mooncake":
        return {"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}
    return None


def _lmcache_server(spec: BaselineSpec, node: Node) -> Program:
    """On the node whose engine uses it, with that node's mount.

    ``engine_driven``, else the engine waits for ever at start on a CPU. Chunks of 64 tokens, as our
    blocks, so that as much of each prompt is a hit; memory as much as our staging.
    """
    adapter = {"type": "fs", "base_path": str(spec.files)}
    gib = f"{spec.staging_bytes / 2**30:.2f}"
    command = [*node_prefix(node), spec.environment.program("lmcache"), "server"]
    host = node.address("mgmt")
    command += ["--host", "127.0.0.1", "--port", str(_LMCACHE_PORT), "--http-host", host]
    command += ["--http-port", str(_LMCACHE_HTTP_PORT), "--chunk-size", "64"]
    command += [
        "--supported-transfer-mode",
        "engine_driven",
        "--l1-size-gb",
        gib,
        "--no-l1-use-lazy",
    ]
    command += ["--eviction-policy", "LRU", "--l2-adapter", json.dumps(adapter)]
    env = {**_clean_env(), "LMCACHE_DISABLE_BANNER": "1", "PYTHONHASHSEED": "0"}
    health_url = f"http://{host}:{_LMCACHE_HTTP_PORT}/healthcheck"
    return Program(f"lmcache-{node.name}", tuple(command), env, health_url)


def _mooncake_master(spec: BaselineSpec) -> Program:
    head = spec.testbed.head
    host = head.address("mgmt")
    command = [*in_namespace(head.namespace), spec.environment.program("mooncake_master")]
    command += [f"--rpc_port={_MASTER_PORT}", f"--rpc_address={host}"]
    command += [f"--metrics_host={host}", f"--metrics_port={MASTER_HTTP_PORT}"]
    return Program("mooncake-master", tuple(command), _clean_env(), f"{spec.master_url}/metrics")


def _write_mooncake_config(spec: BaselineSpec) -> Path:
    """KV in the prefill nodes' memory: Mooncake has no tier on a shared file system."""
    path = spec.scratch / "mooncake.json"
    config = {
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"{spec.testbed.head.address('mgmt')}:{_MASTER_PORT}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": -(-spec.pool_bytes // _MIB) * _MIB,
        "local_buffer_size": 256 * _MIB,
    }
    path.write_text(json.dumps(config), "utf-8")
    return path


def _nodes(spec: BaselineSpec, role: str) -> Sequence[Node]:
    return [node for node in spec.testbed.engine_nodes() if node.name.startswith(role)]


def _engine_url(node: Node) -> str:
    return f"http://{node.address('mgmt')}:{ENGINE_PORT}"


def _clean_env(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without what would lead another environment's Python back into this one."""
    return {key: value for key, value in env.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
