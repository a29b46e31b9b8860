"""How a vLLM server is started here: its command line, its environment, the device it gets.

Knows vLLM's flags but never imports vllm.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from vllm_dualpath.config import parse_engine_config

HOST = "127.0.0.1"

CONNECTOR = "DualPathConnector"

_API_SERVER = "vllm.entrypoints.openai.api_server"

# Several servers on few cores: scheduler and worker share one process, no thread spins.
_CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_CPU_ARGS = ("--distributed-executor-backend", "uni", "--enforce-eager")
_COMMON_ENV = {"VLLM_HOST_IP": HOST, "VLLM_NO_USAGE_STATS": "1"}

_SHARED_GPU_FRACTION = 0.85
"""Of one GPU's memory, split between the engines that share it."""


def kv_transfer_config(extra_config: Mapping[str, object]) -> dict[str, object]:
    """The ``--kv-transfer-config`` around our configuration of one engine.

    ``kv_both`` on both sides: vLLM defers the freeing of blocks that a step still writes only for
    consumers. Raises ``ConfigError`` if ``extra_config`` cannot work.
    """
    parse_engine_config(extra_config)
    return {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra_config),
    }


def gpus() -> list[str]:
    """The devices that engines may use, as CUDA_VISIBLE_DEVICES names them; empty on a CPU host."""
    if _is_cpu_vllm():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip()]
    return [str(idx) for idx, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _is_cpu_vllm() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def server_command(
    model: str,
    port: int,
    transfer_config: Mapping[str, object] | None,
    engine_args: Sequence[str],
    *,
    on_gpu: bool,
    host: str = HOST,
    python: str = sys.executable,
) -> list[str]:
    """The command of one server; ``engine_args`` come last and win. ``python`` is of the
    environment whose vLLM it is.

    The module and not ``vllm serve``: that needs the package metadata of a distribution called
    vllm, and the CPU build's is called vllm-cpu.
    """
    command = [python, "-m", _API_SERVER, "--model", model]
    command += ["--host", host, "--port", str(port)]
    if not on_gpu:
        command += _CPU_ARGS
    if transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(transfer_config)]
    return [*command, *engine_args]


def server_env(model: str, device: str | None) -> dict[str, str]:
    """The environment of one server. What the caller's environment says already is kept."""
    env = {**_COMMON_ENV, **({} if device is not None else _CPU_ENV)}
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    env |= os.environ
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    return env


def device_for(engine_idx: int, num_engines: int) -> tuple[str | None, list[str]]:
    """The device of one of ``num_engines`` engines, and the arguments that go with sharing it."""
    devices = gpus()
    if not devices:
        return None, []
    sharing = -(-num_engines // len(devices))
    if sharing == 1:
        return devices[engine_idx], []
    fraction = f"{_SHARED_GPU_FRACTION / sharing:.3f}"
    return devices[engine_idx % len(devices)], ["--gpu-memory-utilization", fraction]


def free_ports(count: int) -> list[int]:
    """Distinct ports of loopback that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def connector_command(
    model: str, extra_config: Mapping[str, object], engine_args: Sequence[str]
) -> list[str]:
    """The command of a server with our connector and nothing else decided for it."""
    transfer = json.dumps(kv_transfer_config(extra_config))
    command = [sys.executable, "-m", _API_SERVER, "--model", model]
    return [*command, "--kv-transfer-config", transfer, *engine_args]
