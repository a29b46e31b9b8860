"""Replay results for people: a progress bar while it runs, a table after it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_dualpath.bench.replay import ReplayPlan, ReplayResult, RequestRecord, replay

_LABELS = {
    "ttft_s": "first token (TTFT)",
    "ttst_s": "second token (TTST)",
    "tpot_s": "each token after (TPOT)",
}


async def replay_with_progress(
    url: str, plan: ReplayPlan, model: str | None, console: Console
) -> ReplayResult:
    """``replay`` behind a progress bar on ``console`` (silent where it is no terminal)."""
    columns = (
        TextColumn("replay"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("replay", total=plan.agents * plan.turns, failed=0)
        num_failed = 0

        def advance(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += record.completion is None
            progress.update(task, advance=1, failed=num_failed)

        return await replay(url, plan, model, advance)


def latency_table(result: ReplayResult) -> Table:
    """Latencies in milliseconds; totals in the caption."""
    table = Table(title="Replay", caption=_totals(result))
    table.add_column("ms")
    for name in ("mean", "p50", "p99"):
        table.add_column(name, justify="right")
    for name, summary in result.latencies().items():
        values = (summary.mean, summary.p50, summary.p99) if summary else ()
        table.add_row(_LABELS[name], *(f"{1e3 * value:.1f}" for value in values))
    return table


def _totals(result: ReplayResult) -> str:
    return (
        f"{len(result.records)} requests, {result.num_failed} failed, JCT {result.jct_s:.2f} s\n"
        f"{result.prompt_tokens / result.jct_s:,.0f} prompt and"
        f" {result.output_tokens / result.jct_s:,.0f} generated tokens a second"
    )
