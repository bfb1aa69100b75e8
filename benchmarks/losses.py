"""Both demos with each loss at its paper's settings: held-out results over seeds.

    python benchmarks/losses.py --json FILE

Each run is a training script's own main() in a process of its own, one thread, `--num_iterations 2`
and otherwise the demo's flags, but for fewer steps: at the demo's full length most losses reach the
same ceiling. FILE is written after each run; a second call continues where the first one ended.
`--show FILE` prints the table of docs/losses.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DAPO = "--epsilon_high 0.28 --beta 0 --dynamic_sampling"
RECIPES = {  # name -> flags; what the paper sets and a flag here can say
    "as it comes": "",
    "GRPO": "--loss_type grpo",
    "DAPO": DAPO,
    "Dr. GRPO": "--loss_type dr_grpo --scale_rewards none --beta 0",
    "RLOO": "--loss_type dr_grpo --advantage_estimator rloo --scale_rewards none",
    "two-sided": "--loss_type grpo --delta 4 --beta 0.001",
    "GSPO": "--loss_type grpo --importance_sampling_level sequence --epsilon 3e-4 "
    "--epsilon_high 4e-4 --beta 0",
    "CISPO": "--loss_type cispo --epsilon_high 5 --beta 0",
    "SAPO": "--loss_type sapo --beta 0",
    "GDPO": "--multi_objective_aggregation normalize_then_sum",
    "top entropy": DAPO + " --top_entropy_quantile 0.2",
    "entropy bonus": "--entropy_coef 0.01",
}
RESULTS = {"cls": "eval/accuracy", "det": "eval/AP50"}
WATCHED = ("entropy", "kl", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean")
WATCHED += ("cispo_clip_ratio", "clip_ratio/delta_mean", "step_time")


def run(script: str, recipe: str, seed: int, steps: int) -> dict:
    """One run's held-out results at its end, and means over its steps."""
    with tempfile.TemporaryDirectory() as folder:
        argv = f"--num_iterations 2 --seed {seed} --max_steps {steps} "
        argv += f"--diagnose_after 0 --output_dir {folder}/run {RECIPES[recipe]}"
        command = [sys.executable, f"train_{script}.py", *argv.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").open()]
    steps_of = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if RESULTS[script] in line]
    kept = {name: value for name, value in held_out[-1].items() if name.startswith("eval/")}
    means = {
        name: statistics.mean(line[name] for line in steps_of if name in line)
        for name in WATCHED
        if any(name in line for line in steps_of)
    }
    return {"before": held_out[0][RESULTS[script]], "after": kept, "means": means}


def show(report: dict) -> None:
    names = {script: name for script, name in RESULTS.items() if script in report["runs"]}
    print("| | " + " | ".join(f"{name}, seeds | median" for name in names.values()) + " |")
    for recipe in RECIPES:
        cells = []
        for script, name in names.items():
            runs = report["runs"][script].get(recipe, {})
            values = [runs[seed]["after"][name] for seed in sorted(runs)]
            cells.append(" ".join(f"{value:.3f}" for value in values))
            cells.append(f"{statistics.median(values):.3f}" if values else "-")
        print(f"| {recipe} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file = parser.add_mutually_exclusive_group(required=True)
    file.add_argument("--json", type=Path, help="keeps the runs; those it has are not repeated")
    file.add_argument("--show", type=Path, help="prints the tables of such a file")
    parser.add_argument("--scripts", nargs="+", choices=list(RESULTS), default=list(RESULTS))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if options.show:
        return show(json.loads(options.show.read_text()))
    report = {"steps": options.steps, "recipes": RECIPES, "runs": {}}
    if options.json.exists():
        report = json.loads(options.json.read_text())
        assert report["steps"] == options.steps, "another file for another number of steps"
    for script in options.scripts:
        for seed in options.seeds:
            for recipe in options.recipes:
                runs = report["runs"].setdefault(script, {}).setdefault(recipe, {})
                if str(seed) in runs:
                    continue
                found = runs[str(seed)] = run(script, recipe, seed, options.steps)
                print(script, recipe, seed, found["after"][RESULTS[script]], flush=True)
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    return show(report)


if __name__ == "__main__":
    main()
