"""``vllm-dualpath bench hooks``: the timing of the hooks as a whole, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_dualpath.bench.hooks.idle import BatchCost, IdleOverhead
from vllm_dualpath.bench.hooks.report import IDLE_RATIOS, hook_table, idle_line, to_json
from vllm_dualpath.bench.hooks.timing import StepTiming, time_hooks
from vllm_dualpath.bench.hooks.timing_process import run_timing
from vllm_dualpath.cli.main import main
from vllm_dualpath.errors import LaunchError

HOOKS = {
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
}


@pytest.fixture(scope="module")
def timings() -> list[StepTiming]:
    """The real hooks around a real mover, with few steps."""
    return time_hooks(2, (1, 300))


def test_command_writes_every_hook_and_size(
    timings: list[StepTiming], tmp_path: Path, monkeypatch, capsys
) -> None:
    """JSON for programs, a table for people."""
    monkeypatch.setattr("vllm_dualpath.cli.bench.time_hooks", lambda _: timings)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "hooks", "--short", "--no-idle", "--json", str(tmp_path / "hooks.json")])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "hooks.json").read_text())
    assert set(report["pages"]) == {"1", "300"}
    for size in report["pages"].values():
        assert set(size["hooks"]) == HOOKS
        assert size["cpu_us_a_layer_and_step"] > 0
    models = ("served", "tiny")
    assert report["ratios"] == {f"{kind}_{model}": None for model in models for kind in IDLE_RATIOS}
    assert "save_kv_layer" in capsys.readouterr().out


def test_timing_that_fails_says_why() -> None:
    """The end of the child's error output is in the message."""
    with pytest.raises(LaunchError, match=r"^timing: .*exit code 2:(.|\n)*: --pages"):
        run_timing("timing", "json.tool", ["--pages"], timeout_s=60.0)


def test_timing_that_does_not_end_is_an_error() -> None:
    """It is ended at its deadline, which the message names."""
    sleeping = ["-n", "1", "import time; time.sleep(60)"]
    with pytest.raises(LaunchError, match=r"^timing: expected an end within 1 s"):
        run_timing("timing", "timeit", sleeping, timeout_s=0.6)


def test_idle_overhead_in_a_sentence_and_in_json() -> None:
    """A median over pairs, with its interval and its samples."""
    plain = tuple(BatchCost(seconds, 1.0) for seconds in (1.0, 2.0, 4.0))
    ours = tuple(BatchCost(seconds, 0.99) for seconds in (1.01, 2.02, 4.04))
    idle = IdleOverhead(plain, plain, ours)
    line = idle_line("tiny", idle)
    assert "+1.00 % (95 % interval" in line
    assert "-1.00 % (95 % interval" in line
    report = to_json([], {"tiny": idle})
    assert report["ratios"]["idle_vs_plain_tiny"] == pytest.approx(1.01)
    assert report["ratios"]["idle_cpu_vs_plain_tiny"] == pytest.approx(0.99)
    assert report["intervals"]["idle_vs_plain_tiny"]["num_pairs"] == 3
    assert report["samples"]["tiny"]["plain"][0] == {"seconds": 1.0, "cpu_s": 1.0}


def test_table_names_the_limit(timings: list[StepTiming]) -> None:
    """What is measured stands beside what it is measured against."""
    table = hook_table(timings)
    assert "limit 50" in "".join(str(cell) for cell in table.columns[0].cells)
