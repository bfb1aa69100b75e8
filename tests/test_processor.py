"""Prompts: tokens, pixels and limits, on the demo's checkpoint and the genuine tokenizer."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import models.processor
from data.flowers import PROBLEM, rows
from models.processor import Processor, qwen_vl_utils

CHECKPOINT = Path(__file__).resolve().parent.parent / "data" / "demo_cls" / "checkpoint"
GENUINE = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen2_tokenizer"
SIZES = [(84, 84), (300, 80), (57, 400), (1000, 700), (28, 28), (5, 5), (3000, 20)]


@pytest.fixture
def processor():
    return Processor(CHECKPOINT)


def gradient_image(width, height):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.paste((200, 30, 60), (width // 3, height // 4, width // 2 + 1, height // 2 + 1))
    return image


@pytest.mark.parametrize("size", SIZES)
def test_token_counts_are_known_before_an_image_is_read(processor, size):
    prompt = processor.encode("Which one?", [gradient_image(*size)] * 2, ("a", "b"))
    assert processor.count_tokens("Which one?", [size, size]) == len(prompt)
    image = (prompt.input_ids == processor.config.image_token_id).sum().item()
    assert image == 2 * processor.image_tokens(*size) == prompt.image_grid_thw.prod(1).sum() // 4
    assert len(prompt.pixel_values) == prompt.image_grid_thw.prod(1).sum()


def test_prompts_without_images_have_no_pixels(processor):
    prompt = processor.encode("Say it.", [], ())
    assert len(prompt.pixel_values) == len(prompt.image_grid_thw) == 0
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt)).expand(3, -1))
    assert prompt.next_position == len(prompt)


def test_pixels_are_the_patches_of_the_normalized_image(processor):
    """At a size that needs no resizing, written out by hand."""
    image = gradient_image(56, 84)
    pixels, grid = processor.encode_images([image])
    assert grid.tolist() == [[1, 6, 4]]
    values = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(84, 56, 3) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    values = (values - mean) / std
    index = 0
    for block_row in range(3):
        for block_column in range(2):
            for row in range(2):
                for column in range(2):
                    y, x = 14 * (2 * block_row + row), 14 * (2 * block_column + column)
                    patch = values[y : y + 14, x : x + 14].permute(2, 0, 1)  # channels first
                    twice = patch[:, None].expand(-1, 2, -1, -1)  # a still image is two frames
                    torch.testing.assert_close(pixels[index], twice.flatten(), atol=1e-5, rtol=0)
                    index += 1


def test_qwen_vl_utils_gives_the_same_pixels(processor, monkeypatch):
    """Its fetch_image for still images needs Pillow only; torchvision is stood in for where absent.

    (On a CPU-only torch torchvision cannot be imported, and with it qwen_vl_utils.)
    """
    pytest.importorskip("av", reason="qwen-vl-utils is not installed")
    if qwen_vl_utils() is None:
        for name in ("torchvision", "torchvision.io", "torchvision.transforms"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["torchvision"].io = sys.modules["torchvision.io"]
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
        sys.modules["torchvision"].__version__ = "0.0"
        sys.modules["torchvision.transforms"].InterpolationMode = object
        for name in [name for name in sys.modules if name.startswith("qwen_vl_utils")]:
            monkeypatch.delitem(sys.modules, name)
    utils = pytest.importorskip("qwen_vl_utils.vision_process")
    images = [gradient_image(*size) for size in SIZES]
    monkeypatch.setattr(models.processor, "qwen_vl_utils", lambda: None)
    ours = processor.encode_images(images)
    monkeypatch.setattr(models.processor, "qwen_vl_utils", lambda: utils)
    theirs = processor.encode_images(images)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])


def test_an_image_token_in_the_problem_is_refused(processor):
    with pytest.raises(ValueError, match="stands for an image"):
        processor.encode("What is <|image_pad|> here?", [gradient_image(56, 56)], ("a",))
    with pytest.raises(ValueError, match="stands for an image"):
        processor.count_tokens("What is <|image_pad|> here?", [(56, 56)])


def test_stop_and_suppressed_tokens(processor):
    names = processor.tokenizer.convert_tokens_to_ids
    assert processor.stop_ids == sorted(names(["<|im_end|>", "<|endoftext|>"]))
    suppressed = set(processor.suppressed_ids)
    assert set(names(["<|image_pad|>", "<|vision_start|>", "<|im_start|>"])) <= suppressed
    assert set(range(len(processor.tokenizer), processor.config.vocab_size)) <= suppressed
    text = processor.tokenizer("<think>Six.</think><answer>rose</answer>\n")["input_ids"]
    assert not suppressed & set(text)
    assert len(suppressed | set(processor.stop_ids)) + 384 == processor.config.vocab_size


@pytest.mark.parametrize("text", ["naïve 北京 🙂 é", "a  b\n\n\tc", "<think>x</think>", "1234 5.6"])
def test_the_demo_tokenizer_spells_any_text(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.decode([*ids, processor.stop_ids[-1]]) == text
    assert processor.decode(ids) == text


def test_the_demo_prompt_is_short(processor):
    row = rows("train", 1)[0]
    assert len(processor.encode(PROBLEM, [row["image"]], ("a",))) < 100


@pytest.fixture
def copy(tmp_path):
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def test_files_as_transformers_5_writes_them(copy, processor):
    """processor_config.json in place of preprocessor_config.json, the template in a .jinja file."""
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    low, high = settings.pop("min_pixels"), settings.pop("max_pixels")
    settings["size"] = {"shortest_edge": low, "longest_edge": high}
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    template = tokenizer.pop("chat_template")
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (copy / "chat_template.json").unlink()
    (copy / "chat_template.jinja").write_text(template)
    again = Processor(copy)
    assert (again.min_pixels, again.max_pixels) == (low, high)
    image = gradient_image(300, 200)
    one, two = (p.encode("What?", [image], ("a",)) for p in (processor, again))
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.pixel_values, two.pixel_values)
    # and the published way, where the template stands in chat_template.json alone
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Processor(copy).chat_text("What?", 1) == processor.chat_text("What?", 1)


def test_the_processors_template_comes_before_the_tokenizers(copy, processor):
    """As in transformers' AutoProcessor: the .jinja file, chat_template.json, the tokenizer's."""
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    template = settings["chat_template"]
    write = (copy / "tokenizer_config.json").write_text
    write(json.dumps(settings | {"chat_template": "tokenizer " + template}))
    other = json.dumps({"chat_template": "processor " + template})
    (copy / "chat_template.json").write_text(other)
    assert Processor(copy).chat_text("What?", 0).startswith("processor ")
    (copy / "chat_template.jinja").write_text("newest " + template)
    assert Processor(copy).chat_text("What?", 0).startswith("newest ")
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").unlink()
    assert Processor(copy).chat_text("What?", 0).startswith("tokenizer ")


def test_bounds_on_pixels(copy):
    small = Processor(copy, min_pixels=28 * 28, max_pixels=56 * 56)
    assert small.image_tokens(1000, 1000) == 4
    with pytest.raises(ValueError, match="leave no image size"):
        Processor(copy, min_pixels=100, max_pixels=50)
    with pytest.raises(ValueError, match="the checkpoint's own minimum; give a lower one"):
        Processor(copy, max_pixels=50)


@pytest.mark.parametrize(
    "name, message",
    [
        ("tokenizer_config.json", "tokenizer_config"),
        ("preprocessor_config.json", "preprocessor_config"),
        ("config.json", r"config\.json"),
    ],
)
def test_missing_and_damaged_files_are_named(copy, name, message):
    (copy / name).write_text("{")
    with pytest.raises(ValueError, match=message if name != "tokenizer_config.json" else "token"):
        Processor(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=message):
        Processor(copy)


def test_a_checkpoint_without_chat_template_is_refused(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor(copy)


def test_patch_sizes_must_agree(copy):
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": 16}))
    with pytest.raises(ValueError, match="patch_size is 16"):
        Processor(copy)


def test_the_genuine_tokenizer(tmp_path):
    """Qwen2's own vocabulary and template around a problem, as published."""
    if not GENUINE.exists():
        pytest.skip("the genuine tokenizer is not here")
    for path in GENUINE.iterdir():
        shutil.copy(path, tmp_path)
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw |= {"vocab_size": 151936, "image_token_id": 151655, "video_token_id": 151656}
    raw |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    processor = Processor(tmp_path)
    assert processor.chat_text("What is it?", 1) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.stop_ids == [151645]
    assert set(processor.suppressed_ids) == set(range(151643, 151936)) - {151645}
