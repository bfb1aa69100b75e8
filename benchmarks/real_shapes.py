"""One step with the exact shapes of a published model, random weights, on this machine's CPU.

    python -m benchmarks.real_shapes --model "Qwen2-VL 2B" --json FILE
    PYTHONPATH=peer:$PWD python -m benchmarks.real_shapes --peer --layers 4 --minutes 10 --json FILE

With LoRA, or --all_weights. 2 prompts x 4 completions x 16 tokens, all of that length, an image of
448 pixels (512 from Qwen3-VL on: as many tokens), random rewards. Weights are made in a temporary
folder, which takes twice their size on disk. Prints each phase's seconds, and the memory beside
what `--dry_run` predicts.

--peer runs TRL's GRPOTrainer on the same checkpoint and images, in turns with ours, each in
processes of its own, and prints a row for a table in Markdown; both with gradient checkpointing,
which is both's default. It ends: --layers takes that many of the decoder's layers and the same
share of the tower's, and a process that takes more than --minutes, its start included, is ended and
reported as not finished. Every step is the first of its process.
"""

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks.step
import train_cls
from benchmarks.material import PROCESSORS, make_images, make_vocabulary, write
from benchmarks.memory import SIZES, published
from benchmarks.step import endless_and_by_chance, in_own_process, peak, stand_in_for_torchvision
from demo.published import save_model
from models.decoding.storage import allocate
from models.families import parse_config
from models.lora import LoRA
from models.names import module_name
from models.qwen_vl import QwenVL

PHASES = ("rollout", "reference", "training", "optimizer")


def shortened(name: str, layers: int | None) -> tuple[dict, str]:
    """config.json of a published model with its first `layers` layers and the same share of its
    tower's; and what share that is, in words."""
    raw = published(name)
    text, vision = raw.get("text_config", raw), raw["vision_config"]
    every, depth = text["num_hidden_layers"], vision["depth"]
    layers = layers or every
    text["num_hidden_layers"] = layers
    vision["depth"] = blocks = max(1, round(depth * layers / every))
    for key in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if key in vision:
            vision[key] = sorted({index * blocks // depth for index in vision[key]})
    return raw, f"{layers} of {every} layers, {blocks} of {depth} of the tower"


def make(folder: Path, settings: dict) -> Path:
    """Writes a checkpoint with this model's shapes and random weights. Returns the folder."""
    raw, _ = shortened(settings["model"], settings["layers"])
    special = make_vocabulary(folder, (raw | raw.get("text_config", {}))["vocab_size"])
    raw["image_token_id"] = special["<|image_pad|>"]
    raw["video_token_id"] = special["<|video_pad|>"]
    raw["vision_start_token_id"] = special["<|vision_start|>"]
    raw["vision_end_token_id"] = special["<|vision_end|>"]
    config = parse_config(raw, settings["model"])
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"patch_size": config.vision.patch_size, "max_pixels": 1024 * 1024}
    processor["processor_class"] = PROCESSORS[config.family]
    write(folder / "preprocessor_config.json", processor)
    with torch.device("meta"):
        model = QwenVL(config)
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    model = allocate(model, dtype, "cpu").initialize(torch.Generator().manual_seed(0))
    save_model(model, folder, dtype)
    return folder


def ours(settings: dict) -> dict:
    """One step of train_cls.py's main() with random rewards."""
    endless_and_by_chance(train_cls)
    argv = f"--use_peft {settings['peft']} --bf16 {settings['bf16']} --max_steps 1 --save_steps 0 "
    argv += f"--prompts_per_step {settings['prompts']} --num_generations {settings['group']} "
    argv += f"--max_completion_length {settings['completion']} --min_pixels 3136 "
    argv += "--learning_rate 1e-4 --diagnose_after 0"
    run, said = Path(settings["folder"]) / f"run-{os.getpid()}", io.StringIO()
    paths = ["--model_name_or_path", settings["checkpoint"], "--dataset_name", settings["images"]]
    with contextlib.redirect_stdout(said):
        train_cls.main([*argv.split(), *paths, "--output_dir", str(run)])
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").open()]
    assert line["completions/mean_length"] == settings["completion"]
    predicted = re.findall(r"^  (\w+) +([\d.]+): ", said.getvalue(), re.MULTILINE)
    return {
        "seconds": [line["step_time"]],
        "phases": {k[5:-2]: v for k, v in line.items() if k.startswith("time/")},
        "peak_gb_so_far": {k[7:-3]: v for k, v in line.items() if k.startswith("memory/")},
        "predicted_gb": {name: float(gb) for name, gb in predicted},
        "peak_mb": peak(),
        "grad_norm": line["grad_norm"],
        "logp_difference_max": line["sampling/logp_difference_max"],
    }


def run(kind: str, settings: dict, minutes: float | None) -> dict:
    """One step of one trainer in a process of its own, or after how many seconds that process was
    ended."""
    script = __file__ if kind == "ours" else benchmarks.step.__file__
    settings = settings | {"kind": kind, "checkpointing": True, "steps": 0}  # steps after a first
    seconds = minutes and 60 * minutes
    load = os.getloadavg()[0]
    try:
        result = in_own_process(script, settings, torch.get_num_threads(), seconds)
    except subprocess.TimeoutExpired:
        result = {"not_finished_after_s": seconds}
    return result | {"load_average": load}


def compare(settings: dict, options: argparse.Namespace) -> dict:
    """Ours, and with --peer also the peer, in turns."""
    kinds = ("ours", "peer") if options.peer else ("ours",)
    report = {name: settings[name] for name in ("model", "share", "peft", "bf16")}
    report |= {name: settings[name] for name in ("prompts", "group", "completion")}
    report |= {"threads": torch.get_num_threads(), **{kind: [] for kind in kinds}}
    for _ in range(options.rounds):
        for kind in kinds:
            report[kind].append(run(kind, settings, options.minutes))
            print(kind, json.dumps(report[kind][-1]), flush=True)
    return report


def cell(runs: list[dict]) -> tuple[str, str, float | None]:
    """Seconds and GB for the table, and the median of the seconds if all have finished."""
    limits = [one["not_finished_after_s"] for one in runs if "not_finished_after_s" in one]
    if limits:
        return f"> {max(limits):.0f}, not finished", "", None
    seconds = statistics.median(one["seconds"][0] for one in runs)
    return f"{seconds:.1f}", f"{max(one['peak_mb'] for one in runs) / 1e3:.1f}", seconds


def row(report: dict) -> str:
    """A row of the table in docs/performance.md."""
    (seconds, gb, a), (others, other_gb, b) = cell(report["ours"]), cell(report["peer"])
    phases = [
        statistics.median(one["phases"][name] for one in report["ours"]) if a else float("nan")
        for name in PHASES
    ]
    load = max(one["load_average"] for one in report["ours"] + report["peer"])
    cells = [report["model"], report["share"], "bfloat16" if report["bf16"] else "float32"]
    cells += [seconds, " / ".join(f"{value:.1f}" for value in phases), others]
    cells += [f"{a / b:.2f}" if a and b else "", gb, other_gb, f"{load:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="Qwen2-VL 2B")
    parser.add_argument("--all_weights", action="store_true", help="in place of LoRA")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--completions", type=int, default=4, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=16, help="of each completion")
    parser.add_argument("--layers", type=int, help="this many of them; of Qwen3.5 a multiple of 4")
    parser.add_argument("--peer", action="store_true", help="in turns with TRL's GRPOTrainer")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each, in turns")
    parser.add_argument("--minutes", type=float, help="that a process may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        settings = json.loads(options.worker)
        if settings["beside_peer"]:  # transformers finds the peer's torchvision
            stand_in_for_torchvision()
        print("\n" + json.dumps(ours(settings)))
        return
    if options.make:
        settings = json.loads(options.make)
        make(Path(settings["checkpoint"]), settings)
        return
    raw, share = shortened(options.model, options.layers)
    with torch.device("meta"):
        model = QwenVL(parse_config(raw, options.model))
    with tempfile.TemporaryDirectory() as folder:
        side = 512 if options.model.startswith("Qwen3") else 448
        settings = {
            "folder": folder,
            "checkpoint": str(Path(folder) / "model"),
            "images": str(make_images(Path(folder) / "images", options.prompts, side)),
            "model": options.model,
            "layers": options.layers,
            "share": share,
            "peft": not options.all_weights,
            "lora": None if options.all_weights else adapted(model),
            "bf16": options.dtype == "bfloat16",
            "prompts": options.prompts,
            "group": options.completions,
            "completion": options.tokens,
            "beside_peer": options.peer,
        }
        # by another process, whose memory is not counted
        subprocess.run([sys.executable, __file__, "--make", json.dumps(settings)], check=True)
        report = compare(settings, options)
    print(row(report) if options.peer else json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def adapted(model: QwenVL) -> list[str]:
    """The layers that get an adapter by default, by their names in transformers' model."""
    return [module_name(name) for name in LoRA(16, 32.0).layers(model)]


if __name__ == "__main__":
    main()
