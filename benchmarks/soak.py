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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("time/", "memory/", "step_time")


def start(folder: Path, argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "train_cls.py", "--output_dir", str(folder), *argv]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **options)


def finish(process: subprocess.Popen) -> None:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{out[-2000:]}")


def result(folder: Path) -> dict[str, str]:
    """What must be equal: metrics without times, completions, every file of final/, as hashes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    parts = {"metrics.jsonl": json.dumps(lines).encode()}
    for path in [folder / "completions.jsonl", *sorted((folder / "final").iterdir())]:
        parts[path.name] = path.read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def soak(folder: Path, kills: int, longest: float, seed: int, argv: list[str]) -> list[str]:
    """Raises AssertionError if the results differ. Each process lives for up to `longest`
    seconds; returns a line per kill."""
    options = [*argv, "--save_steps", "2", "--save_total_limit", "2"]
    whole, cut = folder / "whole", folder / "cut"
    finish(start(whole, options))
    chance, told = random.Random(seed), []
    while len(told) < kills:
        moment = chance.uniform(0.5, longest)
        process = start(cut, [*options, "--resume_from_checkpoint", "auto"])
        try:
            process.communicate(timeout=moment)
            if process.returncode:
                raise RuntimeError(f"exit code {process.returncode}, not killed")
            break  # it came to its end first
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        lines = cut / "metrics.jsonl"
        steps = lines.read_text().count("\n") - 1 if lines.exists() else 0
        saving = ", while saving" if list(cut.glob(".*.partial")) else ""
        kept = sorted(int(path.name[11:]) for path in cut.glob("checkpoint-*"))
        told.append(f"kill {len(told) + 1} after {moment:.1f} s, {steps} steps, {kept}{saving}")
        print(told[-1], flush=True)
    if not (cut / "final").exists():
        finish(start(cut, [*options, "--resume_from_checkpoint", "auto"]))
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
