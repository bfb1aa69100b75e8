"""Line charts side by side as one SVG file, without a library; readable on any background."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 300, 58, 16, 34, 46  # of a panel, pixels
INK, GRID = "#24292f", "#d8dee4"


@dataclass(frozen=True)
class Curve:
    """points: (x, y). name: in the legend; without one it is drawn faintly."""

    points: list[tuple[float, float]]
    color: str
    width: float
    name: str = ""


@dataclass(frozen=True)
class Panel:
    x_title: str
    y_title: str
    curves: list[Curve]


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from `low` to `high`."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(power * f for f in (0.1, 0.2, 0.5, 1, 2) if span / (power * f) <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def panel(shown: Panel, left: float) -> list[str]:
    """The elements of one panel whose left edge is at `left`."""
    xs, ys = zip(*(point for curve in shown.curves for point in curve.points), strict=True)
    low, high = min(0.0, *xs), max(xs) or 1.0
    bottom, top = min(0.0, *ys), max(1.0, *ys)
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low) / (high - low), (y - bottom) / (top - bottom)
        return x0 + across * (x1 - x0), y0 + up * (y1 - y0)

    out = []
    for value in ticks(bottom, top):
        y = place(low, value)[1]
        out.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="{GRID}"/>')
        out.append(text(x0 - 6, y + 4, f"{value:g}", "end"))
    for value in ticks(low, high):
        x = place(value, bottom)[0]
        out.append(f'<path d="M{x:.1f} {y0}v4" stroke="{INK}"/>')
        out.append(text(x, y0 + 17, f"{value:g}"))
    out.append(f'<path d="M{x0} {y0}H{x1}" stroke="{INK}"/>')
    out.append(text((x0 + x1) / 2, HEIGHT - 10, shown.x_title))
    middle = (y0 + y1) / 2
    turned = f'transform="rotate(-90 {left + 14:.1f} {middle:.1f})"'
    out.append(text(left + 14, middle, shown.y_title, more=turned))
    named = [curve for curve in shown.curves if curve.name]
    for curve in sorted(shown.curves, key=lambda curve: curve.width):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve.points)
        look = f'fill="none" stroke="{curve.color}" stroke-width="{curve.width:g}"'
        faint = "" if curve.name else ' stroke-opacity="0.55"'
        out.append(f'<polyline points="{line}" {look} stroke-linejoin="round"{faint}/>')
    for number, curve in enumerate(named):
        x, y = x0 + 8 + 80 * number, TOP - 16
        out.append(f'<path d="M{x} {y}h20" stroke="{curve.color}" stroke-width="{curve.width:g}"/>')
        out.append(text(x + 26, y + 4, curve.name, "start"))
    return out


def draw(panels: list[Panel]) -> str:
    """The file's text: the panels from left to right, on white."""
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    box = f'viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    font = f'font-family="sans-serif" font-size="12" fill="{INK}"'
    parts = [part for i, shown in enumerate(panels) for part in panel(shown, i * WIDTH)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} {font}>'
    return (
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"])
        + "\n"
    )
