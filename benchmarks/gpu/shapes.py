"""Models of published shapes without files of weights, and the work of a step.

A model's folder has a real config.json and tokenizer, and a file of weights that is all header:
names and shapes are checked as ever, and the numbers are drawn on the device (`draw_weights`).
"narrow" models have the published kinds of layers, few of them and few numbers in each.
"""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.launches import narrow
from benchmarks.material import PROCESSORS, make_vocabulary, write
from benchmarks.memory import published
from benchmarks.step import stand_in_for_torchvision
from demo.published import config_dict
from models.config import QwenVLConfig
from models.families import parse_config, published_name
from models.four_bit import four_bit_layers
from models.qwen_vl import QwenVL

NARROW_ENTRIES = 1016  # of the vocabulary


class Work(NamedTuple):
    """A step: prompts, completions of each, their tokens, and an image's pixels a side for a patch
    of 14 pixels; of 16 as many tokens."""

    prompts: int
    group: int
    completion: int
    image: int

    @property
    def flags(self) -> str:
        sizes = f"--prompts_per_step {self.prompts} --num_generations {self.group} "
        return sizes + f"--max_completion_length {self.completion}"


WORK = {"published": Work(8, 8, 256, 448), "narrow": Work(2, 2, 20, 112)}


def config_of(name: str, shapes: str) -> dict:
    """config.json of a model of benchmarks/memory.py, in what a shape depends on."""
    if shapes == "published":
        return published(name)
    raw = narrow(name)
    text = raw.get("text_config", raw)
    text["num_hidden_layers"] = 4
    raw["vision_config"]["depth"] = 4
    for levels in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if levels in raw["vision_config"]:
            raw["vision_config"][levels] = [1, 3]
    return raw


def make_model(folder: Path, name: str, shapes: str) -> QwenVLConfig:
    """Writes a checkpoint's folder whose weights' file has no numbers; returns its config."""
    raw = config_of(name, shapes)
    entries = (raw | raw.get("text_config", {}))["vocab_size"]
    special = make_vocabulary(folder, entries)
    raw["image_token_id"] = special["<|image_pad|>"]
    raw["video_token_id"] = special["<|video_pad|>"]
    raw["vision_start_token_id"] = special["<|vision_start|>"]
    raw["vision_end_token_id"] = special["<|vision_end|>"]
    config = parse_config(raw, name)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"patch_size": config.vision.patch_size, "max_pixels": 1024 * 1024}
    write(
        folder / "preprocessor_config.json",
        settings | {"processor_class": PROCESSORS[config.family]},
    )
    write(folder / "config.json", config_dict(config, "bfloat16"))
    with torch.device("meta"):
        model = QwenVL(config)
    write_header(folder / "model.safetensors", model)
    return config


def write_header(path: Path, model: QwenVL) -> None:
    """A safetensors file of the model's shapes in bfloat16, whose numbers take no room on a disk:
    they are a hole in the file."""
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        entry = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
        header[published_name(name, model.config)] = entry
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@torch.no_grad()
def draw_weights(model: QwenVL, folder=None) -> None:
    """In the place of `load_weights`: the same random weights each time, drawn on the device."""
    torch.manual_seed(0)
    model.initialize()  # adapters too, which get their own numbers later
    for layer in four_bit_layers(model).values():
        size = layer.out_features, layer.in_features
        weight = torch.empty(size, device=model.device, dtype=model.dtype)
        layer.pack(weight.normal_(0.0, model.config.initializer_range))


def allow_any_torchvision() -> None:
    """Lets processors be read beside a torchvision that was built for another torch, as the peer
    needs one on a CPU."""
    if importlib.util.find_spec("torchvision"):
        stand_in_for_torchvision()


def image_side(config: QwenVLConfig, work: Work) -> int:
    """Pixels a side of an image of as many tokens for every family."""
    return work.image * config.vision.patch_size // 14
