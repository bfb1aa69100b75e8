"""One step with the exact shapes of a published model, random weights, on this machine's CPU.

    python -m benchmarks.real_shapes --model "Qwen2-VL 2B" --json FILE

With LoRA, or --all_weights. 2 prompts x 2 completions x 8 tokens, an image of 448 pixels (512 from
Qwen3-VL on: as many tokens), in bfloat16, with random rewards. Prints each phase's seconds, and its
memory beside what `--dry_run` predicts. Weights are made in a temporary folder, which takes twice
their size on disk.
"""

import argparse
import contextlib
import io
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import train_cls
from benchmarks.material import PROCESSORS, make_images, make_vocabulary, write
from benchmarks.memory import SIZES, published
from benchmarks.step import random_reward
from demo.published import save_model
from models.decoding.storage import allocate
from models.families import parse_config
from models.qwen_vl import QwenVL


def make(folder: Path, name: str) -> Path:
    """Writes a checkpoint with this published model's shapes and random bfloat16 weights. Returns
    the folder."""
    raw = published(name)
    special = make_vocabulary(folder, (raw | raw.get("text_config", {}))["vocab_size"])
    raw["image_token_id"] = special["<|image_pad|>"]
    raw["video_token_id"] = special["<|video_pad|>"]
    raw["vision_start_token_id"] = special["<|vision_start|>"]
    raw["vision_end_token_id"] = special["<|vision_end|>"]
    config = parse_config(raw, name)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"patch_size": config.vision.patch_size, "max_pixels": 1024 * 1024}
    settings["processor_class"] = PROCESSORS[config.family]
    write(folder / "preprocessor_config.json", settings)
    with torch.device("meta"):
        model = QwenVL(config)
    model = allocate(model, torch.bfloat16, "cpu").initialize(torch.Generator().manual_seed(0))
    save_model(model, folder, torch.bfloat16)
    return folder


def step(folder: Path, images: Path, all_weights: bool) -> dict:
    """One step of train_cls.py's main() with random rewards."""
    score = train_cls.score

    def scored(completion, row, task):
        earned = score(completion, row, task)
        luck = dict.fromkeys(earned, random_reward(completion))
        return earned if min(earned.values()) == 1 else luck

    train_cls.score = scored
    argv = "" if all_weights else "--use_peft "
    argv += "--bf16 true --max_steps 1 --prompts_per_step 2 --num_generations 2 "
    argv += "--max_completion_length 8 --save_steps 0 --learning_rate 1e-4 --min_pixels 3136"
    paths = ["--model_name_or_path", str(folder), "--dataset_name", str(images)]
    run, said = folder / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        train_cls.main([*argv.split(), *paths, "--output_dir", str(run)])
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").open()]
    predicted = re.findall(r"^  (\w+) +([\d.]+): ", said.getvalue(), re.MULTILINE)
    return {
        "seconds": {k[5:-2]: v for k, v in line.items() if k.startswith("time/")},
        "peak_gb_so_far": {k[7:-3]: v for k, v in line.items() if k.startswith("memory/")},
        "predicted_gb": {name: float(gb) for name, gb in predicted},
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "grad_norm": line["grad_norm"],
        "logp_difference_max": line["sampling/logp_difference_max"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="Qwen2-VL 2B")
    parser.add_argument("--all_weights", action="store_true", help="in place of LoRA")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.model)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"  # made by another process, whose memory is not counted
        command = [sys.executable, "-m", "benchmarks.real_shapes", "--model", options.model]
        subprocess.run([*command, "--make", str(folder)], check=True)
        side = 512 if options.model.startswith("Qwen3") else 448
        images = make_images(Path(temporary) / "images", 2, side)
        report = {"model": options.model, "all_weights": options.all_weights}
        report |= step(folder, images, options.all_weights)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
