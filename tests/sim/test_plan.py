"""The capacity planner and the bounds it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_dualpath.cli.main import main
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import paper_assumptions
from vllm_dualpath.sim.bounds import bottleneck_free_ratios, throughput_bounds, turn_demand
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.plan import make_plan
from vllm_dualpath.sim.plan_page import plan_page
from vllm_dualpath.sim.run import load_trace, run_simulation
from vllm_dualpath.workload import TrajectorySet


def test_equation_9_gives_the_papers_range() -> None:
    """Eight GPUs, s = 1, 500 GB/s of memory: 1/7 to 7/2."""
    least, most = bottleneck_free_ratios(paper_assumptions().hardware)
    assert least == pytest.approx(1 / 7)
    assert most == pytest.approx(7 / 2)


def test_demand_of_a_trace_by_hand() -> None:
    """Hits are whole blocks of the context; everything else of the prompt is new."""
    known = paper_assumptions()
    trace = TrajectorySet.from_turns([[(100, 30), (10, 5)]])
    demand = turn_demand(known, known.model("ds-27b"), trace)
    assert demand.hit_tokens == 128 / 2
    assert demand.new_tokens == (100 + 12) / 2
    assert demand.generated_tokens == 17.5
    assert demand.room_tokens == (130 + 145) / 2


@pytest.mark.parametrize("model", ["ds-27b", "qwen-32b"])
@pytest.mark.parametrize("mode", ["prefill_only", "split"])
def test_no_run_beats_its_bounds(model: str, mode: str) -> None:
    """Turns a second stay below the tightest bound, and storage-bound runs come near it."""
    known = paper_assumptions()
    config = make_config(model=model, prefill_nodes=1, decode_nodes=1, mode=mode, agents=200)
    result = run_simulation(config)
    trace = load_trace("64k", known.trace.num_trajectories, 0)
    bounds = throughput_bounds(known, known.model(model), trace, (1, 1), mode == "split", 200)
    served = result.counts["turns"] / result.end_s
    assert served <= bounds[0].turns_per_s * 1.02
    assert served >= bounds[0].turns_per_s * 0.5


def test_a_plan_has_every_split_and_the_best_of_each_mode() -> None:
    """The best split of a mode has the least JCT; equal seeds are equal plans."""
    config = make_config(model="ds-27b", trace="32k", agents=60)
    plan = make_plan(config, 3, paper_assumptions())
    assert {(cell.prefill_nodes, cell.decode_nodes) for cell in plan.cells} == {(1, 2), (2, 1)}
    for mode in ("prefill_only", "dual", "split", "pool"):
        times = [cell.result.job_s for cell in plan.cells if cell.mode == mode]
        assert plan.best(mode).result.job_s == min(times)
    again = make_plan(config, 3, paper_assumptions())
    assert again.to_json() == plan.to_json()


def test_an_online_plan_is_judged_by_its_first_tokens() -> None:
    """Of two splits the one with the shorter mean TTFT is best."""
    config = make_config(
        model="ds-27b", trace="32k", agents_per_s=0.3, duration_s=400, warm_up_s=100
    )
    plan = make_plan(config, 3, paper_assumptions(), modes=("dual",))
    times = {id(cell): cell.result.first_token_s.mean() for cell in plan.cells}
    assert times[id(plan.best("dual"))] == min(times.values())


def test_nodes_that_leave_no_split_are_refused() -> None:
    """One node cannot be both: there is nothing to split."""
    with pytest.raises(ConfigError, match="found 1"):
        make_plan(make_config(agents=5), 1, paper_assumptions())


def test_the_command_writes_table_json_and_a_page_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page loads nothing from elsewhere and has a bar for every cell."""
    json_path, html_path = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = ["plan", "--model", "ds-27b", "--nodes", "2", "--agents", "20", "--trace", "32k"]
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--json", str(json_path), "--html", str(html_path)])
    assert exit_info.value.code == 0
    assert "binds at" in capsys.readouterr().out
    written = json.loads(json_path.read_text())
    assert len(written["cells"]) == 4
    page = html_path.read_text("utf-8")
    assert "http" not in page
    assert page.count("<rect") == 4 * 5
    plan = make_plan(make_config(model="ds-27b", agents=20, trace="32k"), 2, paper_assumptions())
    assert plan_page(plan) == page
