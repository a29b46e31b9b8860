"""The command line: exit codes, messages, and what reaches the processes behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_dualpath.cli.main import main


def run(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["router", "--mode", "triple"], "mode"),
        (["router", "--control", "127.0.0.1:1"], "tcp://host:port"),
        (["router", "--control", "tcp://10.0.0.1:1"], "insecure"),
        (["router", "--deadline", "stage_s"], "KEY=SECONDS"),
        (["router", "--deadline", "stag_s=1"], "stag_s"),
        (["serve", "M", "--store", "nfs://x", "--role", "both"], "file:///absolute/path"),
        (["serve", "M", "--store", "file:///kv", "--role", "decode"], "router"),
        (["serve", "M", "--store", "file:///kv", "--config-json", "[1]"], "JSON object"),
        (["serve", "M", "--store", "file:///kv", "--kv-transfer-config={}"], "config-json"),
        (["up", "--model", "M", "--store", "file:///nonexistent"], "mkdir"),
        (["up", "--model", "/nonexistent", "--store", "file:///kv"], "/nonexistent does not exist"),
        (["up", "--model", "/usr", "--store", "file:///kv"], "config.json"),
        (["serve", "/nonexistent", "--store", "file:///kv"], "/nonexistent does not exist"),
        (["model", "tiny", "--vocab", "3", "--out", "/nonexistent"], "vocab"),
        (["bench", "replay", "--append", "9-5"], "append"),
        (["profile", "M", "--out", "/nonexistent/p.json"], "no directory /nonexistent"),
        (["profile", "M", "--store", "file:///nonexistent"], "/nonexistent"),
        (["bench", "cluster", "--json", "/nonexistent/f.json"], "no directory /nonexistent"),
        (["bench", "cluster", "--html", "/usr"], "found a directory"),
        (["bench", "cluster", "--plots", "/dev/null"], "expected a directory"),
        (["bench", "cluster", "--topology", "1P1D,1P1D"], "each once"),
        (["bench", "cluster", "--generate", "0"], "generate: expected at least 1, found 0"),
        (["bench", "cluster", "--arrivals", "poisson", "--html", "x.html"], "--json only"),
        (["bench", "cluster", "--storage-nic", "9999999gbit"], "--storage-nic"),
        (["bench", "policy", "--json", "/nonexistent/f.json"], "no directory /nonexistent"),
        (["simulate", "--json", "/nonexistent/f.json"], "no directory /nonexistent"),
        (["router", "--profile", "/nonexistent/p.json"], "cannot be read"),
        (["router", "--recompute"], "or a profile"),
    ],
)
def test_wrong_configuration_is_one_message_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the key; there is no traceback and nothing on standard output."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_up_says_that_its_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Before any engine is started, and with the flag that names another."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert run("up", "--model", "M", "--store", "file:///kv", "--port", port) == 2
    assert f"--port: expected a port of 127.0.0.1 that is free, found {port}" in (
        capsys.readouterr().err
    )


def test_keys_are_listed_only_for_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever mistyped a value is not shown every key there is."""
    run("router", "--mode", "duall")
    assert "known keys" not in capsys.readouterr().err
    run("serve", "M", "--store", "file:///kv", "--config-json", '{"stor": 1}')
    assert "known keys: " in capsys.readouterr().err


def test_version_and_help() -> None:
    """Both exit with 0."""
    assert run("--version") == 0
    assert run("--help") == 0
    assert run("up", "--help") == 0


def test_serve_becomes_vllm_with_the_connector_filled_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our flags go into --kv-transfer-config, all others to vLLM in their order."""
    started: list[Sequence[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    store = f"file://{tmp_path}"
    assert run("serve", "M", "--store", f"{store}/missing") == 2
    assert "missing is not a directory" in capsys.readouterr().err
    assert not started
    main_arguments = ["serve", "M", "--store", store, "--staging-bytes", "4096"]
    main_arguments += ["--config-json", '{"store_threads": 2}', "--port", "8001", "--enforce-eager"]
    assert run(*main_arguments) == 0
    command = list(started[0])
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"] == {
        "role": "both",
        "store": store,
        "staging_bytes": 4096,
        "store_threads": 2,
    }
    assert command[-3:] == ["--port", "8001", "--enforce-eager"]
    assert command[command.index("--model") + 1] == "M"


def test_model_tiny_writes_a_model(tmp_path: Path) -> None:
    """The directory has everything vLLM opens."""
    assert run("model", "tiny", "--layers", "1", "--out", str(tmp_path / "m")) == 0
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names


def test_replay_without_a_server_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody listens: a message and exit code 1."""
    assert run("bench", "replay", "--url", "http://127.0.0.1:9") == 1
    assert "v1/models" in capsys.readouterr().err


def test_doctor_reports_every_check_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good store is measured; a missing one is a failure and exit code 1."""
    run("doctor", "--store", f"file://{tmp_path}", "--json")
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["store"]["level"] == "ok"
    assert "MB/s" in found["store bandwidth"]["found"]
    assert list(tmp_path.iterdir()) == []
    assert {"vLLM", "UCX", "RDMA", "shared memory", "locked memory", "open files"} <= found.keys()
    assert run("doctor", "--store", f"file://{tmp_path}/missing", "--json") == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["store"]["level"] == "fail"


def test_doctor_sees_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that somebody listens on is a warning with what to do."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        run("doctor", "--port", str(port))
    output = capsys.readouterr().out
    assert f"port {port}" in output
    assert "in use" in output


def test_cma_check_notices_a_kernel_that_refuses() -> None:
    """The writer fails with the kernel's reason where the address is no one's."""
    probe = [sys.executable, "-m", "vllm_dualpath.cli.checks.peer_memory_probe", "write"]
    result = subprocess.run([*probe, str(os.getpid()), "8"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "process_vm_writev" in result.stderr
