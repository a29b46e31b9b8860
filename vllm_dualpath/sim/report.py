"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vllm_dualpath.sim.results import SimulationResult, Summary
from vllm_dualpath.sim.sweep import METRICS, SweepCell


def result_table(result: SimulationResult) -> Table:
    """Latencies of one run, and how its storage NICs were used."""
    config = result.config
    load = f"{config.agents} agents" if config.agents else f"{config.agents_per_s} agents a second"
    title = (
        f"{config.model} {config.prefill_nodes}P{config.decode_nodes}D, {config.mode}: {load}, "
        f"trace {config.trace}, seed {config.seed}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("simulated")
    for column in ("mean", "p50", "p99", "values"):
        table.add_column(column, justify="right")
    for name, values in (
        ("TTFT, s", result.first_token_s),
        ("TTST, s", result.second_token_s),
        ("TPOT, s", result.per_token_s),
        ("hit staged after placement, s", result.staged_s),
        ("wait for placement, s", result.waiting_s),
        ("agent, s", result.agent_s),
    ):
        summary = Summary.of(values)
        figures = (summary.mean, summary.p50, summary.p99)
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), f"{summary.count:,}")
    return table


def result_lines(result: SimulationResult) -> list[str]:
    """What is one number a run."""
    counts, shares = result.counts, result.busy_share()
    num_prefill = result.config.prefill_nodes
    sides = (shares[:num_prefill], shares[num_prefill:])
    busy = " / ".join(f"{sum(side) / len(side):.0%}" for side in sides)
    lines = [
        f"JCT {result.job_s:,.1f} s; {counts['turns']:,} turns of "
        f"{counts['finished_agents']:,} finished agents",
        f"storage NICs busy (prefill / decode) {busy}; max/mean over 10 s "
        f"{result.storage_balance(10.0):.3f}; attention max/mean {result.attention_balance:.3f}",
        f"tokens read {counts['read_tokens']:,}, computed {counts['computed_tokens']:,}, "
        f"generated {counts['generated_tokens']:,}, persisted {counts['persisted_tokens']:,}",
    ]
    if counts["repeated_turns"] or counts["impossible_turns"]:
        lines.append(
            f"turns repeated because a node died {counts['repeated_turns']:,}, "
            f"turns that fit no engine {counts['impossible_turns']:,}"
        )
    return lines


def sweep_table(cells: Sequence[SweepCell], mode: str) -> Table:
    """Of each metric the best, the middle and the worst cell, and where the mode is worse."""
    table = Table(title=f"{mode} over dual, {len(cells)} cells", title_justify="left")
    table.add_column("metric")
    for column in ("least", "median", "most", "worse cells"):
        table.add_column(column, justify="right")
    table.add_column("the worst of them")
    for name in METRICS:
        ratios = [cell.comparisons[name].ratio for cell in cells]
        ordered = [cells[i] for i in sorted(range(len(cells)), key=ratios.__getitem__)]
        worse = [cell for cell in ordered if cell.comparisons[name].is_worse]
        picked = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        figures = (f"{cell.comparisons[name].ratio:.3f}" for cell in picked)
        last = f"{worse[-1].key.label()} ({worse[-1].binds})" if worse else ""
        table.add_row(name, *figures, str(len(worse)), last)
    return table
