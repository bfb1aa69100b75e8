"""Running the training scripts, and reading what they wrote."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from PIL import Image

import train_cls
from benchmarks.material import PROCESSORS
from data.flowers import rows
from demo.published import save_model
from grpo.reward import Record
from grpo.rollout import Group
from models.families import parse_config
from models.load import load_model
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


def module_of(path: Path):
    """A changed copy of a source as a module of its own."""
    name = "changed_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


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
    prefixes = ("time/", "memory/", "perf/", "step_time")
    return [{k: v for k, v in line.items() if not k.startswith(prefixes)} for line in lines]


def assert_resumes(run: Path, again: Path, *later: str) -> None:
    """A copy of the run without what came `later`, resumed, ends as the run did: weights byte for
    byte, metrics but for the clock's."""
    shutil.copytree(run, again)
    for name in later:
        shutil.rmtree(again / name)
    assert train_cls.main(["--output_dir", str(again), "--resume_from_checkpoint", "auto"]) == 0
    files = [path.relative_to(run) for path in run.glob("final/**/*.safetensors")]
    assert files
    for name in files:
        assert (run / name).read_bytes() == (again / name).read_bytes(), name
    lines = [timeless(read_lines(folder / "metrics.jsonl")) for folder in (run, again)]
    assert lines[0] == lines[1]


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


def save_turned(upright: Image.Image, orientation: int, path: Path) -> None:
    """The image as a camera held so would store it, with the EXIF tag that turns it back."""
    turns = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}
    turns |= {8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    stored.save(path, exif=exif)


class Checked(list):
    """Rows as `load_splits` returns them where nothing is wrong."""

    asked_frame, stated_frame, faults, name, source = None, None, (), "rows", "rows"

    @property
    def sound(self) -> list:
        return list(self)

    @property
    def sizes(self) -> dict:
        return {row.index: [row.size] for row in self}


def data_of(*splits, processor=None, answer_format="think") -> SimpleNamespace:
    """What `read_task` looks at."""
    return SimpleNamespace(
        splits=splits, sets={"": splits}, processor=processor, answer_format=answer_format
    )


def said(rows, texts: list[str]) -> list[Group]:
    """Groups of one completion, one for each row."""
    groups = []
    for row, text in zip(rows, texts, strict=True):
        record = Record(row.index, "", None, text, {}, {}, 0.0, 1, False)
        groups.append(Group(None, [[0]], row=row, records=[record]))
    return groups


def genuine_checkpoint(folder: Path, family: str = "qwen2_vl") -> Path:
    """Random weights, tiny, with Qwen2's own vocabulary of 151,936 entries and template."""
    raw = json.loads((CHECKPOINT / "config.json").read_text()) | {"model_type": family}
    raw |= {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "eos_token_id": 151645}
    raw |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    vision = {"hidden_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1, "patch_size": 14}
    settings = json.loads((SHARED / "qwen2_tokenizer" / "preprocessor_config.json").read_text())
    if family != "qwen2_vl":
        vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "depth": 2}
        vision |= {"num_heads": 2, "window_size": 112, "fullatt_block_indexes": [1]}
    if family in ("qwen3_vl", "qwen3_5"):
        raw["text_config"] = {"head_dim": 24, "rope_theta": 5e6}
        raw["rope_scaling"] = {"mrope_section": [4, 4, 4], "mrope_interleaved": True}
        vision |= {"patch_size": 16, "num_position_embeddings": 16}
        if family == "qwen3_vl":
            vision |= {"deepstack_visual_indexes": [0]}
        else:
            raw["text_config"] |= {"full_attention_interval": 2, "linear_num_key_heads": 1}
            raw["text_config"] |= {"linear_num_value_heads": 2, "linear_key_head_dim": 16}
            raw["text_config"] |= {"linear_value_head_dim": 16}
            raw["rope_scaling"] |= {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.25}
        size = {"longest_edge": 16777216, "shortest_edge": 65536}
        settings |= {"patch_size": 16, "size": size, "image_mean": [0.5] * 3}
        settings |= {"image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessorFast"}
        settings = {k: v for k, v in settings.items() if k not in ("min_pixels", "max_pixels")}
    settings["processor_class"] = PROCESSORS[family]
    raw["vision_config"] = vision
    model = QwenVL(parse_config(raw, "test")).initialize(torch.Generator().manual_seed(0))
    shutil.copytree(SHARED / "qwen2_tokenizer", folder, dirs_exist_ok=True)
    save_model(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


TINY_RUN = ["--max_steps", "3", "--prompts_per_step", "2", "--num_generations", "2"]
TINY_RUN += ["--max_completion_length", "6", "--min_pixels", "3136", "--max_pixels", "50176"]
TINY_RUN += ["--eval_samples", "2"]


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
    peer = transformers.AutoModelForImageTextToText.from_pretrained(
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
