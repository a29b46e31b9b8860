"""A profile for people: progress while it is made, a table after it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_dualpath.bench.profiling.run import Measured, measure_profile
from vllm_dualpath.profile import FittedCurve

POOR_ERROR = 0.25
POOR_R2 = 0.8
"""Median error and least R² of a curve that should not be used."""


def profile_with_progress(
    model: str,
    store: str | None,
    seconds: float,
    block_tokens: int | None,
    engine_args: Sequence[str],
    console: Console,
) -> Measured:
    """``measure_profile`` behind a progress bar on ``console``."""
    with Progress(console=console) as bar:
        task = bar.add_task("", total=1.0)
        return measure_profile(
            model,
            store,
            seconds,
            block_tokens,
            engine_args,
            lambda what, share: bar.update(task, description=what, completed=share),
        )


def profile_table(measured: Measured) -> Table:
    """Both curves; alpha and beta in the caption."""
    profile = measured.profile
    table = Table(
        title=f"{profile.model} on {profile.device}, vLLM {profile.vllm}", caption=_rates(measured)
    )
    table.add_column("seconds of", no_wrap=True)
    for name in ("a step, ms", "a token, µs", "a token pair, ns", "R²", "median error"):
        table.add_column(name, justify="right")
    _add(table, "its attention", profile.attention)
    _add(table, "a whole step", profile.step)
    return table


def fit_warning(measured: Measured) -> str | None:
    """A sentence for curves that predict badly: a quota filled by them would be any length."""
    curves = (measured.profile.attention, measured.profile.step)
    worst, r2 = max(curve.median_error for curve in curves), min(curve.r2 for curve in curves)
    if worst <= POOR_ERROR and r2 >= POOR_R2:
        return None
    return (
        f"the curves are poor: half of all steps are off by more than {100 * worst:.0f} %, R² is"
        f" {r2:.2f} (expected at most {100 * POOR_ERROR:.0f} % and at least {POOR_R2:g}); measure"
        " on an idle machine, for more --seconds, with the model length that is served"
    )


def _add(table: Table, name: str, curve: FittedCurve) -> None:
    table.add_row(
        name,
        f"{1e3 * curve.step_s:.3f}",
        f"{1e6 * curve.token_s:.3f}",
        f"{1e9 * curve.token_pair_s:.4f}",
        f"{curve.r2:.4f}",
        f"{100 * curve.median_error:.1f} %",
    )


def _rates(measured: Measured) -> str:
    profile, reading = measured.profile, measured.reading
    lines = [
        f"{profile.step.num_samples} steps; beta {profile.beta_tokens:,.0f} tokens computed in 5 s"
    ]
    if reading is None:
        lines.append("alpha was not measured: no --store")
    else:
        lines.append(
            f"alpha {profile.alpha_tokens:,.0f} tokens read in 3 s"
            f" ({reading.bytes_per_s / 1e6:,.0f} MB/s)"
        )
        if not reading.is_direct:
            lines.append("the store allows no direct I/O: alpha may be the page cache's")
    return "\n".join(lines)
