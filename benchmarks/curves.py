"""The curves that benchmarks/learn.py recorded, as tables and as an SVG file."""

import itertools
import math
import statistics
from html import escape
from pathlib import Path

KINDS = {"ours": "here", "peer": "TRL"}
COLORS = {"ours": "#0072b2", "peer": "#d55e00"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 300, 58, 16, 34, 46  # of a panel, pixels
INK, GRID = "#24292f", "#d8dee4"


def runs_of(report: dict) -> dict[str, list[dict]]:
    """The runs of each trainer, a run for each seed."""
    runs = {kind: [run for run in report["runs"] if run["kind"] == kind] for kind in KINDS}
    return {kind: found for kind, found in runs.items() if found}


def steps_of(report: dict) -> str:
    """What a step is, where it is not the demo's own."""
    prompts, updates = report.get("prompts"), report.get("num_minibatches", 1)
    of = f" of {prompts} prompts" if prompts else ""
    return f"steps{of}" + (f", {updates} updates each" if updates > 1 else "")


def reached(points: list[dict], score: str, target: float, by: str) -> float:
    """The seconds or the step (`by`) at which the score first reached `target`, between two
    evaluations on a straight line; infinite if it never did."""
    for i, point in enumerate(points):
        if point[score] >= target:
            before = points[max(0, i - 1)]
            rise = point[score] - before[score]
            share = (target - before[score]) / rise if rise else 1.0
            return before[by] + share * (point[by] - before[by])
    return math.inf


def show(report: dict) -> None:
    """Prints when the target was reached, the score by step, and each metric by tenths of a run."""
    score, target, runs = report["score"], report["target"], runs_of(report)
    for by in ("seconds", "step"):
        medians = []
        for kind, found in runs.items():
            places = [reached(run["held_out"], score, target, by) for run in found]
            medians.append(statistics.median(places))
            each = ", ".join(f"{place:.1f}" for place in places)
            print(f"{KINDS[kind]:5}{score} {target} at {by} {each}, median {medians[-1]:.1f}")
        if len(medians) == 2 and math.isfinite(sum(medians)):
            print(f"TRL's median over ours: {medians[1] / medians[0]:.2f}")
    for kind, found in runs.items():
        steps = [seconds for run in found for seconds in run["columns"]["step_time"][1:]]
        print(f"{KINDS[kind]:5}{statistics.median(steps):.3f} s a step, median")

    print(f"\n{score} by {steps_of(report)}, mean (least to most) over seeds")
    for i, point in enumerate(report["runs"][0]["held_out"]):
        line = f"{point['step']:5}"
        for kind, found in runs.items():
            values = [run["held_out"][i][score] for run in found]
            line += f"   {KINDS[kind]} {statistics.mean(values):.3f}"
            line += f" ({min(values):.3f} to {max(values):.3f})"
        print(line)

    columns = report["runs"][0]["columns"]
    edges = sorted({round(i * len(columns["step_time"]) / 10) for i in range(11)})
    print("\nmeans by tenth of the steps, over seeds")
    for name in columns:
        for kind, found in runs.items():
            line = f"{name:26}{KINDS[kind]:5}"
            for part in itertools.starmap(slice, itertools.pairwise(edges)):
                values = [value for run in found for value in run["columns"][name][part]]
                line += f"{statistics.mean(values):9.3g}"
            print(line)


# ---- the drawing --------------------------------------------------------------------------------


def plot(report: dict, file: Path) -> None:
    """Score by seconds, and by steps: a thin line for each seed, a thick one for the median."""
    panels = []
    for by, title in (("seconds", "seconds of training"), ("step", steps_of(report))):
        curves = []  # points, color, name; thin ones have no name
        for kind, found in runs_of(report).items():
            lines = [[(p[by], p[report["score"]]) for p in run["held_out"]] for run in found]
            middle = [
                tuple(statistics.median(axis) for axis in zip(*points, strict=True))
                for points in zip(*lines, strict=True)
            ]
            curves += [*((line, COLORS[kind], "") for line in lines)]
            curves += [(middle, COLORS[kind], KINDS[kind])]
        held_out = f"held-out {report['score'].removeprefix('eval/')}"
        panels.append(panel(title, held_out, curves, len(panels) * WIDTH))
    size = f"{WIDTH * len(panels)} {HEIGHT}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-size="12" '
    head += 'width="{}" height="{}" font-family="sans-serif" '.format(*size.split())
    white = '<rect width="100%" height="100%" fill="white"/>'
    lines = [head + f'fill="{INK}">', white, *itertools.chain(*panels), "</svg>"]
    file.write_text("\n".join(lines) + "\n")


def ticks(high: float) -> list[float]:
    """Four to eight round numbers from 0 to `high`."""
    power = 10 ** math.floor(math.log10(high))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1, 2) if high / (power * part) <= 8)
    return [i * step for i in range(math.floor(high / step + 1e-9) + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def path(shape: str, color: str, width: float = 1, more: str = "") -> str:
    look = f'fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"'
    return f'<path d="{shape}" {look}{more}/>'


def panel(x_title: str, y_title: str, curves: list[tuple], left: float) -> list[str]:
    """The SVG elements of one chart whose left edge is at `left`; both axes begin at 0."""
    widest = max(x for points, _, _ in curves for x, _ in points) or 1
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def place(x: float, y: float) -> str:
        return f"{x0 + x / widest * (x1 - x0):.1f} {y0 + y * (y1 - y0):.1f}"

    out = []
    for value in ticks(1):
        x, y = map(float, place(0, value).split())
        out += [path(f"M{x} {y}H{x1}", GRID), text(x - 6, y + 4, f"{value:g}", "end")]
    for value in ticks(widest):
        x, y = map(float, place(value, 0).split())
        out += [path(f"M{x} {y}v4", INK), text(x, y + 17, f"{value:g}")]
    out += [path(f"M{x0} {y0}H{x1}", INK), text((x0 + x1) / 2, HEIGHT - 10, x_title)]
    x, y = left + 14, (y0 + y1) / 2
    out.append(text(x, y, y_title, more=f' transform="rotate(-90 {x} {y})"'))
    for points, color, name in sorted(curves, key=lambda curve: curve[2] != ""):
        shape = "M" + "L".join(place(*point) for point in points)
        thin = (1, ' stroke-opacity="0.55"')
        out.append(path(shape, color, *((3,) if name else thin)))
    for i, (_, color, name) in enumerate(curve for curve in curves if curve[2]):
        x, y = x0 + 8 + 80 * i, TOP - 16
        out += [path(f"M{x} {y}h20", color, 3), text(x + 26, y + 4, name, "start")]
    return out
