"""``vllm-dualpath simulate``: a cluster under a load of agents, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_dualpath.cli import load_options
from vllm_dualpath.cli.output import check_outputs, spinner, write_json
from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import Assumptions, load_assumptions
from vllm_dualpath.sim.capacity import Objectives, find_capacity
from vllm_dualpath.sim.config import SimulationConfig, make_config
from vllm_dualpath.sim.heatmap import heat_map
from vllm_dualpath.sim.report import result_lines, result_table, sweep_table
from vllm_dualpath.sim.reproduce import reproduce
from vllm_dualpath.sim.reproduction_page import row_table, update_page
from vllm_dualpath.sim.run import run_simulation
from vllm_dualpath.sim.sweep import BASE_MODE, SweepScope, run_sweep


def simulate(
    model: load_options.Model = "ds-660b",
    prefill: Annotated[int, typer.Option(help="Prefill nodes.")] = 2,
    decode: Annotated[int, typer.Option(help="Decode nodes.")] = 4,
    mode: Annotated[
        str, typer.Option(help="basic, prefill_only, dual, split, pool or oracle.")
    ] = "dual",
    trace: load_options.Trace = "64k",
    agents: load_options.Agents = None,
    rate: load_options.Rate = None,
    duration: Annotated[float, typer.Option(help="Seconds that agents come for.")] = 3600.0,
    warm_up: Annotated[float, typer.Option(help="Turns before are not measured.")] = 1200.0,
    tool_time: load_options.ToolTime = 0.0,
    seed: load_options.Seed = 0,
    choices: Annotated[
        str, typer.Option("--set", help="More keys of the configuration, a JSON object.")
    ] = "{}",
    assumptions: load_options.AssumptionsFile = None,
    capacity: Annotated[
        bool, typer.Option(help="Find the highest rate with TTFT <= 4 s and TPOT <= 50 ms.")
    ] = False,
    reproduce_paper: Annotated[
        bool, typer.Option("--reproduce", help="Run the paper's experiments instead.")
    ] = False,
    short: Annotated[bool, typer.Option("--short", help="Reproduce only the small ones.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Compare split and pool with dual over a grid instead.")
    ] = False,
    heat_maps: Annotated[
        Path | None, typer.Option(help="Write the sweep's heat maps into this directory.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Rewrite the table in this copy of reproduction.md.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Simulate a cluster that serves agents, or reproduce the paper's figures.

    Without --agents and --rate: 500 agents at once.
    """
    _check_flags(reproduce_paper, sweep, capacity, short, page, heat_maps)
    check_outputs(json_path, page)
    if heat_maps is not None and not heat_maps.is_dir():
        raise ConfigError(f"--heat-maps {heat_maps}: expected a directory that is there")
    if reproduce_paper:
        _reproduce(short, page, json_path)
        return
    if sweep:
        _sweep(load_assumptions(assumptions), heat_maps, json_path)
        return
    if agents is None and rate is None:
        agents = 500
    config = make_config(
        model=model,
        prefill_nodes=prefill,
        decode_nodes=decode,
        mode=mode,
        trace=trace,
        agents=agents,
        agents_per_s=rate,
        duration_s=duration,
        warm_up_s=warm_up,
        tool_time_s=tool_time,
        seed=seed,
        **_object(choices),
    )
    if capacity:
        _find_capacity(config, assumptions, json_path)
    else:
        _run_one(config, assumptions, json_path)


def _check_flags(
    reproduce_paper: bool,
    sweep: bool,
    capacity: bool,
    short: bool,
    page: Path | None,
    heat_maps: Path | None,
) -> None:
    if reproduce_paper + sweep + capacity > 1:
        raise ConfigError("expected one of --reproduce, --sweep and --capacity, found more")
    if (short or page is not None) and not reproduce_paper:
        raise ConfigError("--short and --page belong to --reproduce, which is not there")
    if heat_maps is not None and not sweep:
        raise ConfigError("--heat-maps belongs to --sweep, which is not there")


def _run_one(config: SimulationConfig, path: Path | None, json_path: Path | None) -> None:
    result = run_simulation(config, load_assumptions(path))
    write_json(json_path, result.to_json())
    console = Console()
    console.print(result_table(result))
    for line in result_lines(result):
        console.print(line, soft_wrap=True)


def _find_capacity(config: SimulationConfig, path: Path | None, json_path: Path | None) -> None:
    objectives = Objectives()
    rate = find_capacity(config, objectives, load_assumptions(path))
    write_json(json_path, {"config": config.model_dump(mode="json"), "agents_per_s": rate})
    Console().print(
        f"{config.mode}: {rate:.3f} agents a second with mean TTFT <= {objectives.first_token_s} s "
        f"and mean TPOT <= {objectives.per_token_s} s",
        soft_wrap=True,
    )


def _reproduce(short: bool, page: Path | None, json_path: Path | None) -> None:
    with spinner() as started:
        rows = reproduce(short, started)
    write_json(json_path, {"rows": [row.to_json() for row in rows]})
    if page is not None:
        update_page(page, rows, short)
    console = Console()
    console.print(row_table(rows))
    if short:
        console.print(
            "--short: small loads and one trace, to see that it runs; docs/reproduction.md has the "
            "figures",
            soft_wrap=True,
        )


def _sweep(assumptions: Assumptions, heat_maps: Path | None, json_path: Path | None) -> None:
    with spinner() as started:
        cells = run_sweep(SweepScope(), assumptions, started=started)
    write_json(json_path, {"cells": [cell.to_json() for cell in cells]})
    console = Console()
    for mode in dict.fromkeys(cell.mode for cell in cells):
        if heat_maps is not None:
            picture = heat_map(cells, mode, BASE_MODE)
            (heat_maps / f"sweep-{mode}.svg").write_text(picture, encoding="utf-8")
        console.print(sweep_table([cell for cell in cells if cell.mode == mode], mode))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"--set: expected a JSON object, found {text!r} ({exc})") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"--set: expected a JSON object, found {text!r}")
    return found
