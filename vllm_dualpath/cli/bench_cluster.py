"""``vllm-dualpath bench cluster``: read modes beside each other on a shaped testbed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_dualpath.bench.comparison.baseline_runs import DEFAULT_BASELINE_DIR, is_baseline
from vllm_dualpath.bench.comparison.online import Limits, RateRange
from vllm_dualpath.bench.comparison.page import comparison_page, comparison_plots, comparison_table
from vllm_dualpath.bench.comparison.record import comparison_json
from vllm_dualpath.bench.comparison.run import check_ready, compare, search_rates
from vllm_dualpath.bench.comparison.settings import ComparisonPlan, Say, Topology, parse_modes
from vllm_dualpath.bench.replay import TokenRange
from vllm_dualpath.bench.testbed.layout import parse_rate
from vllm_dualpath.cli.interrupts import end_like_ctrl_c
from vllm_dualpath.cli.output import check_outputs, write_json
from vllm_dualpath.errors import ConfigError

_DEFAULT = ComparisonPlan()


def cluster(
    topology: Annotated[str, typer.Option(help="Nodes, one after the other: 1P1D,1P2D.")] = "1P1D",
    modes: Annotated[
        str,
        typer.Option(
            help="Who reads: prefill_only,dual,split,pool; oracle; and what one would run today:"
            " nixl,nixl_lmcache,nixl_mooncake."
        ),
    ] = "prefill_only,dual,split,oracle",
    repeats: Annotated[int, typer.Option(help="Runs of each mode, interleaved.")] = 3,
    agents: Annotated[int, typer.Option(help="Agents.")] = _DEFAULT.agents,
    turns: Annotated[int, typer.Option(help="Turns of each agent.")] = _DEFAULT.turns,
    context: Annotated[
        int, typer.Option(help="Tokens of each agent that are stored before the first turn.")
    ] = _DEFAULT.context,
    append: Annotated[str, typer.Option(help="Tokens each turn adds: N or LOW-HIGH.")] = "30-50",
    generate: Annotated[int, typer.Option(help="Tokens each answer has.")] = _DEFAULT.generate,
    alone: Annotated[
        int, typer.Option(help="Requests on the idle cluster before each run.")
    ] = _DEFAULT.num_alone,
    storage_nic: Annotated[str, typer.Option(help="Rate of each storage NIC.")] = "250mbit",
    compute_nic: Annotated[str, typer.Option(help="Rate of each compute NIC.")] = "1600mbit",
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching", help="With vLLM's own prefix caching on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same agents.")] = 0,
    arrivals: Annotated[
        str, typer.Option(help="offline: all agents at once. poisson: find the highest rate.")
    ] = "offline",
    rate: Annotated[
        str, typer.Option(help="With poisson: agents a second, LOW-HIGH to search.")
    ] = "0.02-0.5",
    ttft_limit: Annotated[
        float, typer.Option(help="With poisson: seconds for nine in ten first tokens.")
    ] = 6.0,
    tpot_limit: Annotated[
        float, typer.Option(help="With poisson: seconds for nine in ten tokens after.")
    ] = 0.3,
    pool_share: Annotated[
        float,
        typer.Option(help="Of all agents' KV, what fits into the memory of nixl_mooncake."),
    ] = _DEFAULT.pool_share,
    baseline_dir: Annotated[
        Path, typer.Option(help="Where baselines' environments are, or are made on demand.")
    ] = DEFAULT_BASELINE_DIR,
    log_dir: Annotated[Path | None, typer.Option(help="Where logs go; default: new.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write the report.")] = None,
    plot_dir: Annotated[
        Path | None, typer.Option("--plots", help="Write the main plots as SVG files in here.")
    ] = None,
) -> None:
    """Replay the same agents in several read modes on one cluster with shaped NICs, and compare.

    Needs root, iproute2 and GlusterFS. Exit code 1 if an answer differs or a request failed.
    """
    plan = ComparisonPlan(
        topologies=tuple(Topology.parse(text) for text in topology.split(",")),
        modes=parse_modes(modes),
        repeats=repeats,
        agents=agents,
        turns=turns,
        context=context,
        append=TokenRange.parse(append),
        generate=generate,
        num_alone=alone,
        storage_rate=parse_rate(storage_nic, "--storage-nic"),
        compute_rate=parse_rate(compute_nic, "--compute-nic"),
        prefix_caching=prefix_caching,
        pool_share=pool_share,
        seed=seed,
    )
    if arrivals not in ("offline", "poisson"):
        raise ConfigError(f"--arrivals: expected offline or poisson, found {arrivals!r}")
    online = arrivals == "poisson"
    rates, limits = RateRange.parse(rate), Limits(ttft_limit, tpot_limit)
    if online and (html_path or plot_dir or any(map(is_baseline, plan.modes))):
        raise ConfigError("--arrivals poisson: writes --json only, and takes no baselines")
    check_outputs(json_path, html_path, directories=(plot_dir, log_dir))
    check_ready(plan)
    logs = log_dir or Path(tempfile.mkdtemp(prefix="vllm-dualpath-bench-"))
    say = _say(Console(stderr=True))
    say(f"logs in {logs}")
    end_like_ctrl_c()
    if online:
        found = search_rates(replace(plan, num_alone=0), rates, limits, logs, say)
        Console().print_json(data=found["highest_agents_per_s"])
        write_json(json_path, found)
        return
    comparison = compare(plan, logs, say, baseline_dir=baseline_dir)
    Console().print(comparison_table(comparison))
    write_json(json_path, comparison_json(comparison))
    if html_path is not None:
        html_path.write_text(comparison_page(comparison), encoding="utf-8")
    if plot_dir is not None:
        plot_dir.mkdir(parents=True, exist_ok=True)
        for name, drawing in comparison_plots(comparison).items():
            (plot_dir / name).write_text(drawing, encoding="utf-8")
    raise typer.Exit(0 if comparison.exact else 1)


def _say(console: Console) -> Say:
    start_s = time.monotonic()
    return lambda line: console.print(f"[{time.monotonic() - start_s:6.1f} s] {line}", markup=False)
