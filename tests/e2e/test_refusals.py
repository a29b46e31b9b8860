"""Configurations that cannot work: the server ends at start, with one message that says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vllm_dualpath.bench.processes import STOP_GRACE_S, ManagedProcess, ProcessGuard
from vllm_dualpath.bench.vllm_command import free_ports, server_command, server_env

from .deployment import wait_until
from .models import COMMON_ARGS

_START_S = 300.0

# By name: the transfer config, our own config, and what the message must say.
_REFUSED: Mapping[str, tuple[dict[str, object], dict[str, object], tuple[str, ...]]] = {
    "policy": ({"kv_load_failure_policy": "fail"}, {}, ("kv_load_failure_policy", "recompute")),
    "unknown-key": ({}, {"stagin_bytes": 1 << 26}, ("stagin_bytes", "known keys")),
    "no-store": ({}, {"store": "file:///nonexistent/kv"}, ("/nonexistent/kv", "mkdir")),
    "small-staging": ({}, {"staging_bytes": 1 << 20}, ("staging_bytes",)),
}


@pytest.fixture(scope="module")
def refused(
    llama_dir: Path, log_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ManagedProcess]]:
    """All of them, started together: each is only waited for by its test."""
    store = tmp_path_factory.mktemp("refused-store")
    directory = log_root / "refused"
    directory.mkdir()
    guard = ProcessGuard()
    servers: dict[str, ManagedProcess] = {}
    try:
        for name, (transfer, extra, _) in _REFUSED.items():
            config = {
                "kv_connector": "DualPathConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                **transfer,
                "kv_connector_extra_config": {"role": "both", "store": f"file://{store}", **extra},
            }
            command = server_command(
                str(llama_dir), free_ports(1)[0], config, COMMON_ARGS, on_gpu=False
            )
            environment = server_env(str(llama_dir), None)
            log_path = directory / f"{name}.log"
            servers[name] = ManagedProcess(name, command, log_path, guard, environment)
            servers[name].start()
        yield servers
    finally:
        for server in servers.values():
            server.stop(STOP_GRACE_S)
        guard.close()


@pytest.mark.parametrize("name", _REFUSED)
def test_refused_at_start(refused: dict[str, ManagedProcess], name: str) -> None:
    """The process ends with an error, and its last lines name the key and what is expected."""
    server = refused[name]
    wait_until(lambda: not server.alive, f"the end of {name}", _START_S)
    assert server.exit_code != 0
    log = server.log_path.read_text(encoding="utf-8", errors="replace")
    errors = [line for line in log.splitlines() if "ConfigError" in line]
    assert errors, log[-3000:]
    text = log[log.index("ConfigError") :]
    for words in _REFUSED[name][2]:
        assert words in text
