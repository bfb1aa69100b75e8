"""Short runs of both scripts on whatever device torch sees: `python runs.py CASES.json FOLDER`.

CASES.json: a list of {name, script, argv, by_chance}. Each run writes FOLDER/name, and rank 0 also
FOLDER/name/waits.json: how often the host waited for the device in each phase of step 2, where
rehearse.py counts it. One process for all, as starting one takes as long as a run.
"""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import grpo.run.run
from benchmarks.step import random_reward
from grpo.run import Run
from grpo.run.throughput import PEAKS

WAITS = getattr(torch, "_rehearsal", (Counter(), Counter()))[1]


class Waits:
    """Counts waits by (step, phase), as `Run` tells of both."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.counts, self.now, self.seen = Counter(), (0, "start"), WAITS.total()

    def enter(self, step: int, phase: str) -> None:
        self.counts[self.now] += WAITS.total() - self.seen
        self.now, self.seen = (step, phase), WAITS.total()

    def of(self, step: int) -> dict[str, int]:
        return {phase: count for (at, phase), count in self.counts.items() if at == step}


def watch(waits: Waits) -> None:
    begin, phase = Run.begin, Run.phase

    def begins(self, step, *arguments):
        waits.enter(step, "begin")
        return begin(self, step, *arguments)

    def enters(self, name, *arguments):
        waits.enter(waits.now[0], name)
        return phase(self, name, *arguments)

    Run.begin, Run.phase = begins, enters


def with_luck(score):
    """A random model earns nothing: it is paid by chance, which its text decides."""

    def scored(completion, *arguments):
        earned = score(completion, *arguments)
        luck = dict.fromkeys(earned, random_reward(completion))
        return earned if min(earned.values()) == 1 else luck

    return scored


def main() -> None:
    cases, folder, waits = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Waits()
    watch(waits)
    PEAKS["Rehearsal (no GPU)"] = PEAKS["H100 80GB HBM3"]  # it says that it is one
    grpo.run.run.write_report = lambda folder: ""  # it takes two seconds, and no device
    for case in cases:
        script, output = importlib.import_module(case["script"]), folder / case["name"]
        score = script.score
        if case["by_chance"]:
            script.score = with_luck(score)
        waits.reset()
        code = script.main([*case["argv"], "--output_dir", str(output)])
        waits.enter(0, "end")
        if code:
            sys.exit(code)
        script.score = score
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            torch.distributed.destroy_process_group()
        else:
            rank = 0
        if rank == 0:
            (output / "waits.json").write_text(json.dumps(waits.of(2)))


if __name__ == "__main__":
    main()
