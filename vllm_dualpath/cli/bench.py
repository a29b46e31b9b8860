"""``vllm-dualpath bench``: measure a server, this machine's data mover, the policy, a router."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_dualpath.bench.hooks.idle import CASES, measure_idle
from vllm_dualpath.bench.hooks.report import hook_table, idle_line, to_json
from vllm_dualpath.bench.hooks.timing import time_hooks
from vllm_dualpath.bench.mover.plan import full_plan, short_plan
from vllm_dualpath.bench.mover.record import make_record
from vllm_dualpath.bench.mover.report import measure_with_progress, result_table
from vllm_dualpath.bench.policy import policy_table, time_policies
from vllm_dualpath.bench.policy import to_json as to_policy_json
from vllm_dualpath.bench.replay import ReplayPlan, ReplayResult, TokenRange
from vllm_dualpath.bench.report import latency_table, replay_with_progress
from vllm_dualpath.bench.router.report import make_record as make_router_record
from vllm_dualpath.bench.router.report import measure_with_progress as measure_router
from vllm_dualpath.bench.router.report import result_table as router_table
from vllm_dualpath.bench.router.report import within_goal
from vllm_dualpath.bench.router.run import full_plan as full_router_plan
from vllm_dualpath.bench.router.run import short_plan as short_router_plan
from vllm_dualpath.cli import bench_cluster
from vllm_dualpath.cli.output import check_outputs, write_json
from vllm_dualpath.policy import make_policy

app = typer.Typer(help="Measure a server, or the data mover on this machine.", no_args_is_help=True)
app.command("cluster")(bench_cluster.cluster)


@app.command()
def replay(
    url: Annotated[str, typer.Option(help="A router, or any vLLM server.")] = (
        "http://127.0.0.1:9000"
    ),
    agents: Annotated[int, typer.Option(help="Agents, all at once.")] = 2,
    turns: Annotated[int, typer.Option(help="Turns of each agent, one after the other.")] = 4,
    append: Annotated[str, typer.Option(help="Tokens each turn adds: N or LOW-HIGH.")] = "60-100",
    first: Annotated[str | None, typer.Option(help="The same for the first turn.")] = None,
    generate: Annotated[int, typer.Option(help="Tokens each answer has.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same appends.")] = 0,
    think_time: Annotated[float, typer.Option(help="Seconds between answer and next turn.")] = 0,
    model: Annotated[str | None, typer.Option(help="Default: the first one served.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements here.")
    ] = None,
) -> None:
    """Replay agents whose every turn repeats the whole conversation so far.

    Exit code 1 if a request failed.
    """
    check_outputs(json_path)
    plan = ReplayPlan(
        agents=agents,
        turns=turns,
        append=TokenRange.parse(append),
        first=None if first is None else TokenRange.parse(first),
        generate=generate,
        seed=seed,
        think_time_s=think_time,
    )
    result = asyncio.run(replay_with_progress(url.rstrip("/"), plan, model, Console(stderr=True)))
    write_json(json_path, result.to_json())
    Console().print(latency_table(result))
    raise typer.Exit(_report_failures(result))


@app.command()
def mover(
    short: Annotated[
        bool, typer.Option("--short", help="Under 50 s: fewer rounds, no pieces of 1 MiB.")
    ] = False,
    directory: Annotated[
        Path, typer.Option(help="Where to measure storage; a folder is made in it and removed.")
    ] = Path(),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write ratios, intervals and samples here.")
    ] = None,
    nixl_path: Annotated[
        Path | None, typer.Option(help="Where NIXL is, if not in this environment.")
    ] = None,
    pin: Annotated[
        bool, typer.Option(help="Pin initiators and targets of puts to a core each.")
    ] = True,
) -> None:
    """Measure storage, transport, checksums and copies beside what one would take instead."""
    check_outputs(json_path)
    plan = (short_plan if short else full_plan)(directory.resolve(), nixl_path, pin)
    record = make_record(measure_with_progress(plan, Console(stderr=True)))
    write_json(json_path, record)
    Console().print(result_table(record))


@app.command()
def hooks(
    short: Annotated[bool, typer.Option("--short", help="Fewer steps and rounds.")] = False,
    idle: Annotated[
        bool,
        typer.Option(help="Also compare an engine that loads and stores nothing with plain vLLM."),
    ] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements here.")
    ] = None,
) -> None:
    """Measure what the connector's hooks take of vLLM's thread."""
    check_outputs(json_path)
    timings = time_hooks(20 if short else 100)
    overhead = {}
    for name, case in CASES.items() if idle else ():
        Console(stderr=True).print(
            f"bench hooks: an idle engine with and without its connector, {name} model"
        )
        overhead[name] = measure_idle(case, case.num_short_rounds if short else case.num_rounds)
    write_json(json_path, to_json(timings, overhead))
    console = Console()
    console.print(hook_table(timings))
    for name, each in overhead.items():
        console.print(idle_line(name, each))


@app.command()
def policy(
    short: Annotated[bool, typer.Option("--short", help="Half a second for each row.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all measurements here.")
    ] = None,
) -> None:
    """Measure what one decision of each mode costs, on small and large clusters.

    Exit code 1 if a median or a rate misses its limit.
    """
    check_outputs(json_path)
    timings = time_policies(0.5 if short else 3.0)
    write_json(json_path, to_policy_json(timings))
    Console().print(policy_table(timings))
    raise typer.Exit(0 if all(timing.within_limits for timing in timings) else 1)


@app.command()
def router(
    short: Annotated[bool, typer.Option("--short", help="Under 60 s: fewer rounds.")] = False,
    mode: Annotated[str, typer.Option(help="Our router's policy.")] = "split",
    transfer_all: Annotated[
        bool,
        typer.Option(
            "--transfer-all", help="Prompts of 100 tokens, too, which go to the decode engine else."
        ),
    ] = False,
    vllm_router_path: Annotated[
        Path | None, typer.Option(help="Where vllm-router is, if not in this environment.")
    ] = None,
    pin: Annotated[
        bool, typer.Option(help="Routers on one core, engines and clients on another.")
    ] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write ratios, intervals and samples here.")
    ] = None,
) -> None:
    """Measure what our router and vllm-router add to a request, between do-nothing engines.

    Exit code 1 if a ratio misses the goal.
    """
    check_outputs(json_path)
    plan = short_router_plan if short else full_router_plan
    make_policy(mode)  # refuses a mode that is none, before anything is started
    measured = measure_router(plan(mode, transfer_all, vllm_router_path, pin), Console(stderr=True))
    record = make_router_record(measured)
    write_json(json_path, record)
    Console().print(router_table(record))
    raise typer.Exit(0 if within_goal(record) else 1)


def _report_failures(result: ReplayResult) -> int:
    for record in result.records:
        if record.completion is None:
            typer.echo(f"agent {record.agent}, turn {record.turn}: {record.error}", err=True)
    return 1 if result.num_failed else 0
