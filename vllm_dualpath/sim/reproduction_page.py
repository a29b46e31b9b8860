"""The rows of a reproduction as a terminal's table and as the one in ``docs/reproduction.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.reproduce import Figures, Row

_BEGIN = "<!-- made by vllm-dualpath simulate --reproduce: begin -->"
_END = "<!-- made by vllm-dualpath simulate --reproduce: end -->"


def row_table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    table = Table(title="The paper's figures and ours", title_justify="left")
    for column in ("figure", "what", "half"):
        table.add_column(column)
    for column in ("paper", "ours", "off by"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def update_page(path: Path, rows: Sequence[Row], short: bool) -> None:
    """Put the rows between the page's two marks; its other text is written by hand."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"page {path}: cannot be read ({exc})") from exc
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(f"page {path}: expected the marks {_BEGIN!r} and {_END!r} in it")
    path.write_text(f"{before}{_BEGIN}\n{_markdown(rows, short)}{_END}{after}", encoding="utf-8")


def _markdown(rows: Sequence[Row], short: bool) -> str:
    command = "vllm-dualpath simulate --reproduce" + (" --short" if short else "")
    lines = [
        f"Made by `{command} --page docs/reproduction.md`.",
        "",
        "| figure | what | half | paper | ours | off by |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    half = "held out" if row.held_out else "development"
    deviation = row.deviation()
    off = "-" if deviation is None else f"{deviation:.1%}"
    paper = _figures(row.paper, row.unit) if row.paper else "not in our notes"
    return row.figure, row.what, half, paper, _figures(row.ours, row.unit), off


def _figures(figures: Figures, unit: str) -> str:
    numbers = " to ".join(_number(figure) for figure in figures)
    return f"{numbers} {unit}" if unit not in ("", "x") else numbers


def _number(figure: float) -> str:
    return (
        f"{figure:,.0f}"
        if figure >= 1000
        else f"{figure:.3g}"
        if figure >= 100
        else f"{figure:.3f}"
    )
