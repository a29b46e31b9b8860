"""A comparison as one HTML file that needs no other, and as a terminal's table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.table import Table

from vllm_dualpath.bench.comparison.measures import Run, RunUse
from vllm_dualpath.bench.comparison.plots import (
    Bar,
    Line,
    bars,
    cumulative,
    lines,
    standalone,
)
from vllm_dualpath.bench.comparison.record import (
    Comparison,
    TopologyResult,
    comparison_json,
    median,
)
from vllm_dualpath.bench.comparison.settings import BASE_MODE
from vllm_dualpath.bench.testbed.layout import rate_text

_COLOURS = {
    "prefill_only": "#8c8c8c",
    "dual": "#3b75af",
    "split": "#519e3e",
    "pool": "#c4582f",
    "oracle": "#b8a04a",
    "nixl": "#6d5a9c",
    "nixl_lmcache": "#a05c8e",
    "nixl_mooncake": "#4a9a94",
}
_ROLES = {"prefill": "#b03a2e", "decode": "#2e6da4"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;"
    "border-bottom:1px solid #ddd}figure{margin:1.2em 0}figcaption{font-weight:600}"
    "svg text{font:12px system-ui,sans-serif}"
)
_COLUMNS = (
    "topology", "mode", "JCT s", "ratio", "ideal", "bound", "TTFT p50 s", "TTST p50 s",
    "TPOT p50 ms", "alone TTFT s", "storage NICs busy", "max/mean", "CPU cores",
)  # fmt: skip


def comparison_table(comparison: Comparison) -> Table:
    """A row for each topology and mode."""
    table = Table(title="bench cluster", caption=_verdict(comparison))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _COLUMNS[:2] else "right")
    for row in _rows(comparison):
        table.add_row(*row)
    return table


def comparison_page(comparison: Comparison) -> str:
    """The HTML report."""
    sections = "".join(_section(comparison, found) for found in comparison.topologies)
    record = comparison_json(comparison)
    title = "Storage NICs of prefill and decode nodes: read modes beside each other"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(_question(comparison))}"
        f"</p><p>{escape(_verdict(comparison))}</p>{_html_table(_COLUMNS, _rows(comparison))}"
        f"{sections}{_regime(record)}</body></html>\n"
    )


def comparison_plots(comparison: Comparison) -> dict[str, str]:
    """Drawings for another page, by file name: JCT, and the storage NICs mode by mode."""
    files = {}
    for found in comparison.topologies:
        figures = {"jct": _jct_bars(comparison, found)}
        for mode in found.modes:
            figures[f"{mode}-storage"] = _nic_plot(found, mode, found.of(mode)[0], "storage")
        for name, figure in figures.items():
            files[f"{found.topology}-{name}.svg".lower()] = standalone(figure)
    return files


def _question(comparison: Comparison) -> str:
    plan = comparison.plan
    return (
        f"{plan.agents} agents, {plan.turns} turns each, contexts of {plan.context} tokens in the"
        f" store before the first turn, {plan.append.low}-{plan.append.high} tokens a turn,"
        f" answers of {plan.generate}; {plan.bytes_per_token // 1024} KiB of KV a token; storage"
        f" NICs {rate_text(plan.storage_rate)}, compute NICs {rate_text(plan.compute_rate)};"
        f" {plan.repeats} interleaved repeats, medians; seed {plan.seed}; vLLM's prefix caching"
        f" {'on' if plan.prefix_caching else 'off'}. Bytes and shares are the kernel's counters."
    )


def _verdict(comparison: Comparison) -> str:
    compared = "plain vLLM's" if comparison.reference else "those of the first run"
    exact = f"every answer equals {compared}" if comparison.exact else f"NOT all equal {compared}"
    failures = [line for found in comparison.topologies for line in found.failures]
    failed = sum(run.result.num_failed for run in comparison.runs)
    return (
        f"exact: {exact}, token by token ({len(comparison.runs)} runs, {failed} requests failed)"
        + {None: "", True: "; the baselines' too", False: "; NOT all of the baselines'"}[
            comparison.baselines_exact
        ]
        + "".join(f"; no run: {line.splitlines()[0]}" for line in failures)
    )


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows = [_row(found, mode) for found in comparison.topologies for mode in found.modes]
    if comparison.reference is not None:
        rows.append(_oracle_row(comparison.reference))
    return rows


def _row(found: TopologyResult, mode: str) -> tuple[str, ...]:
    runs = found.of(mode)
    uses = [RunUse(run, found.spec) for run in runs]
    return (
        str(found.topology),
        mode,
        _number(median(run.result.jct_s for run in runs), ".1f"),
        _number(found.ratio(mode), ".2f"),
        _number(found.topology.ideal, ".2f"),
        _number(found.bound(), ".2f"),
        *_latencies(runs),
        _number(median(time for run in runs for time in run.alone_ttft_s), ".2f"),
        _number(median(use.steady_read_share() for use in uses), ".0%"),
        _number(median(use.balance() for use in uses), ".2f"),
        _number(median(use.cpu_busy_cores()[0] for use in uses), ".2f"),
    )


def _oracle_row(run: Run) -> tuple[str, ...]:
    jct = _number(run.result.jct_s, ".1f")
    return ("one engine", "oracle", jct, "", "", "", *_latencies([run]), "", "", "", "")


def _latencies(runs: Sequence[Run]) -> tuple[str, str, str]:
    done = [completion for run in runs for completion in run.result.completions]
    per_token = median(completion.tpot_s for completion in done)
    return (
        _number(median(completion.ttft_s for completion in done), ".2f"),
        _number(median(completion.ttst_s for completion in done), ".3f"),
        _number(None if per_token is None else 1e3 * per_token, ".0f"),
    )


def _section(comparison: Comparison, found: TopologyResult) -> str:
    first = {mode: found.of(mode)[0] for mode in found.modes}
    plots = [_jct_bars(comparison, found), _ttft_plot(first)]
    for mode, run in first.items():
        plots += [_nic_plot(found, mode, run, "storage"), _nic_plot(found, mode, run, "compute")]
    plots.append(_balance_bars(found))
    rest = "".join(f"<li>{escape(line)}</li>" for line in what_eats_the_rest(found))
    return f"<h2>{found.topology}</h2><ul>{rest}</ul>{''.join(plots)}"


def what_eats_the_rest(found: TopologyResult) -> list[str]:
    """Of each mode's time: what the bytes read need at the NICs' full rate, and what else there is.

    Empty where the NICs are not shaped.
    """
    rate, num_nics = found.spec.storage_rate, len(found.spec.engine_nodes())
    if rate is None:
        return []
    lines = []
    for mode in found.modes:
        run = found.of(mode)[0]
        use, steady = RunUse(run, found.spec), run.steady
        reading_s = use.read_bytes() * 8 / (rate * num_nics)
        before_s, after_s = steady.start_s - run.start_s, run.whole.end_s - steady.end_s
        share = use.steady_read_share()
        lines.append(
            f"{mode}: {run.result.jct_s:.1f} s. All storage NICs together at their full rate would"
            f" have read its bytes in {reading_s:.1f} s; they were busy {_number(share, '.0%')} of"
            f" the steady part's {steady.length_s:.1f} s. The rest is the {before_s:.1f} s before"
            f" it and {after_s:.1f} s after it: agents begin together and end one by one, and"
            " the last read, prompt and answer of each overlap with nobody's."
        )
    return lines


def _jct_bars(comparison: Comparison, found: TopologyResult) -> str:
    shown = []
    for mode in found.modes:
        jct_s = statistics.median(run.result.jct_s for run in found.of(mode))
        ratio = _number(found.ratio(mode), ".2f")
        shown.append(Bar(mode, jct_s, f"{jct_s:.1f} s, {ratio}x", _COLOURS[mode]))
    if comparison.reference is not None:
        jct_s = comparison.reference.result.jct_s
        shown.append(Bar("oracle", jct_s, f"{jct_s:.1f} s", _COLOURS["oracle"]))
    base = statistics.median(run.result.jct_s for run in found.of(BASE_MODE))
    marks = {f"ideal, 1/{found.topology.ideal:.3g}": base / found.topology.ideal}
    return bars("Job completion time", shown, marks)


def _ttft_plot(first: dict[str, Run]) -> str:
    shown = [
        Line(mode, cumulative([c.ttft_s for c in run.result.completions]), _COLOURS[mode])
        for mode, run in first.items()
    ]
    return lines("Time to first token, cumulative share", shown, ("seconds", "share"), top=1.0)


def _nic_plot(found: TopologyResult, mode: str, run: Run, network: Any) -> str:
    """The picture of the paper's Figure 1: prefill NICs full and decode NICs idle, or both full."""
    rate = found.spec.rate(network)
    shown = []
    for use in RunUse(run, found.spec).nics(network):
        scale = 8e6 / rate if rate else 1.0
        points = [
            (second, max(received, sent) * scale)
            for second, received, sent in use.series
            if 0 <= second <= run.result.jct_s + 1
        ]
        role = use.nic.node.split("-")[0]
        shown.append(Line(use.nic.node, points, _ROLES[role]))
    steady = run.steady
    spans = [(steady.start_s - run.start_s, steady.end_s - run.start_s)]
    unit = "of its rate" if rate else "MB/s"
    return lines(
        f"{mode}: {network} NICs, {unit} (busier direction; the steady part shaded)",
        shown,
        ("seconds", "share" if rate else "MB/s"),
        top=1.05 if rate else None,
        spans=spans,
    )


def _balance_bars(found: TopologyResult) -> str:
    shown = []
    for mode in found.modes:
        value = statistics.median(RunUse(run, found.spec).balance() for run in found.of(mode))
        shown.append(Bar(mode, value, f"{value:.2f}", _COLOURS[mode]))
    return bars("Bytes read through one storage NIC, most over mean (1: balanced)", shown)


def _regime(record: dict[str, Any]) -> str:
    rows = [
        (topology, name.replace("_", " "), _number(value, ".4g"))
        for topology, values in record["regime"].items()
        for name, value in values.items()
    ]
    machine = ", ".join(f"{key}: {value}" for key, value in record["machine"].items())
    table = _html_table(("topology", "measured", ""), rows)
    return f"<h2>The regime, as measured</h2>{table}<p>{escape(machine)}</p>"


def _html_table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
