"""Running the training scripts, and reading what they wrote."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import train_cls

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # photographs; tests that need them skip without
CHECKPOINT = ROOT / "data" / "demo_cls" / "checkpoint"
SHORT = ["--max_steps", "2", "--prompts_per_step", "2", "--num_generations", "4"]
SHORT += ["--eval_samples", "6", "--max_completion_length", "40"]


def train(folder: Path, *argv: str, script=train_cls) -> list[dict]:
    """Runs the script's main() in this process; the lines of metrics.jsonl."""
    assert script.main(["--output_dir", str(folder), *argv]) == 0
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    """Without what the clock measured."""
    prefixes = ("time/", "memory/", "step_time")
    return [{k: v for k, v in line.items() if not k.startswith(prefixes)} for line in lines]


def torchrun(
    ranks: int, *argv: str, restarts: int = 0, timeout: float = 240
) -> subprocess.CompletedProcess:
    """torchrun with `ranks` processes of one thread each; a run that hangs ends at `timeout`."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--max_restarts={restarts}", "--shutdown-timeout=5"]
    command += [f"--master_port={random.randrange(20000, 60000)}", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=timeout, **run)
