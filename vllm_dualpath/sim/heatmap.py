"""A sweep as heat maps: one SVG a mode, one panel a metric."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vllm_dualpath.sim.sweep import SweepCell

_WIDTH, _HEIGHT, _LEFT, _TOP = 58, 20, 150, 74
_PANELS = {
    "ttft_p50": "TTFT, median",
    "ttft_p99": "TTFT, 99th percentile",
    "tpot": "TPOT, mean",
    "job": "JCT offline, an agent's time online",
    "staged": "time until the hit is staged, mean",
}


def heat_map(cells: Sequence[SweepCell], mode: str, base: str) -> str:
    """Ratios of ``mode`` over ``base``; a framed cell is worse with 95 % confidence."""
    chosen = [cell for cell in cells if cell.mode == mode]
    rows = list(dict.fromkeys(_row(cell) for cell in chosen))
    columns = list(dict.fromkeys(_column(cell) for cell in chosen))
    height = _TOP + _HEIGHT * len(rows) + 24
    width = _LEFT + _WIDTH * len(columns) + 10
    parts = [
        _panel(chosen, metric, f"{mode} over {base}: {title}", rows, columns, height * index)
        for index, (metric, title) in enumerate(_PANELS.items())
    ]
    total = height * len(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" '
        f'font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{total}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _row(cell: SweepCell) -> str:
    key = cell.key
    return f"{key.nodes[0]}P{key.nodes[1]}D {key.trace} tool {key.tool_time_s:g} s"


def _column(cell: SweepCell) -> str:
    key = cell.key
    load = "offline" if key.load is None else f"load {key.load:g}"
    return f"append x{key.append_scale:g}|{load}"


def _panel(
    cells: Sequence[SweepCell],
    metric: str,
    title: str,
    rows: list[str],
    columns: list[str],
    top: int,
) -> str:
    parts = [f'<text x="4" y="{top + 16}" font-size="14">{escape(title)}</text>']
    for index, column in enumerate(columns):
        x = _LEFT + _WIDTH * index + _WIDTH / 2
        for line, text in enumerate(column.split("|")):
            y = top + _TOP - 28 + 13 * line
            parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    for index, row in enumerate(rows):
        y = top + _TOP + _HEIGHT * index + 14
        parts.append(f'<text x="4" y="{y}">{escape(row)}</text>')
    for cell in cells:
        x = _LEFT + _WIDTH * columns.index(_column(cell))
        y = top + _TOP + _HEIGHT * rows.index(_row(cell))
        parts.append(_square(cell, metric, x, y))
    return "".join(parts)


def _square(cell: SweepCell, metric: str, x: int, y: int) -> str:
    comparison = cell.comparisons[metric]
    frame = ' stroke="#b00020" stroke-width="2"' if comparison.is_worse else ""
    middle = f'<text x="{x + _WIDTH / 2}" y="{y + 14}" text-anchor="middle">'
    note = (
        f"{cell.key.label()}: {comparison.ratio:.3f} ({comparison.low:.3f} to "
        f"{comparison.high:.3f}); binds: {cell.binds}"
    )
    return (
        f'<g><title>{escape(note)}</title><rect x="{x + 1}" y="{y + 1}" width="{_WIDTH - 2}" '
        f'height="{_HEIGHT - 2}" fill="{_colour(comparison.ratio)}"{frame}/>'
        f"{middle}{comparison.ratio:.2f}</text></g>"
    )


def _colour(ratio: float) -> str:
    """White at 1, green below, orange above, full at half and at double."""
    strength = min(1.0, abs(1.0 - ratio) / 0.5)
    full = (90, 174, 97) if ratio < 1 else (230, 120, 60)
    mixed = (round(255 + (channel - 255) * strength) for channel in full)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
