"""A report's HTML: one file that needs no network, safe whatever a model wrote.

Every text in the page has passed `visible` and jinja's escaping. The only exceptions are this
package's own script and style and Plotly's, which are marked as safe; a content security policy
with their hashes keeps anything else from running.
"""

import base64
import hashlib
import re
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from grpo.report.charts import charts_of, compared_charts
from grpo.report.gallery import Gallery, training_groups
from grpo.report.pictures import Album
from grpo.report.read import Completions, RunRecord

HERE = Path(__file__).resolve().parent
FINDINGS = 30  # of the diagnosis, in full
RESULTS = 80  # lines of the table of held-out results
# Control characters, marks of writing direction, lone surrogates, JavaScript's line separators: all
# invisible; some can garble a page, some cannot be written as UTF-8.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff"
    "\ufeff\ufff9-\uffff]"
)


def visible(value):
    """A text with invisible characters written as escapes; None as nothing; the rest unchanged."""
    if value is None:
        return ""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda match: _escape(ord(match[0])), value)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def run_page(run: RunRecord) -> str:
    """The report of one run. Raises UserError if a file of the run is damaged."""
    album = Album(run.config, run.wording, run.datasets)
    gallery = Gallery(run, album)
    completions = Completions(run.folder / "completions.jsonl")
    groups = training_groups(run, completions, album)
    return _render(
        title=run.name,
        runs=[run],
        names=[run.name],
        headlines=[headline(run)],
        results=results(run),
        charts=[] if run.status == "evaluated" else charts_of(run),
        findings=run.findings[:FINDINGS],
        more_findings=len(run.findings) - FINDINGS,
        gallery=gallery,
        groups=groups,
        all_groups=len(completions.groups),
        notes=album.notes,
        settings=[(name, [flag_text(value)], False) for name, value in run.config.items()],
    )


def comparison_page(runs: list[RunRecord]) -> str:
    """Several runs side by side: results, curves, flags."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    flags = dict.fromkeys(name for run in runs for name in run.config)
    texts = [(name, [flag_text(run.config.get(name)) for run in runs]) for name in flags]
    settings = [(name, values, len(set(values)) > 1) for name, values in texts]
    settings.sort(key=lambda line: not line[2])  # stable: else the order of the file
    return _render(
        title=f"{len(runs)} runs",
        runs=runs,
        names=names,
        headlines=[headline(run) for run in runs],
        results=[],
        charts=compared_charts(runs, names),
        findings=[],
        more_findings=0,
        gallery=None,
        groups=[],
        all_groups=0,
        notes=[],
        settings=settings,
    )


def headline(run: RunRecord) -> list[dict]:
    """The main results, before and after: held-out means of the terms and AP, the first term of
    each of several data sets, and the reward."""
    minor = ("mean_length", "clipped_ratio")
    lines = [line for line in results(run) if "/" not in line["name"] and line["name"] not in minor]
    main = [f"{name}/{line['name']}" for line in lines[:1] for name in run.datasets]
    lines += [line for line in results(run) if line["name"] in main]
    rewards = [(line["step"], line.get("reward")) for line in run.training]
    rewards = [(step, value) for step, value in rewards if value is not None]
    if rewards:
        (first, before), (last, after) = rewards[0], rewards[-1]
        ends = {"before": before, "after": after, "first": first, "last": last}
        lines.append({"name": "reward", "kind": "training", **ends})
    return lines


def results(run: RunRecord) -> list[dict]:
    """Held-out results of the first and the last evaluation; none without an evaluation."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    return [
        {
            "name": name.removeprefix("eval/"),
            "kind": "held out",
            "before": first.get(name),
            "after": value,
            "first": first["step"],
            "last": last["step"],
        }
        for name, value in last.items()
        if name.startswith("eval/") and isinstance(value, int | float)
    ]


def _render(**content) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.jinja").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(_csp_hash(script) for script in scripts),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        most_results=RESULTS,
        evaluated=all(run.status == "evaluated" for run in content["runs"]),
        **content,
    )


def number(value) -> str:
    """A number as people read it: 3 decimals, or 4 digits where that would show 0 or too many."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"


def flag_text(value) -> str:
    """A flag's value as the command line takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(flag_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _csp_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
