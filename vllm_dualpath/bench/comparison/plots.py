"""Plots as SVG text: bars, lines over time, cumulative shares. Knows numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _BOTTOM = 640.0, 64.0, 80.0, 34.0
_BAR, _GAP = 20.0, 8.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its name, length, what is written at its end."""

    name: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its name and points."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def bars(title: str, shown: Sequence[Bar], marks: Mapping[str, float] | None = None) -> str:
    """Horizontal bars from zero; ``marks`` are dashed lines across, by name."""
    marks = marks or {}
    most = max([*(bar.value for bar in shown), *marks.values()], default=0.0) or 1.0
    left, scale = 110.0, (_WIDTH - 110.0 - _RIGHT) / most
    parts = []
    for idx, bar in enumerate(shown):
        top, width = idx * (_BAR + _GAP), bar.value * scale
        parts.append(_text(left - 6, top + 15, bar.name, "end"))
        parts.append(
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{bar.colour}"/>'
        )
        parts.append(_text(left + width + 5, top + 15, bar.text))
    height = len(shown) * (_BAR + _GAP)
    for name, value in marks.items():
        x = left + value * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#444"'
            ' stroke-dasharray="4 3"/>'
        )
        parts.append(_text(x, height + 14, name, "middle"))
    return _figure(title, height + (22 if marks else 4), parts)


def lines(
    title: str,
    shown: Sequence[Line],
    axes: tuple[str, str],
    *,
    top: float | None = None,
    spans: Sequence[tuple[float, float]] = (),
    height: float = 170.0,
) -> str:
    """Lines over a common axis from zero; ``spans`` are shaded stretches of it."""
    points = [point for line in shown for point in line.points]
    x_most = max((x for x, _ in points), default=0.0) or 1.0
    y_most = top or max((y for _, y in points), default=0.0) or 1.0
    x_scale = (_WIDTH - _LEFT - _RIGHT) / x_most
    y_scale = (height - _BOTTOM - 8) / y_most
    base = height - _BOTTOM

    def at(x: float, y: float) -> str:
        return f"{_LEFT + x * x_scale:.1f},{base - min(y, y_most) * y_scale:.1f}"

    parts = [
        f'<rect x="{_LEFT + start * x_scale:.1f}" width="{(end - start) * x_scale:.1f}" y="8"'
        f' height="{base - 8:.1f}" fill="#f1efe4"/>'
        for start, end in spans
    ]
    parts += _axes(x_most, y_most, base, axes)
    for idx, line in enumerate(shown):
        path = " ".join(at(x, y) for x, y in line.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.5"/>'
        )
        parts.append(_text(_WIDTH - _RIGHT + 4, 18 + 15 * idx, line.name, colour=line.colour))
    return _figure(title, height, parts)


def standalone(figure: str) -> str:
    """The drawing of a figure as an SVG file of its own."""
    start, end = figure.index("<svg"), figure.index("</svg>") + len("</svg>")
    own = ' xmlns="http://www.w3.org/2000/svg" font-family="system-ui,sans-serif" font-size="12"'
    return f"<svg{own}{figure[start + len('<svg') : end]}\n"


def _axes(x_most: float, y_most: float, base: float, axes: tuple[str, str]) -> list[str]:
    right = _WIDTH - _RIGHT
    return [
        f'<line x1="{_LEFT}" x2="{right}" y1="{base}" y2="{base}" stroke="#888"/>',
        f'<line x1="{_LEFT}" x2="{_LEFT}" y1="8" y2="{base}" stroke="#888"/>',
        f'<line x1="{_LEFT}" x2="{right}" y1="8" y2="8" stroke="#ddd"/>',
        _text(_LEFT - 5, 14, f"{y_most:.3g}", "end"),
        _text(_LEFT - 5, base, "0", "end"),
        _text(right, base + 14, f"{x_most:.3g}", "end"),
        _text(_LEFT, base + 14, "0"),
        _text((_LEFT + right) / 2, base + 26, axes[0], "middle"),
        _text(_LEFT - 5, base / 2, axes[1], "end"),
    ]


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points (value, share of values up to it) of a distribution."""
    ordered = sorted(values)
    return [(value, (idx + 1) / len(ordered)) for idx, value in enumerate(ordered)]


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _figure(title: str, height: float, parts: Sequence[str]) -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="{_WIDTH:.0f}"'
        f' role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
