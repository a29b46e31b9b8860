"""``vllm-dualpath plan``: how many of N nodes should prefill, and what each mode gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_dualpath.cli import load_options
from vllm_dualpath.cli.output import check_outputs, spinner, write_json
from vllm_dualpath.sim.assumptions import load_assumptions
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.plan import make_plan
from vllm_dualpath.sim.plan_page import plan_lines, plan_page, plan_table


def plan(
    model: load_options.Model = "ds-660b",
    nodes: Annotated[int, typer.Option(help="Nodes to split into prefill and decode.")] = 6,
    trace: load_options.Trace = "64k",
    agents: load_options.Agents = None,
    rate: load_options.Rate = None,
    tool_time: load_options.ToolTime = 0.0,
    seed: load_options.Seed = 0,
    assumptions: load_options.AssumptionsFile = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots here.")
    ] = None,
) -> None:
    """Simulate every split of the nodes in every mode and say which is best, and what binds.

    Without --agents and --rate: 100 agents a node, at once.
    """
    check_outputs(json_path, html_path)
    if agents is None and rate is None:
        agents = 100 * nodes
    config = make_config(
        model=model,
        trace=trace,
        agents=agents,
        agents_per_s=rate,
        tool_time_s=tool_time,
        seed=seed,
    )
    with spinner() as started:
        found = make_plan(config, nodes, load_assumptions(assumptions), started=started)
    write_json(json_path, found.to_json())
    if html_path is not None:
        html_path.write_text(plan_page(found), encoding="utf-8")
    console = Console()
    console.print(plan_table(found))
    for line in plan_lines(found):
        console.print(line, soft_wrap=True)
