"""Random checkpoints of each family in the published format, and noise images, for the benchmarks.

tiny    1.9 M parameters, 398 vocabulary entries
mid     21 M, 8,192 entries: small's body with a vocabulary in proportion
small   76 M, 151,936 entries, as many as the published models have

(Parameters of Qwen2-VL's; the other families' towers have a few more.)
"""

import json
from pathlib import Path

import torch
from PIL import Image

from demo import make_cls as demo
from demo.published import save_model
from demo.warm_start import CONTENT, SPECIAL, make_folder
from models.families import parse_config
from models.qwen_vl import QwenVL

SIZES = {
    "tiny": {"width": 128, "layers": 6, "vision": 96, "depth": 3, "entries": 398},
    "mid": {"width": 384, "layers": 8, "vision": 256, "depth": 4, "entries": 8192},
    "small": {"width": 384, "layers": 8, "vision": 256, "depth": 4, "entries": 151936},
}
PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}
# Qwen3.5's in its manner: what is said is trimmed, and an answer begins in a thought or, as the
# smaller models do where nothing is said of it, after an empty one.
THINKING_TEMPLATE = (
    "{% for message in messages %}{% set content %}"
    + CONTENT
    + "{% endset %}<|im_start|>{{ message['role'] }}\n{{ content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{{ '' if enable_thinking else '\n</think>\n\n' }}{% endif %}"
)
PROBLEM = "Which flower is this? Answer in <think> </think> and <answer> </answer> tags."


def make_vocabulary(folder: Path, entries: int) -> dict[str, int]:
    """Writes all files of a checkpoint folder but config and weights, for `entries` tokens. Returns
    the ids of the special tokens.

    The tokenizer is that of the flowers' demo, with further entries `w0`, `w1`, ... up to the
    model's vocabulary and the special tokens at the end, so that every id can be decoded.
    """
    make_folder(folder, demo.corpus())
    learned = json.loads((folder / "vocab.json").read_text())
    fillers = entries - len(SPECIAL) - len(learned)
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
    return special


def make_checkpoint(folder: Path, size: str, family: str = "qwen2_vl") -> Path:
    """Writes a checkpoint folder with random float32 weights; returns the folder.

    Widths, depths and heads are the same for all families. Qwen2.5-VL has full attention in its
    last vision block, Qwen3-VL DeepStack after its first and a patch of 16 pixels, as published.
    Qwen3.5 has that patch, full attention in each fourth layer, a quarter of a head rotated, and
    half as many heads of keys as of values in the others.
    """
    shape = SIZES[size]
    special = make_vocabulary(folder, shape["entries"])
    end, pad = special["<|im_end|>"], special["<|endoftext|>"]
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"max_pixels": 1024 * 1024, "processor_class": PROCESSORS[family]}
    write(folder / "preprocessor_config.json", processor)
    raw = json.loads((folder / "config.json").read_text()) | {
        "model_type": family,
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
    vision = raw["vision_config"] | vision | {"num_heads": shape["vision"] // 32}
    if family != "qwen2_vl":
        vision |= {"out_hidden_size": shape["width"], "hidden_size": vision.pop("embed_dim")}
        vision |= {"intermediate_size": 4 * shape["vision"], "model_type": family}
        del vision["hidden_act"]  # each family's own
    if family == "qwen2_5_vl":
        vision |= {"window_size": 112, "fullatt_block_indexes": [shape["depth"] - 1]}
        vision["intermediate_size"] = shape["vision"] * 8 // 3  # three matrices, of 2/3 the width
    if family in ("qwen3_vl", "qwen3_5"):
        vision |= {"patch_size": 16, "num_position_embeddings": 48 * 48}
        rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        raw |= {"head_dim": 32, "rope_scaling": rope}
        write(folder / "preprocessor_config.json", processor | {"patch_size": 16})
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0]}
    if family == "qwen3_5":
        rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
        raw |= {"linear_key_head_dim": 32, "linear_num_key_heads": shape["width"] // 64}
        raw |= {"linear_value_head_dim": 32, "linear_num_value_heads": shape["width"] // 32}
        for name in ("tokenizer_config.json", "chat_template.json"):
            settings = json.loads((folder / name).read_text())
            write(folder / name, settings | {"chat_template": THINKING_TEMPLATE})
    raw["vision_config"] = vision
    model = QwenVL(parse_config(raw, size)).initialize(torch.Generator().manual_seed(0))
    save_model(model, folder)
    return folder


def make_images(folder: Path, rows: int, side: int) -> Path:
    """Writes `rows` different images of side x side pixels and train.json. Returns the folder."""
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
