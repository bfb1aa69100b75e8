"""Random checkpoints in the published format and noise images, for the benchmarks.

tiny    1.9 M parameters, 398 vocabulary entries
mid     21 M, 8,192 entries: small's body with a vocabulary in proportion
small   76 M, 151,936 entries, as many as the published models have
"""

import json
from pathlib import Path

import torch
from PIL import Image

from demo import make_cls as demo
from demo.warm_start import SPECIAL, make_folder
from models.families import parse_config
from models.load import save_model
from models.qwen_vl import QwenVL

SIZES = {
    "tiny": {"width": 128, "layers": 6, "vision": 96, "depth": 3, "entries": 398},
    "mid": {"width": 384, "layers": 8, "vision": 256, "depth": 4, "entries": 8192},
    "small": {"width": 384, "layers": 8, "vision": 256, "depth": 4, "entries": 151936},
}
PROBLEM = "Which flower is this? Answer in <think> </think> and <answer> </answer> tags."


def make_checkpoint(folder: Path, size: str) -> Path:
    """Writes a checkpoint folder with random float32 weights; returns the folder.

    The tokenizer is the flowers' demo's with entries `w0`, `w1`, ... up to the model's vocabulary,
    its special tokens at the end: every entry can be decoded.
    """
    shape = SIZES[size]
    make_folder(folder, demo.corpus())
    learned = json.loads((folder / "vocab.json").read_text())
    fillers = shape["entries"] - len(SPECIAL) - len(learned)
    first = len(learned) + fillers  # of the special tokens
    vocabulary = learned | {f"w{i}": len(learned) + i for i in range(fillers)}
    write(folder / "vocab.json", vocabulary)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = vocabulary
    for index, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = first + index
    write(folder / "tokenizer.json", tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"].values()
    settings["added_tokens_decoder"] = {str(first + i): token for i, token in enumerate(added)}
    write(folder / "tokenizer_config.json", settings)

    special = {text: first + i for i, text in enumerate(SPECIAL)}
    end, pad = special["<|im_end|>"], special["<|endoftext|>"]
    generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad]}
    write(folder / "generation_config.json", generation)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    write(folder / "preprocessor_config.json", processor | {"max_pixels": 1024 * 1024})
    raw = json.loads((folder / "config.json").read_text()) | {
        "vocab_size": shape["entries"],
        "hidden_size": shape["width"],
        "intermediate_size": shape["width"] * 8 // 3,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["width"] // 32,
        "num_key_value_heads": shape["width"] // 64,
        "bos_token_id": pad,
        "eos_token_id": end,
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "torch_dtype": "float32",
    }
    vision = {"hidden_size": shape["width"], "embed_dim": shape["vision"], "depth": shape["depth"]}
    raw["vision_config"] |= vision | {"num_heads": shape["vision"] // 32}
    write(folder / "config.json", raw)
    model = QwenVL(parse_config(raw, size)).initialize(torch.Generator().manual_seed(0))
    save_model(dict(model.named_parameters()), model, folder, folder)
    return folder


def make_images(folder: Path, rows: int, side: int) -> Path:
    """Writes `rows` images of side x side pixels, all different, and train.json; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, table = torch.Generator().manual_seed(side), []
    for row in range(rows):
        pixels = torch.randint(0, 256, (side // 14, side // 14, 3), generator=generator)
        image = Image.fromarray(pixels.to(torch.uint8).numpy()).resize((side, side))
        image.save(folder / f"{row}.png")
        entry = {"image": f"{row}.png", "problem": PROBLEM, "solution": "<answer>oak</answer>"}
        table.append(entry)
    write(folder / "train.json", table)
    return folder


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")
