"""Kills a run of the demo with SIGKILL at random moments, resumes it each time, and compares:

    python -m benchmarks.soak [--kills 20]

The run that was killed must end with the metrics (times aside), completions and weights of one that
never was, byte for byte. Prints a line per kill.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("time/", "memory/", "perf/", "step_time")


def run(folder: Path, argv: list[str], seconds: float | None = None) -> bool:
    """Trains in `folder`, and is killed after so many seconds. Returns whether it came to its end
    before. Raises RuntimeError if it fails."""
    command = [sys.executable, "train_cls.py", "--output_dir", str(folder), *argv]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return True


def result(folder: Path) -> dict[str, str]:
    """What must be equal: metrics without times, completions, hashes of the files in final/."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    parts = {"metrics.jsonl": json.dumps(lines).encode()}
    for path in [folder / "completions.jsonl", *sorted((folder / "final").iterdir())]:
        parts[path.name] = path.read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def soak(
    folder: Path,
    kills: int,
    longest: float,
    seed: int,
    argv: list[str],
    run: Callable[[Path, list[str], float | None], bool] = run,
) -> list[str]:
    """Trains, kills and resumes; each process lives for up to `longest` seconds. Returns a line per
    kill. Raises AssertionError if the results differ."""
    options = [*argv, "--save_steps", "2", "--save_total_limit", "2"]
    whole, cut = folder / "whole", folder / "cut"
    run(whole, options, None)
    chance, told = random.Random(seed), []
    again = [*options, "--resume_from_checkpoint", "auto"]
    while len(told) < kills:
        moment = chance.uniform(0.5, longest)
        if run(cut, again, moment):
            break
        lines = cut / "metrics.jsonl"
        steps = lines.read_text().count("\n") - 1 if lines.exists() else 0
        saving = ", while saving" if list(cut.glob(".*.partial")) else ""
        kept = sorted(int(path.name[11:]) for path in cut.glob("checkpoint-*"))
        told.append(f"kill {len(told) + 1} after {moment:.1f} s, {steps} steps, {kept}{saving}")
        print(told[-1], flush=True)
    if not (cut / "final").exists():
        run(cut, again, None)
    one, two = result(whole), result(cut)
    assert one == two, {name for name in one if one[name] != two.get(name)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=14.0, help="seconds a process may live")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = soak(Path(folder), arguments.kills, arguments.longest, arguments.seed, [])
    seconds = time.monotonic() - began
    print(f"{len(told)} kills, {seconds:.0f} s: metrics, completions and weights are the same")


if __name__ == "__main__":
    main()
