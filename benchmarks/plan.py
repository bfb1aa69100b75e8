"""The memory that the plan predicts beside what the allocator counts, phase by phase.

    python benchmarks/plan.py --start "torchrun --nproc_per_node=2" --sizes mid --cases plain LoRA

Trains one step of the random models of benchmarks/material.py in bfloat16 with each set of flags, 4
prompts x 4 completions of 64 tokens, images of 448 pixels, and prints a table in Markdown:
predicted / measured GB of each phase. No completion ends early, as the plan assumes. --start is
what starts a script on the device.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_cls  # noqa: E402
from benchmarks.material import make_checkpoint, make_images  # noqa: E402
from benchmarks.step import endless_and_by_chance  # noqa: E402
from grpo.flags.parser import parse_config  # noqa: E402
from grpo.plan.memory import estimate_memory  # noqa: E402
from grpo.plan.sizes import Facts  # noqa: E402
from models.families import FAMILIES, read_config  # noqa: E402

PACKS = "--tokens_per_pack 1136"  # then two of the four groups are a pack
CASES = {
    "plain": "",
    "no checkpointing": "--gradient_checkpointing false",
    "several packs": PACKS,
    "several packs, no checkpointing": f"{PACKS} --gradient_checkpointing false",
    "frozen vision": "--freeze_vision",
    "no reference": "--beta 0",
    "adamw_8bit": "--optim adamw_8bit",
    "adamw_8bit, several packs": f"--optim adamw_8bit {PACKS}",
    "adamw_anyprecision": "--optim adamw_anyprecision",
    "cpu_offload": "--cpu_offload",
    "adamw_8bit, cpu_offload": "--optim adamw_8bit --cpu_offload",
    "LoRA": "--use_peft",
    "LoRA, no checkpointing": "--use_peft --gradient_checkpointing false",
    "LoRA, several packs": f"--use_peft {PACKS}",
    "CUDA graphs": "--cuda_graphs true",
}
PHASES = ("rollout", "reference", "training", "optimizer")
STEP = "--max_steps 2 --prompts_per_step 4 --num_generations 4 --max_completion_length 64 "
STEP += "--bf16 true --save_steps 0 --learning_rate 1e-4 --diagnose_after 0 --eval_samples 1 "
STEP += "--cuda_graphs false"


def run(checkpoint: str, images: str, output: str, flags: str) -> None:
    """One run of train_cls.py's main() with random rewards; its plan goes to a file."""
    endless_and_by_chance(train_cls)
    said = io.StringIO()
    paths = ["--model_name_or_path", checkpoint, "--dataset_name", images, "--output_dir", output]
    with contextlib.redirect_stdout(said):
        code = train_cls.main([*STEP.split(), *paths, *flags.split()])
    if said.getvalue():
        Path(f"{output}.plan").write_text(said.getvalue())
    sys.exit(code)


def row(checkpoint: Path, output: Path, flags: str) -> list[str]:
    """Predicted / measured of each phase, of a run that has ended."""
    said = Path(f"{output}.plan").read_text()
    longest, images = map(int, re.search(r"(\d+) in the longest, (\d+) at", said).groups())
    kernel, world = re.search(r"(\w+), (\d+) x cuda", said).groups()
    paths = ["--model_name_or_path", str(checkpoint), "--dataset_name", "d"]
    config, _ = parse_config(train_cls.Config, [*STEP.split(), *flags.split(), *paths])
    facts = Facts(
        read_config(checkpoint), longest, images, True, int(world), device="cuda", kernel=kernel
    )
    predicted = estimate_memory(config, facts)
    measured = [json.loads(line) for line in (output / "metrics.jsonl").open()][-1]
    cells = []
    for phase in PHASES:
        if phase not in predicted:
            cells.append("-")
            continue
        gb, found = sum(predicted[phase].values()), measured[f"memory/{phase}_gb"]
        cells.append(f"{gb:.2f} / {found:.2f} = {gb / found:.2f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--sizes", nargs="+", default=["mid", "small"], choices=("mid", "small"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--start", default=sys.executable, help="what starts a script on the device"
    )
    parser.add_argument("--out", type=Path, help="keep the runs here, and use those that are there")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run(*options.case)
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        images = make_images(out / "images", 8, 448)
        print("| | " + " | ".join(PHASES) + " |\n|" + "---|" * 5)
        for size in options.sizes:
            if not (out / size).exists():
                make_checkpoint(out / size, size, options.family)
            for name in options.cases:
                output = out / f"{size} {name}"
                if not (output / "final").exists():
                    command = [*options.start.split(), __file__]  # no flag of its own: a space
                    command += ["--case", out / size, images, output, f" {CASES[name]}"]
                    command = [str(word) for word in command]
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{name}: {done.stderr[-3000:]}")
                cells = row(out / size, output, CASES[name])
                print(f"| {size}, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
