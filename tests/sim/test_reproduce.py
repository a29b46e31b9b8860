"""Rows of the reproduction, capacity, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_dualpath.cli.main import main
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import load_assumptions, paper_assumptions
from vllm_dualpath.sim.capacity import Objectives, find_capacity
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.costs import model_work
from vllm_dualpath.sim.reproduce import SHORT, Row, cache_compute_ratio
from vllm_dualpath.sim.reproduction_page import update_page
from vllm_dualpath.sim.run import run_simulation

ROW = Row("Figure", "what", (2.0,), (1.5,), held_out=True)


def run(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.mark.parametrize(
    ("model", "total", "active"), [("ds-660b", 671e9, 37e9), ("ds-27b", 27e9, None)]
)
def test_model_shapes_have_their_published_sizes(
    model: str, total: float, active: float | None
) -> None:
    """Parameters counted from the shapes, within 3 %."""
    work = model_work(paper_assumptions().model(model))
    assert work.total_params == pytest.approx(total, rel=0.03)
    if active is not None:
        assert work.linear_flops / 2 == pytest.approx(active, rel=0.03)


def test_table_1_follows_from_the_shapes() -> None:
    """Without any simulation the cache-compute ratios are within a fifth of the paper's."""
    for row in cache_compute_ratio(SHORT):
        deviation = row.deviation()
        assert deviation is not None
        assert deviation < 0.2


def test_capacity_meets_the_objectives_and_a_higher_rate_does_not() -> None:
    """The found rate is the edge, to within the tolerance."""
    config = make_config(
        model="ds-27b",
        prefill_nodes=1,
        decode_nodes=1,
        mode="prefill_only",
        trace="32k",
        agents_per_s=0.5,
        duration_s=600,
        warm_up_s=200,
    )
    rate = find_capacity(config, tolerance=0.1)
    at, above = (
        run_simulation(config.model_copy(update={"agents_per_s": r})) for r in (rate, rate * 1.1)
    )
    assert Objectives().are_met(at)
    assert not Objectives().are_met(above)


def test_capacity_needs_a_rate() -> None:
    """An offline configuration has no rate to search from."""
    with pytest.raises(ConfigError, match="agents_per_s"):
        find_capacity(make_config(agents=10))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "triple"], "mode"),
        (["--model", "gpt"], "model"),
        (["--trace", "/nonexistent"], "trace"),
        (["--agents", "0"], "agents"),
        (["--agents", "5", "--rate", "1"], "either agents"),
        (["--agents", "5", "--short"], "--short and --page belong to --reproduce"),
        (["--reproduce", "--sweep"], "expected one of"),
        (["--rate", "1", "--duration", "10", "--warm-up", "10"], "warm_up_s"),
        (["--prefill", "3"], "prefill_nodes"),
        (["--set", "[1]"], "--set"),
        (["--set", '{"agent": 1}'], "known keys: agents, agents_per_s"),
        (["--set", '{"faults": [{"kind": "nic_slow", "node": 0}]}'], "'storage_slows'"),
        (["--set", '{"faults": [{"kind": "node_dies", "node": 9, "at_s": 1}]}'], "node 9"),
        (["--assumptions", "/nonexistent"], "assumptions"),
        (["--agents", "5", "--capacity"], "agents_per_s"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the key; there is no traceback."""
    assert run("simulate", *arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_a_run_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has the latencies, the file the whole configuration with them."""
    path = tmp_path / "run.json"
    arguments = ["--model", "ds-27b", "--prefill", "1", "--decode", "1", "--agents", "20"]
    assert run("simulate", *arguments, "--trace", "32k", "--json", str(path)) == 0
    assert "TTFT" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["config"]["agents"] == 20
    assert written["ttft_s"]["count"] == written["counts"]["turns"]
    assert [node["role"] for node in written["nodes"]] == ["prefill", "decode"]


def test_agents_that_fit_no_engine_end_and_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run says how many turns could never be placed."""
    fault = '{"faults": [{"kind": "node_dies", "node": 1, "at_s": 5}]}'
    arguments = ["--model", "ds-27b", "--prefill", "1", "--decode", "1", "--agents", "5"]
    assert run("simulate", *arguments, "--set", fault) == 0
    assert "fit no engine 5" in capsys.readouterr().out


def test_a_page_keeps_its_text_and_gets_the_rows(tmp_path: Path) -> None:
    """Only what is between the marks is replaced, also the second time."""
    source = Path(__file__).parents[2] / "docs" / "reproduction.md"
    page = tmp_path / "page.md"
    page.write_text(source.read_text("utf-8"), "utf-8")
    update_page(page, [ROW], short=True)
    once = page.read_text("utf-8")
    assert "| Figure | what | held out | 2.000 | 1.500 | 25.0% |" in once
    assert "## Rules" in once
    update_page(page, [ROW], short=True)
    assert page.read_text("utf-8") == once
    page.write_text("no marks", "utf-8")
    with pytest.raises(ConfigError, match="marks"):
        update_page(page, [ROW], short=True)


def test_assumptions_refuse_unknown_keys(tmp_path: Path) -> None:
    """A misspelt key is named."""
    path = tmp_path / "other.toml"
    path.write_text("[hardware]\ngpus = 8\n", "utf-8")
    with pytest.raises(ConfigError, match="gpus"):
        load_assumptions(path)
