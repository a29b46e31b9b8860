"""``vllm-dualpath bench replay`` as a whole."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from vllm_dualpath.cli.main import main

from .vllm_double import VllmDouble


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_replay_writes_its_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, a file for programs, exit code 1 once a request fails."""

    async def inside(server: VllmDouble, path: Path) -> int:
        async with server.serve() as url:
            arguments = ["bench", "replay", "--url", url, "--turns", "3", "--json", str(path)]
            return await asyncio.to_thread(run_command, *arguments)

    assert asyncio.run(inside(VllmDouble(), tmp_path / "good.json")) == 0
    assert "6 requests, 0 failed" in capsys.readouterr().out
    report = json.loads((tmp_path / "good.json").read_text())
    assert len(report["requests"]) == 6
    assert asyncio.run(inside(VllmDouble(refuse_from=5), tmp_path / "bad.json")) == 1
    assert "HTTP 500" in capsys.readouterr().err
    assert json.loads((tmp_path / "bad.json").read_text())["num_failed"] == 1
