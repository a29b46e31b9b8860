"""What was measured, as ratios with their intervals: for programs, and as a table."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_dualpath.bench.mover.pairing import paired_ratio
from vllm_dualpath.bench.router.processes import INSTALL
from vllm_dualpath.bench.router.run import (
    DIRECT,
    OURS,
    OURS_HITS,
    THEIRS,
    Cell,
    Measured,
    Plan,
    Turn,
    measure,
)

GOAL = 2.0
"""Added latency and CPU a request, ours over theirs, in every cell."""


def measure_with_progress(plan: Plan, console: Console) -> Measured:
    """``measure`` behind a progress bar on ``console`` (silent where it is no terminal)."""
    columns = (TextColumn("bench router"), BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, auto_refresh=False) as progress:
        task = progress.add_task("", total=plan.rounds * len(plan.cells) * 4)
        return measure(plan, lambda: progress.update(task, advance=1, refresh=True))


def make_record(measured: Measured) -> dict[str, Any]:
    """Plain types: every cell's medians, ratios and samples, and the machine."""
    return {
        "goal": GOAL,
        "mode": measured.plan.mode,
        "transfer_all": measured.plan.transfer_all,
        "machine": measured.machine,
        "outcomes": measured.outcomes,
        "hit_tokens": measured.hit_tokens,
        "missing": {} if measured.has_theirs else {THEIRS: INSTALL},
        "cells": [_cell_record(cell, turns) for cell, turns in measured.turns.items()],
    }


def _cell_record(cell: Cell, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    direct_s = [turn.p50_s for turn in turns[DIRECT]]
    added_s = {
        name: [turn.p50_s - base_s for turn, base_s in zip(each, direct_s, strict=True)]
        for name, each in turns.items()
    }
    cpu = {name: [turn.cpu_s for turn in each] for name, each in turns.items()}
    record: dict[str, Any] = {
        "kind": cell.kind,
        "num_tokens": cell.num_tokens,
        "connections": cell.num_connections,
        "direct_p50_ms": 1e3 * median(direct_s),
        "variants": {
            name: {
                "added_ms": 1e3 * median(added_s[name]),
                "cpu_ms": 1e3 * median(cpu[name]),
                "requests_per_s": median(turn.requests_per_s for turn in turns[name]),
                "added_ms_samples": [1e3 * value for value in added_s[name]],
                "cpu_ms_samples": [1e3 * value for value in cpu[name]],
            }
            for name in turns
            if name != DIRECT
        },
        "ratios": {},
    }
    if THEIRS in turns:
        for name in (OURS, OURS_HITS):
            record["ratios"][name] = {
                "latency": paired_ratio(added_s[name], added_s[THEIRS]).to_json(),
                "cpu": paired_ratio(cpu[name], cpu[THEIRS]).to_json(),
            }
    return record


def within_goal(record: dict[str, Any]) -> bool:
    """Whether every measured ratio without hits keeps it; with nothing to compare there is none."""
    return all(
        ratio["median"] <= GOAL
        for cell in record["cells"]
        for ratio in cell["ratios"].get(OURS, {}).values()
    )


def result_table(record: dict[str, Any]) -> Table:
    """A row a cell: what each router adds, and ours over theirs."""
    table = Table(title="bench router", caption=_caption(record), caption_justify="left")
    table.add_column("prompt")
    for name in ("conn.", "direct, ms", "added, ms: theirs", "ours", "hits", "ratio"):
        table.add_column(name, justify="right")
    for name in ("CPU, ms: theirs", "ours", "hits", "ratio"):
        table.add_column(name, justify="right")
    for cell in record["cells"]:
        table.add_row(*_row(cell))
    return table


def _row(cell: dict[str, Any]) -> list[str]:
    variants, ratios = cell["variants"], cell["ratios"].get(OURS, {})

    def figures(name: str) -> list[str]:
        found = [variants.get(variant) for variant in (THEIRS, OURS, OURS_HITS)]
        return ["-" if each is None else f"{each[name]:.2f}" for each in found]

    return [
        f"{cell['num_tokens']} {cell['kind']}",
        str(cell["connections"]),
        f"{cell['direct_p50_ms']:.2f}",
        *figures("added_ms"),
        _ratio(ratios.get("latency")),
        *figures("cpu_ms"),
        _ratio(ratios.get("cpu")),
    ]


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _outcomes(record: dict[str, Any]) -> str:
    served = ((name, number) for name, number in record["outcomes"].items() if number)
    return ", ".join(f"{name} {number}" for name, number in served)


def _caption(record: dict[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"added: median latency over the engine asked directly; goal: ratios up to {GOAL:.0f}",
        f"mode {record['mode']}; requests by outcome: {_outcomes(record)}",
        f"vllm-router {machine['vllm_router']}; {machine['cpu']},"
        f" {machine['cpus']} CPUs, cores {machine['cores']}; {machine['took_s']:.0f} s,"
        f" {machine['steal_share']:.0%} of the CPU time stolen by the hypervisor",
    ]
    lines += [f"missing: {name}: {how}" for name, how in record["missing"].items()]
    return "\n".join(lines)
