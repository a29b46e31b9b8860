"""The README's commands, as they stand there: one starts a cluster, the other asks it.

In the model's own bfloat16 and with vLLM's defaults, which no other test here uses: answers are not
compared, because rounding depends on the shape of the batch; that they come is what is tested.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.bench.servers import get_json
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model
from vllm_dualpath.bench.vllm_command import free_ports

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^mkdir -p /mnt/kv\n(vllm-dualpath up .*?)\n(curl .*?)```", re.M | re.S)
READY_S = 240.0
STOP_S = 60.0


def commands(replaced: dict[str, str]) -> tuple[str, str]:
    """The README's ``vllm-dualpath up`` and ``curl``, with other paths and another port."""
    text = README.read_text(encoding="utf-8")
    block = re.search(
        r"^mkdir -p /mnt/kv\n(vllm-dualpath up .*?)\n(curl .*?)```", text, re.M | re.S
    )
    assert block is not None, "the README has no block with `mkdir`, `up` and `curl`"
    up, ask = block.groups()
    for old, new in replaced.items():
        up, ask = up.replace(old, new), ask.replace(old, new)
    return up, ask


@pytest.fixture
def ask(tmp_path: Path, log_root: Path) -> Iterator[str]:
    """The cluster of the README's first command runs; its second command."""
    model, store, port = tmp_path / "model", tmp_path / "kv", free_ports(1)[0]
    write_tiny_model(TinyModel(), model)
    store.mkdir()
    replaced = {"MODEL": str(model), "/mnt/kv": str(store), "9000": str(port)}
    up, ask = commands(replaced)
    program = f"{sys.executable} -m vllm_dualpath.cli"
    logs = log_root / "readme"
    up = up.replace("vllm-dualpath ", f"exec {program} ", 1).replace(
        " -- ", f" --status-json {tmp_path / 'ready'} --log-dir {logs} -- "
    )
    process = subprocess.Popen(["sh", "-c", up])
    try:
        deadline_s = time.monotonic() + READY_S
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, f"up ended with {process.returncode}; logs in {logs}"
            assert time.monotonic() < deadline_s, f"not ready after {READY_S} s; logs in {logs}"
            time.sleep(0.2)
        yield ask
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    finally:
        process.kill()
        process.wait()


def test_the_readme_s_two_commands(ask: str) -> None:
    """Asked twice as it stands, a short prompt, and twice with one that is transferred, there are
    four answers, and both engines outlive them.
    """
    long = ask.replace("Once upon a time", "Once upon a time " * 100)
    for command in (ask, ask, long, long):
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        (choice,) = json.loads(result.stdout)["choices"]
        assert choice["text"]
    url = ask.split()[1].removesuffix("/v1/completions")
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        metrics = response.read().decode()
    for outcome in ("short", "transferred"):
        assert f'dualpath_router_requests_total{{outcome="{outcome}"}} 2.0' in metrics
    engines = get_json(f"{url}/dualpath/status")["engines"]
    assert [engine["serving"] for engine in engines] == [True, True]
