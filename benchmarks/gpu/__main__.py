"""What only a GPU can say, in one command and at most ten minutes.

    python -m benchmarks.gpu                       # --parts right, --minutes 5, --peer

Random weights of published shapes, drawn on the device; nothing is downloaded. Each part runs in
processes of its own with a time limit: one that fails is reported, and the next begins.

right   attention, norm, head, delta rule and optimizers against float64; sampled against trained
        log-probs; captured decode steps against launched ones; the demo beside the CPU; with
        several devices FSDP2, HSDP and LoRA against one
fast    steps of 8 prompts x 8 completions x 256 tokens, 448 pixels, of as many models as fit,
        beside what benchmarks/launches.py predicts with this device's rates; and the plan's memory
        beside the allocator's
peer    (with --peer) TRL's GRPOTrainer on the same weights and work, in turns; vLLM where installed

Writes OUT/gpu.json and OUT/gpu.md, also when it is stopped (Ctrl-C), and each part's log. Exit
code 1 if a part failed or a number is not right. Without a CUDA device narrow models show that the
command works; --start and --start_ranks say what starts a script on an emulated device
(tests/emulated_gpu).
"""

import argparse
import contextlib
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.parts import Part, Starts, begin, end, read, run
from benchmarks.gpu.tables import checks, markdown

MINUTES = 10  # for all parts together
SLACK = 3  # seconds, for the tables
LATE = ("not begun", "cut short")  # parts whose own limit was not reached
RIGHT, RUNS = "benchmarks.gpu.right", "benchmarks.gpu.runs"
CHECKS = ("attention_kernel", "norm", "head", "delta", "fused", "adamw", "sampling")
LORA = "--use_peft --tokens_per_pack 4096"
MODELS = {  # what is trained: model, flags
    "2B, all weights": ("Qwen2-VL 2B", ""),
    "2B, all weights, 8-bit AdamW": ("Qwen2-VL 2B", "--optim adamw_8bit --tokens_per_pack 4096"),
    "2B of Qwen3.5, LoRA": ("Qwen3.5 2B", LORA),
    "2B, LoRA": ("Qwen2-VL 2B", LORA),
    "7B, LoRA": ("Qwen2.5-VL 7B", LORA),
    "7B, LoRA on 4 bits": ("Qwen2.5-VL 7B", f"{LORA} --load_in_4bit"),
}
PEER = "2B, LoRA"  # beside TRL
TRAINED = {"float32": "--bf16 false", "bfloat16": "--bf16 true"}
SHARDED = {"FSDP2": "--bf16 false", "LoRA": "--bf16 false --use_peft --learning_rate 2e-3"}


def parts_of(shapes: str, count: int, folder: Path, peer: bool) -> list[Part]:
    """All parts, in their order. count: devices. folder: where the parts write."""
    quick = shapes != "published"
    common = {"shapes": shapes, "quick": quick}
    parts = [Part("card", ("always",), "benchmarks.gpu.card:measure", 40, common)]
    parts += [Part(name, ("right",), f"{RIGHT}:{name}", 40, common) for name in CHECKS]
    demo = common | {"script": "train_cls", "runs": steps_of(TRAINED, 3 if quick else 20)}
    on_cpu = demo | {"runs": {"float32": demo["runs"]["float32"]}}
    rewards, groups = f"{RUNS}:rewards", ("right", "demo")
    parts.append(Part("demo on the CPU", groups, rewards, 60, on_cpu, "cpu"))
    parts.append(Part("demo", groups, rewards, 60, demo))
    if count > 1:
        ways, groups = dict(SHARDED), ("right", "ranks")
        if count > 2:
            ways["HSDP"] = f"--bf16 false --shard_size {count // 2}"
        some = common | {"script": "train_cls", "runs": steps_of(ways, 2 if quick else 5)}
        alone = {name: flags.split(" --shard_size")[0] for name, flags in some["runs"].items()}
        parts.append(Part("one rank", groups, rewards, 60, some | {"runs": alone}))
        parts.append(Part("ranks", groups, rewards, 90, some, "ranks"))
    for name, (model, flags) in MODELS.items():
        case = common | {"model": model, "flags": flags, "counted": 1 if quick else 2}
        parts.append(Part(name, ("fast",), f"{RUNS}:steps", 100, case))
    return parts + (beside_peer(common, folder) if peer else [])


def steps_of(ways: dict[str, str], count: int) -> dict[str, str]:
    each = f"--max_steps {count} --prompts_per_step 4 --num_generations 4"
    return {name: f"{each} {flags}" for name, flags in ways.items()}


def beside_peer(common: dict, folder: Path) -> list[Part]:
    """Ours and TRL in turns, on one checkpoint."""
    model, flags = MODELS[PEER]
    trained = common | {"model": model, "flags": flags, "folder": str(folder / "peer-model")}
    ours = trained | {"counted": 1, "checkpoint": trained["folder"]}
    trl = "benchmarks.gpu.peer:trl"
    parts = [Part("weights for the peer", ("peer",), "benchmarks.gpu.peer:weights", 60, trained)]
    for turn in (1, 2):
        parts.append(Part(f"ours {turn}", ("peer",), f"{RUNS}:steps", 100, ours))
        parts.append(Part(f"TRL {turn}", ("peer",), trl, 150, trained | {"vllm": False}))
    return [*parts, Part("TRL with vLLM", ("peer",), trl, 200, trained | {"vllm": True})]


def measure(
    parts: list[Part], starts: Starts, folder: Path, minutes: float
) -> tuple[dict[str, dict], dict]:
    """Runs the parts one after the other. Returns what `run` does, by name; and what is expected of
    the cases, which another process counts meanwhile on the CPU."""
    deadline, found, counting = time.monotonic() + 60 * minutes - SLACK, {}, None
    cases = {part.name: part.settings for part in parts if part.groups == ("fast",)}
    try:
        for part in parts:
            left, limit = deadline - time.monotonic(), part.limit * max(1, minutes / MINUTES)
            if left < 1:
                row = {"status": "not begun", "seconds": 0, "found": {}}
            else:
                row = run(part, starts, folder, min(left, limit))
            if row["status"] == "out of time" and left < limit:
                row["status"] = "cut short"
            if row["status"] in LATE:
                row["why"] = f"the {minutes:g} minutes are over"
            found[part.name] = row
            why = row.get("why") or row["found"].get("skipped") or ""
            print(f"{part.name:30} {row['status']:12} {row['seconds']:6} s  {why}", flush=True)
            if row["status"] == "stopped":
                break
            if part.name == "card" and cases and "rates" in row["found"]:
                settings = part.settings | {"cases": cases, "rates": row["found"]["rates"]}
                counting = Part(
                    "expected", (), "benchmarks.gpu.expected:predict", 0, settings, "cpu"
                )
                process = begin(counting, starts, folder)
        if counting is None:
            return found, {}
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(0 if row["status"] == "stopped" else max(1, deadline - time.monotonic()))
    finally:
        if counting is not None:
            end(process)
    return found, read(folder / "expected.jsonl")


def failed(found: dict[str, dict]) -> list[str]:
    """Names of what did not go well: parts, and numbers that are not right."""
    names = [name for name, part in found.items() if part["status"] in ("failed", "out of time")]
    return names + [finding["what"] for finding in checks(found) if not finding["ok"]]


def verdict(found: dict[str, dict]) -> str:
    """What went well, what did not, and what there was no time for."""
    wrong = failed(found)
    late = [name for name, part in found.items() if part["status"] in LATE]
    said = f"Not as it should be: {', '.join(wrong)}." if wrong else "All that ran is right."
    said += "".join(f" Stopped in {n}." for n, part in found.items() if part["status"] == "stopped")
    return said + (f" No time was left for {', '.join(late)}: see --minutes." if late else "")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no process is left over
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["right", "fast", "peer", *CHECKS, "demo", "ranks", *MODELS]
    parser.add_argument(
        "--parts",
        nargs="+",
        default=("right", "fast"),
        choices=names,
        metavar="PART",
        help=f"default: right fast; of {', '.join(names)}",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--peer", action="store_true", help="as `peer` among --parts")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--shapes", choices=("published", "narrow"), help="narrow without CUDA")
    parser.add_argument("--ranks", type=int, help="processes of the part `ranks`")
    parser.add_argument("--start", help="starts a script on the device")
    parser.add_argument("--start_ranks", help="starts a script on several devices")
    options = parser.parse_args()
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes:g}: a number above 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    shapes = options.shapes or ("published" if torch.cuda.is_available() else "narrow")
    count = options.ranks or max(1, torch.cuda.device_count())
    many = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={count}"
    starts = Starts(
        shlex.split(options.start or sys.executable), shlex.split(options.start_ranks or many)
    )
    folder = options.out.resolve()
    wanted = {*options.parts, *(["peer"] if options.peer else [])}
    every = parts_of(shapes, count, folder, "peer" in wanted)
    parts = [part for part in every if {part.name, *part.groups} & {*wanted, "always"}]
    if "ranks" in wanted and count == 1:
        parser.error("--parts ranks needs several devices, or --ranks 2")
    try:
        found, expected = measure(parts, starts, folder, options.minutes)
    finally:
        shutil.rmtree(folder / "peer-model", ignore_errors=True)  # gigabytes
    facts = found["card"]["found"]
    report = {"shapes": shapes, "card": facts.get("card", {}), "rates": facts.get("rates", {})}
    report |= {"parts": found, "expected": expected}
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(report))
    print("\n" + markdown(report))
    print(f"written to {folder / 'gpu.json'} and gpu.md. {verdict(found)}")
    if any(part["status"] == "stopped" for part in found.values()):
        return 130
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
