"""A plan as a terminal's table and as one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from rich.table import Table

from vllm_dualpath.sim.plan import Cell, Plan
from vllm_dualpath.sim.results import Summary

_COLUMNS = ("P", "D", "mode", "JCT s", "turns/s", "TTFT s", "p99", "TPOT ms", "p99", "binds at")
_COLOURS = {"prefill_only": "#8c8c8c", "dual": "#3b75af", "split": "#519e3e", "pool": "#c4582f"}


def plan_table(plan: Plan) -> Table:
    """Every cell; the best split of each mode is marked with a star."""
    table = Table(title=_title(plan), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("mode", "binds at") else "right")
    for cell in plan.cells:
        star = " *" if cell is plan.best(cell.mode) else ""
        first, *others = _figures(cell)
        table.add_row(first, others[0], others[1] + star, *others[2:])
    return table


def plan_lines(plan: Plan) -> list[str]:
    """What the table's stars and its last column mean, and equation 9's range."""
    least, most = plan.ratios
    return [
        f"P/D from {least:.2f} to {most:.2f}: the storage NICs can all be busy without a compute "
        "NIC or DRAM in their way (the paper's equation 9).",
        "'binds at': the resource that allows fewest turns a second, and how many; a run stays "
        "below it because load varies.",
        f"Best split of each mode (marked * or bold), by {_merit(plan)}: "
        + ", ".join(f"{cell.mode} {_split(cell)}" for cell in _best(plan))
        + ". Splits that are not there would cut a group of engines that share experts.",
        f"Best of all: {_split(plan.best_of_all)} with {plan.best_of_all.mode}.",
    ]


def _split(cell: Cell) -> str:
    return f"{cell.prefill_nodes}P{cell.decode_nodes}D"


def _merit(plan: Plan) -> str:
    offline = plan.config.agents is not None
    return "job completion time (JCT)" if offline else "mean time to first token (TTFT)"


def plan_page(plan: Plan) -> str:
    """The HTML: what was asked, bars for JCT, TTFT and TPOT, the table, how to read it."""
    offline = plan.config.agents is not None
    charts = [
        *([("Job completion time, s", lambda c: c.result.job_s)] if offline else []),
        ("Mean time to first token, s", lambda c: Summary.of(c.result.first_token_s).mean),
        (
            "99th percentile of the time to first token, s",
            lambda c: Summary.of(c.result.first_token_s).p99,
        ),
        ("Mean time per output token, ms", lambda c: Summary.of(c.result.per_token_s).mean * 1e3),
        ("Turns served a second", lambda c: c.turns_per_s),
    ]
    body = "\n".join(_chart(plan, title, value) for title, value in charts)
    lines = "".join(f"<p>{escape(line)}</p>" for line in plan_lines(plan))
    title = escape(_title(plan))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(_question(plan))}</p>"
        f"{_legend(plan)}{body}<h2>All splits</h2>{_html_table(plan)}{lines}</body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;"
    "border-bottom:1px solid #ddd}.key{margin-right:1.5em}.best{font-weight:bold}"
    "svg text{font:12px system-ui,sans-serif}"
)


def _title(plan: Plan) -> str:
    return (
        f"{plan.num_nodes} nodes for {plan.config.model}, {_load(plan)}, trace {plan.config.trace}"
    )


def _load(plan: Plan) -> str:
    config = plan.config
    if config.agents is not None:
        return f"{config.agents} agents, all at once"
    return f"{config.agents_per_s} new agents a second for {config.duration_s:.0f} s"


def _question(plan: Plan) -> str:
    config = plan.config
    return (
        f"How to split {plan.num_nodes} nodes into prefill (P) and decode (D) nodes, simulated for "
        f"{_load(plan)}, on trace {config.trace}, {config.tool_time_s:g} s between turns. "
        "Each mode says who reads stored KV: prefill_only the prefill node, dual one of the two "
        "sides, split both, pool any node."
    )


def _best(plan: Plan) -> list[Cell]:
    return [plan.best(mode) for mode in dict.fromkeys(cell.mode for cell in plan.cells)]


def _figures(cell: Cell) -> tuple[str, ...]:
    first, token = Summary.of(cell.result.first_token_s), Summary.of(cell.result.per_token_s)
    tightest = cell.bounds[0]
    return (
        str(cell.prefill_nodes),
        str(cell.decode_nodes),
        cell.mode,
        f"{cell.result.job_s:,.0f}",
        f"{cell.turns_per_s:,.1f}",
        f"{first.mean:.2f}",
        f"{first.p99:.2f}",
        f"{token.mean * 1e3:.1f}",
        f"{token.p99 * 1e3:.1f}",
        f"{tightest.resource}, {tightest.turns_per_s:,.0f}/s",
    )


def _legend(plan: Plan) -> str:
    modes = dict.fromkeys(cell.mode for cell in plan.cells)
    square = '<span style="color:{}">&#9632;</span>'
    keys = (
        f'<span class="key">{square.format(_colour(mode))} {escape(mode)}</span>' for mode in modes
    )
    return f"<p>{''.join(keys)}</p>"


def _colour(mode: str) -> str:
    return _COLOURS.get(mode, "#222222")


def _chart(plan: Plan, title: str, value: Callable[[Cell], float]) -> str:
    """Horizontal bars, grouped by split, each with its number."""
    most = max((value(cell) for cell in plan.cells), default=0.0) or 1.0
    bars, top, previous = [], 0, None
    for cell in plan.cells:
        split = (cell.prefill_nodes, cell.decode_nodes)
        if split != previous:
            top += 8
            bars.append(f'<text x="0" y="{top + 12}">{split[0]}P{split[1]}D</text>')
            previous = split
        amount = value(cell)
        width = 480 * amount / most
        bars.append(
            f'<rect x="60" y="{top}" width="{width:.1f}" height="14" fill="{_colour(cell.mode)}">'
            f"<title>{escape(cell.mode)}</title></rect>"
            f'<text x="{66 + width:.1f}" y="{top + 12}">{amount:,.2f}</text>'
        )
        top += 17
    return f'<h2>{escape(title)}</h2><svg width="640" height="{top + 4}">{"".join(bars)}</svg>'


def _html_table(plan: Plan) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    return f"<table><tr>{head}</tr>{''.join(_html_row(plan, cell) for cell in plan.cells)}</table>"


def _html_row(plan: Plan, cell: Cell) -> str:
    style = ' class="best"' if cell is plan.best(cell.mode) else ""
    figures: Sequence[str] = _figures(cell)
    return f"<tr{style}>{''.join(f'<td>{escape(figure)}</td>' for figure in figures)}</tr>"
