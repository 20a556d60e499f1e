"""Line charts as inline SVG. The SVG holds lines alone and stretches with its box; every text stands beside it in HTML,
so that it keeps its size on a phone. See `chart.html.jinja`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 1000, 500  # units of the drawing, no pixels
_DOTTED = 40  # fewer points than this are drawn as dots too


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: `path` through its finite points, `dots` where they are few, `bad` at the steps without a number."""

    label: str
    css: str
    path: str
    dots: str
    bad: str
    points: int


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart as its template draws it. `y_labels` go from the top down at even distances; `x_labels` are (place in
    percent of the width, which end of the text stands there, text)."""

    name: str
    title: str
    text: str
    lines: tuple[Line, ...]
    grid: str
    y_labels: tuple[str, ...]
    x_labels: tuple[tuple[str, str, str], ...]
    width: int = WIDTH
    height: int = HEIGHT


def chart(
    name: str, title: str, text: str, series: Sequence[tuple[str, str, Sequence[tuple[int, float]]]]
) -> Chart | None:
    """The chart of `series`: (label, CSS class, points (step, value)). NaN and infinite values break the line and are
    marked. None where there is not a single point."""
    every = [point for _, _, points in series for point in points]
    if not every:
        return None
    finite = [value for _, value in every if math.isfinite(value)]
    ticks = _ticks(min(finite, default=0.0), max(finite, default=1.0))
    steps = [step for step, _ in every]
    low, high = min(steps), max(steps)

    def x(step: int) -> str:
        return _short((step - low) / (high - low) * WIDTH if high > low else WIDTH / 2)

    def y(value: float) -> str:
        return _short(HEIGHT - (value - ticks[0]) / (ticks[-1] - ticks[0]) * HEIGHT)

    lines = []
    for label, css, points in series:
        path, dots, bad, drawing = [], [], [], False
        for step, value in points:
            if math.isfinite(value):
                path.append(f"{'L' if drawing else 'M'}{x(step)} {y(value)}")
                dots.append(f"M{x(step)} {y(value)}h0")
            else:
                bad.append(f"M{x(step)} 0V{HEIGHT}")
            drawing = math.isfinite(value)
        few = "".join(dots) if len(points) < _DOTTED else ""
        lines.append(Line(label=label, css=css, path="".join(path), dots=few, bad="".join(bad), points=len(points)))
    return Chart(
        name=name,
        title=title,
        text=text,
        lines=tuple(lines),
        grid="".join(f"M0 {y(tick)}H{WIDTH}" for tick in ticks),
        y_labels=tuple(_tick_text(tick, ticks[1] - ticks[0]) for tick in reversed(ticks)),
        x_labels=tuple(_x_label(step, low, high) for step in _step_ticks(low, high)),
    )


def _x_label(step: int, low: int, high: int) -> tuple[str, str, str]:
    place = 50.0 if low == high else 100 * (step - low) / (high - low)
    return _short(place), {0.0: "start", 100.0: "end"}.get(place, "middle"), f"{step:,}"


def _step_ticks(low: int, high: int) -> list[int]:
    """The first and the last step, and round ones between them."""
    rough = max(1.0, (high - low) / 7)
    power = 10 ** math.floor(math.log10(rough))
    every = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    between = range(low - low % every + every, high, every)
    return [
        low,
        *(step for step in between if 2 * min(step - low, high - step) > every),
        *([high] if high > low else []),
    ]


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values from at or below `low` to at or above `high`; from zero where that is near."""
    if low > 0 and low < 0.5 * high:
        low = 0.0
    if high <= low:
        around = abs(low) / 2 or 0.5
        low, high = low - around, high + around
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_text(tick: float, step: float) -> str:
    """With as many decimals as the ticks differ in; powers of ten where that would be long."""
    if tick == 0 or abs(tick) < step / 1e6:
        return "0"
    if abs(tick) >= 1e6 or step < 1e-3:
        mantissa, exponent = f"{tick:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{tick:,.{max(0, 1 - math.floor(math.log10(step)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def points(curve: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """The points of one field of a curve (see `curves.curve`)."""
    return [(point["step"], float(point[name])) for point in curve["points"] if name in point]
