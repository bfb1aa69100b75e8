"""Running the training scripts, and reading what they wrote."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import train_cls
from data.flowers import rows
from models.families import parse_config
from models.load import load_model, save_model
from models.processor import Processor
from models.qwen_vl import QwenVL, image_features

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # photographs; tests that need them skip without
CHECKPOINT = ROOT / "data" / "demo_cls" / "checkpoint"
SHORT = ["--max_steps", "2", "--prompts_per_step", "2", "--num_generations", "4"]
SHORT += ["--eval_samples", "6", "--max_completion_length", "40"]


def train(folder: Path, *argv: str, script=train_cls) -> list[dict]:
    """Runs the script's main() in this process; the numbers of each step (`read_steps`)."""
    assert script.main(["--output_dir", str(folder), *argv]) == 0
    return read_steps(folder)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_steps(folder: Path) -> list[dict]:
    """metrics.jsonl, the lines of a step merged: its own and that of an evaluation after it."""
    steps: dict[int, dict] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        steps.setdefault(line["step"], {}).update(line)
    return list(steps.values())


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


def detection_set(
    folder: Path, solution="<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>"
) -> Path:
    rows("train", 1)[0]["image"].save(folder / "a.png")
    table = [{"image": "a.png", "problem": "Find it.", "solution": solution}]
    (folder / "train.json").write_text(json.dumps(table))
    return folder


def genuine_checkpoint(folder: Path) -> Path:
    """Random weights, tiny, with Qwen2's own vocabulary of 151,936 entries."""
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw |= {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "eos_token_id": 151645}
    raw |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    raw["vision_config"] |= {"hidden_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1}
    model = QwenVL(parse_config(raw, "test")).initialize(torch.Generator().manual_seed(0))
    save_model(dict(model.named_parameters()), model, folder, SHARED / "qwen2_tokenizer")
    return folder


TINY_RUN = ["--max_steps", "3", "--prompts_per_step", "2", "--num_generations", "2"]
TINY_RUN += ["--max_completion_length", "6", "--max_pixels", "50176", "--eval_samples", "2"]


def logits_here_and_in_transformers(folder: Path, image, problem: str):
    processor = Processor(folder)
    prompt = processor.encode(problem, [image], ("a",))
    model = load_model(folder, torch.float32, "cpu")
    hidden = model(
        prompt.input_ids,
        prompt.position_ids,
        model.bounds([(len(prompt),)]),
        image_features(model, [prompt]),
    )
    peer = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        processor.chat_text(problem, 1).replace(
            "<|image_pad|>", "<|image_pad|>" * processor.image_tokens(*image.size)
        ),
        return_tensors="pt",
    )["input_ids"]
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)([image], return_tensors="pt")
    is_image = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        expected = peer(input_ids=ids, mm_token_type_ids=is_image, **pixels).logits[0]
    return hidden @ model.head_weight.T, expected
