"""``vllm-dualpath plan``: how many of N nodes should prefill, and what each mode gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from vllm_dualpath.sim.assumptions import load_assumptions
from vllm_dualpath.sim.config import make_config
from vllm_dualpath.sim.plan import make_plan
from vllm_dualpath.sim.plan_page import plan_lines, plan_page, plan_table


def plan(
    model: Annotated[str, typer.Option(help="A model of the assumptions.")] = "ds-660b",
    nodes: Annotated[int, typer.Option(help="Nodes to split into prefill and decode.")] = 6,
    trace: Annotated[
        str, typer.Option(help="32k, 48k, 64k (the paper's), or a file of trajectories.")
    ] = "64k",
    agents: Annotated[int | None, typer.Option(help="So many agents, all at once.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Agents a second, Poisson, instead of all at once.")
    ] = None,
    tool_time: Annotated[float, typer.Option(help="Mean seconds between turns.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal plans.")] = 0,
    assumptions: Annotated[
        Path | None, typer.Option(help="Hardware and models, in the form of assumptions.toml.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots here.")
    ] = None,
) -> None:
    """Simulate every split of the nodes in every mode and say which is best, and what binds."""
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
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        found = make_plan(
            config,
            nodes,
            load_assumptions(assumptions),
            started=lambda name: progress.update(task, description=name),
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if html_path is not None:
        html_path.write_text(plan_page(found), encoding="utf-8")
    console = Console()
    console.print(plan_table(found))
    for line in plan_lines(found):
        console.print(line, soft_wrap=True)
