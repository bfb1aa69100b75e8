"""The curves of a report as data: which metrics each chart has, sampled, and its texts.

Not here: drawing (page.js, with Plotly), and what a metric means (docs/metrics.md).
"""

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

from grpo.report.read import RunRecord
from grpo.report.sample import POINTS, extremes, trailing_mean

# id, title, unit, metrics (patterns), whether a moving mean is drawn too
CHARTS = (
    ("reward", "Reward", "", ("reward",), True),
    ("terms", "Reward, term by term", "", ("rewards/*/mean",), True),
    ("held-out", "Held out", "", ("eval/*",), False),
    ("dead", "Groups without a signal", "share", ("frac_reward_zero_std",), False),
    ("failures", "No answer found", "share", ("parse_failures/*",), False),
    ("kl", "KL to the reference", "nats", ("kl",), False),
    ("entropy", "Entropy", "nats", ("entropy",), False),
    ("length", "Length of completions", "tokens", ("completions/mean_length",), False),
    ("clipped", "Completions cut", "share", ("completions/clipped_ratio",), False),
    ("grad-norm", "Norm of the gradient", "", ("grad_norm",), False),
    ("rate", "Learning rate", "", ("learning_rate", "learning_rate/vision"), False),
    ("time", "Time by phase", "s", ("step_time", "time/*"), False),
    ("speed", "Tokens a second", "tokens/s", ("perf/*tokens_per_s*",), False),
    ("mfu", "Share of the devices' peak", "share", ("perf/mfu",), False),
    ("memory", "Memory by phase", "GB", ("memory/*",), False),
)
# The first part of a metric that a data set has its own of -> how many parts that one has at least.
OF_A_SET = {"reward": 2, "reward_std": 2, "frac_reward_zero_std": 2, "epoch": 2}
OF_A_SET |= {"rewards": 4, "completions": 3, "sampling": 3, "eval": 3}
OF_EACH_SET = ("reward", "terms", "held-out")
NOT_DRAWN = ("eval/AP50/*", "eval/mean_length", "eval/clipped_ratio")  # in the table of results
# Of several runs: a chart for each metric, a line for each run. Pattern, unit, moving mean.
COMPARED = (
    ("reward", "", True),
    ("rewards/*/mean", "", True),
    ("eval/*", "", False),
    ("kl", "nats", False),
    ("entropy", "nats", False),
    ("completions/mean_length", "tokens", False),
    ("grad_norm", "", False),
    ("step_time", "s", False),
    ("perf/completion_tokens_per_s", "tokens/s", False),
    ("perf/mfu", "share", False),
    ("memory/training_gb", "GB", False),
)


@dataclass(frozen=True)
class Series:
    """The values of one metric: `x` steps, `y` values, None for one that was not finite."""

    x: list[int]
    y: list[float | None]


def series_of(run: RunRecord, name: str) -> Series:
    """All values of a metric that the run logged."""
    lines = run.evaluations if name.startswith("eval/") else run.training
    if name == "time/evaluation_s" or name == "memory/evaluation_gb":
        lines = run.evaluations
    values = [(line["step"], line.get(name)) for line in lines if name in line]
    numbers = [v if isinstance(v, int | float) else None for _, v in values]
    return Series([step for step, _ in values], numbers)


def logged_names(runs: list[RunRecord]) -> list[str]:
    """Every metric that a run logged, in the order of the lines."""
    lines = (line for run in runs for line in (*run.training, *run.evaluations))
    kinds = dict.fromkeys(tuple(line) for line in lines)  # few: most lines have the same names
    return list(dict.fromkeys(name for kind in kinds for name in kind))


def set_of(name: str, datasets: Iterable[str]) -> tuple[str, str]:
    """(the data set that a metric is of, the metric's name without it): reward/flowers is reward of
    flowers. "" if it is of all of them."""
    parts = name.split("/")
    if len(parts) >= OF_A_SET.get(parts[0], math.inf) and parts[1] in datasets:
        return parts[1], "/".join([parts[0], *parts[2:]])
    return "", name


def names_like(logged: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Those of the logged metrics that match a pattern and none of NOT_DRAWN."""

    def matches(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern)

    names = [name for pattern in patterns for name in logged if matches(name, pattern)]
    drawn = [name for name in names if not any(matches(name, hidden) for hidden in NOT_DRAWN)]
    return list(dict.fromkeys(drawn))


def short_name(name: str) -> str:
    """A metric's name without what the title of its chart says already."""
    for prefix, suffix in (("rewards/", "/mean"), ("time/", "_s"), ("memory/", "_gb")):
        if name.startswith(prefix) and name.endswith(suffix):
            return name.removeprefix(prefix).removesuffix(suffix)
    name = name.removeprefix("perf/").removesuffix("_tokens_per_s").removeprefix("tokens_per_s/")
    return name.removeprefix("eval/").removeprefix("parse_failures/")


def charts_of(run: RunRecord) -> list[dict]:
    """The charts of one run, a line for each metric. The reward, its terms and what is held out
    have a chart of each of several data sets, too."""
    charts, logged = [], [(set_of(name, run.datasets), name) for name in logged_names([run])]
    for key, title, unit, patterns, smooth in CHARTS:
        for number, dataset in enumerate(("", *run.datasets)):
            if dataset and key not in OF_EACH_SET:
                continue
            full = {plain: name for (whose, plain), name in logged if whose == dataset}
            lines = [
                _line(short_name(plain), series_of(run, full[plain]), smooth, key == "held-out", c)
                for c, plain in enumerate(names_like(list(full), patterns))
            ]
            if key == "failures":  # most runs never see three of the six reasons
                lines = [line for line in lines if any(line["y"])]
            own, whose = (f"{key}-{number}", f": {dataset}") if dataset else (key, "")
            charts.append(_chart(own, title + whose, unit, lines, _marks(run)))
    return [chart for chart in charts if chart["lines"]]


def compared_charts(runs: list[RunRecord], names: list[str]) -> list[dict]:
    """The charts of several runs, a line for each run. names: of the runs."""
    charts, logged = [], logged_names(runs)
    for pattern, unit, smooth in COMPARED:
        for metric in names_like(logged, (pattern,)):
            lines = [
                _line(name, series_of(run, metric), smooth, metric.startswith("eval/"), color)
                for color, (run, name) in enumerate(zip(runs, names, strict=True))
            ]
            charts.append(_chart(f"m{len(charts)}", metric, unit, lines, []))
    return charts


def _marks(run: RunRecord) -> list[dict]:
    """Steps at which the diagnosis found something, each with the numbers of its findings."""
    by_step: dict[int, list[str]] = {}
    for number, (step, _) in enumerate(run.findings, 1):
        by_step.setdefault(step, []).append(str(number))

    def text(numbers: list[str]) -> str:
        return ", ".join(numbers) if len(numbers) < 4 else f"{numbers[0]} to {numbers[-1]}"

    return [{"x": step, "text": text(numbers)} for step, numbers in by_step.items()]


def _line(name: str, series: Series, smooth: bool, points: bool, color: int) -> dict:
    """A line of a chart, for page.js. smooth: with a moving mean. points: with a dot for each
    value. color: its number; a run has the same one in all charts."""
    shown = extremes(series.y)
    window = max(5, len(series.y) // 20)
    means = trailing_mean(series.y, window) if smooth and len(series.y) > 2 * window else []
    return {
        "name": name,
        "x": [series.x[i] for i in shown],
        "y": [_rounded(series.y[i]) for i in shown],
        "mean": [_rounded(means[i]) for i in shown] if means else [],
        "window": window if means else 0,
        "points": points,
        "of": len(series.y),
        "color": color,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _chart(key: str, title: str, unit: str, lines: list[dict], marks: list[dict]) -> dict:
    lines = [line for line in lines if any(y is not None for y in line["y"])]
    notes = []
    if window := max((line["window"] for line in lines), default=0):
        notes.append(f"The thick line is the mean of the last {window} steps.")
    longest = max((line["of"] for line in lines), default=0)
    if longest > POINTS:
        notes.append(
            f"Of {longest:,} values the lowest and the highest of every "
            f"{longest // (POINTS // 2 - 1):,} are shown."
        )
    title = f"{title} ({unit})" if unit else title
    alt = "; ".join(_in_words(line) for line in lines)
    note = " ".join(notes)
    return {"id": key, "title": title, "lines": lines, "marks": marks, "note": note, "alt": alt}


def _in_words(line: dict) -> str:
    """A curve in words, for people who cannot see it."""
    known = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if y is not None]
    (first, begin), (last, end) = known[0], known[-1]
    low, high = min(y for _, y in known), max(y for _, y in known)
    return (
        f"{line['name']}: {begin:.4g} at step {first}, {end:.4g} at step {last}, "
        f"lowest {low:.4g}, highest {high:.4g}"
    )
