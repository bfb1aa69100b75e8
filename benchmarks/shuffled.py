"""Does the detection demo learn from its rewards, or from training as such?

    python -m benchmarks.shuffled [--seeds 1 2 3 4]

Trains 25 steps with true rewards, and with each seed 25 steps in which a completion gets the reward
of a randomly chosen one so far. Prints the change of each run's held-out IoU reward. Adam's updates
do not get smaller by that, so the policy drifts; docs/LOG.md has the figures.
"""

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import train_det

TRUE_JUDGE = train_det.judge


def change(seed: int | None, steps: int) -> float:
    """Held-out IoU reward after the run minus before. seed: None is the run with true rewards."""
    chance, pool = random.Random(seed), []

    def shuffled(*arguments):
        groups, *_ = arguments
        TRUE_JUDGE(*arguments)
        pool.extend(record.reward for group in groups for record in group.records)
        for group in groups:
            group.records = [replace(r, reward=chance.choice(pool)) for r in group.records]

    train_det.judge = TRUE_JUDGE if seed is None else shuffled
    with tempfile.TemporaryDirectory() as folder:
        run = ["--output_dir", f"{folder}/run"]
        train_det.main(["--max_steps", str(steps), "--eval_samples", "96", *run])
        text = Path(folder, "run", "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    held_out = [line["eval/iou"] for line in lines if "eval/iou" in line]
    return held_out[-1] - held_out[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    print(f"true rewards      {change(None, arguments.steps):+.3f}", flush=True)
    for seed in arguments.seeds:
        print(f"shuffled, seed {seed}  {change(seed, arguments.steps):+.3f}", flush=True)


if __name__ == "__main__":
    main()
