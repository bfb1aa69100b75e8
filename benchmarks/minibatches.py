"""The flowers' demo with one update a rollout and with four: held-out accuracy, seconds, tokens.

    python benchmarks/minibatches.py --json FILE

Both train on the same number of prompts, with 8 prompts in each update: 100 rollouts of 8 prompts,
or 25 of 32 prompts with `--num_minibatches 4`. Each run is train_cls.py's own main() in a process
of its own, one thread, in turns. Seconds are those of steps, without evaluations. FILE is written
after each run; a second call continues where the first one ended. `--show FILE` prints the table of
docs/losses.md.

All other flags are the demo's. Its schedule counts mini-batches, so both have the same rate after
as many updates. Four updates a rollout also need a pass for the old policy's log-probs (in
`time/reference_s`), which one does not; its seconds are in the table.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.curves import reached  # noqa: E402
from benchmarks.learn import compact  # noqa: E402

SETTINGS = {"8 prompts, 1 update": (8, 1), "32 prompts, 4 updates": (32, 4)}  # of a rollout
SCORE, GOOD = "eval/accuracy", 0.9
PHASES = ("rollout", "reward", "reference", "training", "optimizer")
SHARES = (0.04, 0.08, 0.12, 0.16, 0.2, 0.4, 1.0)  # of the run, at which accuracies are shown


def run(setting: str, seed: int, options: argparse.Namespace) -> dict:
    """One run: its evaluations by prompts and by seconds, seconds of each phase, and tokens."""
    prompts, updates = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        argv = f"--prompts_per_step {prompts} --num_minibatches {updates} --seed {seed} "
        argv += f"--max_steps {options.prompts // prompts} --eval_steps {options.every // prompts} "
        argv += f"--diagnose_after 0 {options.flags} --output_dir {folder}/run"
        command = [sys.executable, "train_cls.py", *argv.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        load = os.getloadavg()[0]  # what else the machine did
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").open()]
    steps = [line for line in lines if "step_time" in line]
    clock = [0.0, *itertools.accumulate(line["step_time"] for line in steps)]
    points = [line for line in lines if SCORE in line]
    held_out = {
        "prompts": [prompts * line["step"] for line in points],
        "seconds": [clock[line["step"]] for line in points],
        SCORE: [line[SCORE] for line in points],
    }
    phases = {name: sum(line[f"time/{name}_s"] for line in steps) for name in PHASES}
    names = ("kl", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean")
    found = {"load": load, "held_out": held_out, "seconds": clock[-1], "phases": phases}
    found["means"] = {name: statistics.mean(line[name] for line in steps) for name in names}
    return found | {"tokens": steps[-1]["num_tokens"], "updates": steps[-1]["num_updates"]}


def show(report: dict) -> None:
    """Prints the table: of each cell the median, and the seeds' values."""
    runs = {name: list(found.values()) for name, found in report["runs"].items() if found}

    def row(title: str, digits: int, value) -> None:
        values = {name: [value(run) for run in found] for name, found in runs.items()}
        cells = [
            f"{statistics.median(each):.{digits}f} "
            f"({', '.join(f'{one:.{digits}f}' for one in each)})"
            for each in values.values()
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")

    def accuracy(run: dict, by: str, place: float) -> float:
        return numpy.interp(place, run["held_out"][by], run["held_out"][SCORE])

    def first_good(run: dict, by: str) -> float:
        columns = run["held_out"]
        points = [
            dict(zip(columns, point, strict=True)) for point in zip(*columns.values(), strict=True)
        ]
        return reached(points, SCORE, GOOD, by)

    print("| median (each seed) | " + " | ".join(runs) + " |\n|---" + "|---" * len(runs) + "|")
    every = [run for found in runs.values() for run in found]
    for by in ("prompts", "seconds"):
        end = min(run["held_out"][by][-1] for run in every)
        for place in (end * share for share in SHARES):
            title = f"held-out accuracy after {place:.3g} {by}"
            row(title, 3, lambda run, by=by, place=place: accuracy(run, by, place))
        row(f"{by} to {GOOD}", 0, lambda run, by=by: first_good(run, by))
    row("seconds of all steps", 1, lambda run: run["seconds"])
    for name in PHASES:
        row(f"of these {name}", 1, lambda run, name=name: run["phases"][name])
    per_second = "completion tokens a second of rollout"
    row(per_second, 0, lambda run: run["tokens"] / run["phases"]["rollout"])
    row("updates", 0, lambda run: run["updates"])
    for name in every[0]["means"]:
        row(f"{name}, mean", 4, lambda run, name=name: run["means"][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file = parser.add_mutually_exclusive_group(required=True)
    file.add_argument("--json", type=Path, help="keeps the runs; those it has are not repeated")
    file.add_argument("--show", type=Path, help="prints the tables of such a file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=800, help="of a run, a multiple of 32")
    parser.add_argument("--every", type=int, default=32, help="prompts between evaluations")
    parser.add_argument("--flags", default="", help="further flags of both")
    options = parser.parse_args()
    if options.show:
        return show(json.loads(options.show.read_text()))
    what = {name: getattr(options, name) for name in ("prompts", "every", "flags")}
    report = what | {"cores": os.cpu_count(), "runs": {name: {} for name in SETTINGS}}
    if options.json.exists():
        report = json.loads(options.json.read_text())
        assert what.items() <= report.items(), "another file for another setting"
    for seed, setting in itertools.product(options.seeds, SETTINGS):
        if str(seed) in report["runs"][setting]:
            continue
        found = report["runs"][setting][str(seed)] = run(setting, seed, options)
        end = f"{SCORE} {found['held_out'][SCORE][-1]:.3f}, {found['seconds']:.1f} s"
        print(f"{setting}, seed {seed}: {end}, load {found['load']:.1f}", flush=True)
        options.json.write_text(compact(report))
    return show(report)


if __name__ == "__main__":
    main()
