"""Both scripts with a model of each family: on the drawn data sets, and on real photographs."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_cls
import train_det
from benchmarks.material import make_checkpoint
from benchmarks.step import random_reward
from data.flowers import PROBLEM
from data.flowers import rows as flowers
from data.images import open_image
from data.load import load
from models.families import FAMILIES
from models.load import read_config
from models.processor import Processor, qwen_vl_utils
from rewards.format import format_reward
from rewards.parse import find_answer
from tests.runs import (
    SHARED,
    TINY_RUN,
    genuine_checkpoint,
    logits_here_and_in_transformers,
    read_lines,
    save_turned,
    timeless,
    train,
)
from tests.tiny import second_token_weights

by_family = pytest.mark.parametrize("family", FAMILIES)
SHORT = ["--max_steps", "2", "--prompts_per_step", "2", "--num_generations", "4"]
SHORT += ["--eval_samples", "2", "--max_completion_length", "12", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny random checkpoints by family, and `thinking`: a Qwen3-VL with a Thinking template."""
    folder = tmp_path_factory.mktemp("families")
    made = {family: make_checkpoint(folder / family, "tiny", family) for family in FAMILIES}
    made["thinking"] = folder / "thinking"
    shutil.copytree(made["qwen3_vl"], made["thinking"])
    template = Processor(made["qwen3_vl"]).tokenizer.chat_template
    prompt = "<|im_start|>assistant\\n"
    assert prompt in template or "<|im_start|>assistant\n" in template
    for end in (prompt, "<|im_start|>assistant\n"):
        template = template.replace(end, f"{end}<think>{end[-2:] if end == prompt else end[-1]}")
    for name in ("chat_template.json", "chat_template.jinja"):
        (made["thinking"] / name).unlink(missing_ok=True)
    (made["thinking"] / "chat_template.jinja").write_text(template)
    return made


def with_luck(score):
    """Random models earn nothing: they are paid by chance, which their text decides."""

    def scored(completion, row, task):
        earned = score(completion, row, task)
        luck = dict.fromkeys(earned, random_reward(completion))
        return earned if min(earned.values()) == 1 else luck

    return scored


@pytest.mark.slow
@by_family
def test_a_short_run_of_each_script(checkpoints, family, tmp_path, monkeypatch):
    """With gradient checkpointing, two updates and small packs; a run resumed is the same run; and
    final/ gives the same logits in transformers."""
    monkeypatch.setattr(train_cls, "score", with_luck(train_cls.score))
    monkeypatch.setattr(train_det, "score", with_luck(train_det.score))
    model = ["--model_name_or_path", str(checkpoints[family]), *SHORT]
    options = ["--dataset_name", "demo:flowers", "--num_iterations", "2"]
    options += ["--tokens_per_pack", "150"]
    options += ["--save_steps", "1"]
    lines = train(tmp_path / "cls", *model, *options)
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in lines[1:])
    start = load_file(checkpoints[family] / "model.safetensors")
    trained = load_file(tmp_path / "cls" / "final" / "model.safetensors")
    assert start.keys() == trained.keys()
    assert all(not torch.equal(start[name], trained[name].float()) for name in start)
    image = flowers("test", 1)[0]["image"]
    ours, theirs = logits_here_and_in_transformers(tmp_path / "cls" / "final", image, PROBLEM)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)

    shutil.copytree(tmp_path / "cls", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    first = str(tmp_path / "again" / "checkpoint-1")
    output = ["--output_dir", str(tmp_path / "again")]
    assert train_cls.main(["--resume_from_checkpoint", first, *output]) == 0
    again = load_file(tmp_path / "again" / "final" / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)

    options = ["--dataset_name", "demo:scenes", "--freeze_vision", "--dynamic_sampling"]
    options += ["--max_sampling_rounds", "1", "--gradient_checkpointing", "false"]
    lines = train(tmp_path / "det", *model, *options, script=train_det)
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in lines[1:])
    trained = load_file(tmp_path / "det" / "final" / "model.safetensors")
    kept = {name for name in start if torch.equal(start[name], trained[name].float())}
    assert kept == {name for name in start if "visual." in name}


def test_final_has_every_key_of_the_config_that_it_began_with(checkpoints, tmp_path):
    """Also keys that are not read here, such as those for videos; both layouts."""
    for family, nested in (("qwen2_5_vl", False), ("qwen3_vl", True)):
        source = tmp_path / family
        shutil.copytree(checkpoints[family], source)
        raw = json.loads((source / "config.json").read_text())
        raw["vision_config"]["tokens_per_second"] = 2
        raw["max_window_layers"] = 70
        (raw["text_config"] if nested else raw)["dtype"] = "bfloat16"
        (source / "config.json").write_text(json.dumps(raw))
        (source / "video_preprocessor_config.json").write_text('{"fps": 2}')
        run = ["--model_name_or_path", str(source), "--dataset_name", "demo:flowers", *SHORT]
        train(tmp_path / "run" / family, *run, "--max_steps", "1", "--num_generations", "2")
        final = tmp_path / "run" / family / "final"
        (raw["text_config"] if nested else raw)["dtype"] = "float32"
        if not nested:
            raw["torch_dtype"] = "float32"
        assert json.loads((final / "config.json").read_text()) == raw
        assert read_config(final) == read_config(source)
        assert (final / "video_preprocessor_config.json").is_file()


def test_the_plan_says_what_nothing_trains(checkpoints, tmp_path, capsys):
    source = tmp_path / "model"
    shutil.copytree(checkpoints["qwen3_5"], source)
    extra = second_token_weights(read_config(source), torch.float32)
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors")
    model = ["--model_name_or_path", str(source), "--dataset_name", "demo:flowers", *SHORT]
    assert train_cls.main([*model, "--dry_run", "--output_dir", str(tmp_path / "run")]) == 0
    millions = sum(weight.numel() for weight in extra.values()) / 1e6
    said = f"{millions:.1f} M parameters more predict a further token; they are not trained"
    assert said in capsys.readouterr().out


def test_a_thought_that_the_template_opens_counts(checkpoints, tmp_path):
    """The prompt of a Thinking model ends in <think>: what it writes begins inside the thought."""
    plain, processor = (Processor(checkpoints[name]) for name in ("qwen3_vl", "thinking"))
    assert plain.opened == "" and processor.opened == "<think>\n"
    assert processor.chat_text("Why?", 1).endswith("<|im_start|>assistant\n<think>\n")
    written = "It has petals.</think>\n\n<answer>rose</answer>"
    ids = processor.tokenizer(written)["input_ids"]
    text = processor.completion_text([*ids, processor.stop_ids[0]])
    assert text == f"<think>\n{written}" and format_reward(text) == 1
    assert processor.decode(ids) == plain.completion_text(ids) == written
    assert format_reward(plain.completion_text(ids)) == 0
    again = processor.completion_text(processor.tokenizer("<think>" + written)["input_ids"])
    assert format_reward(again) == 0  # a second opening tag
    cut = processor.tokenizer("They want <answer>rose</answer>, so")["input_ids"]
    assert find_answer(processor.completion_text(cut)) == (None, "thought not closed")

    run = ["--model_name_or_path", str(checkpoints["thinking"]), "--dataset_name", "demo:flowers"]
    lines = train(tmp_path / "run", *run, *SHORT)
    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    assert all(line["completion"].startswith("<think>\n") for line in completions)
    assert lines[1]["parse_failures/thought_not_closed"] > 0.5  # of random text
    assert (tmp_path / "run" / "final" / "chat_template.jinja").is_file()


# ---- the genuine vocabulary, real photographs ----------------------------------------------------

real = pytest.mark.skipif(not SHARED.exists(), reason="the shared photographs are not here")


@real
@pytest.mark.slow
@by_family
def test_real_photographs_with_the_genuine_vocabulary(tmp_path, family):
    """ViRFT data in both forms, Qwen2's 151,936 entries, random weights, three steps."""
    model = ["--model_name_or_path", str(genuine_checkpoint(tmp_path / "model", family))]
    metrics, forms = [], ("hf", "") if family == "qwen2_vl" else ("",)
    for form in forms:
        run = tmp_path / f"run{form}"
        data = ["--dataset_name", str(SHARED / "clothing" / form)]
        metrics.append(train(run, *data, *model, *TINY_RUN))
        assert len(metrics[-1]) == 4
    assert timeless(metrics[0]) == timeless(metrics[-1])
    example = load(str(SHARED / "clothing"), "test")[0]
    image = open_image(example.images[0]).resize((224, 224))
    ours, theirs = logits_here_and_in_transformers(run / "final", image, example.problem)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    run = tmp_path / "cards"
    data = ["--dataset_name", str(SHARED / "cards"), "--max_prompt_length", "2048"]
    lines = train(run, *data, *model, *TINY_RUN, script=train_det)
    assert len(lines) == 4 and lines[-1]["eval/AP50"] == 0
    assert json.loads((run / "coco-3.json").read_text()) == []


def real_images(folder) -> dict:
    """Photographs as they are, very wide, tiny, and turned by their EXIF tag (in `folder`)."""
    paths = sorted((SHARED / "clothing" / "images").rglob("*.jpg"))[:2]
    paths += sorted((SHARED / "cards" / "images").rglob("*.*"))[:2]
    images = {path.name: open_image(path) for path in paths}
    one = images[paths[0].name]
    for orientation in (3, 6, 8):
        save_turned(one, orientation, folder / f"turned {orientation}.png")
        images[f"turned {orientation}"] = open_image(folder / f"turned {orientation}.png")
        assert images[f"turned {orientation}"].tobytes() == one.tobytes()
    return images | {
        "wide": one.resize((1900, 40)),
        "tall": one.resize((60, 2000)),
        "tiny": one.resize((9, 7)),
        "very long": one.resize((3000, 20)),
    }


@pytest.mark.slow
@real
@by_family
def test_pixels_and_tokens_are_those_of_transformers(tmp_path, family):
    """With the bounds of the checkpoint's own file, one image and all of them in one prompt."""
    processor = Processor(genuine_checkpoint(tmp_path, family))
    peer = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)  # Auto's, where torchvision is not
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    images = real_images(tmp_path)
    for some in ([image] for image in [*images.values()]), [list(images.values())]:
        for chosen in some:
            keys = tuple(map(str, range(len(chosen))))
            prompt = processor.encode("What is it?", chosen, keys)
            expected = peer(chosen, return_tensors="pt")
            assert torch.equal(prompt.pixel_values, expected["pixel_values"])
            assert torch.equal(prompt.image_grid_thw, expected["image_grid_thw"])
            text = processor.chat_text("What is it?", len(chosen))
            for grid in expected["image_grid_thw"]:
                text = text.replace("<|image_pad|>", "\0" * (int(grid.prod()) // 4), 1)
            ids = tokenizer(text.replace("\0", "<|image_pad|>"))["input_ids"]
            assert prompt.input_ids.tolist() == ids
            sizes = [image.size for image in chosen]
            assert processor.count_tokens("What is it?", sizes) == len(ids)
            for image, (_, h, w) in zip(chosen, prompt.image_grid_thw.tolist(), strict=True):
                patch = processor.config.vision.patch_size
                assert processor.resized(*image.size) == (w * patch, h * patch)
                assert h % 2 == w % 2 == 0


@real
@by_family
def test_pixels_and_tokens_are_those_of_autoprocessor_and_qwen_vl_utils(tmp_path, family):
    """Where torchvision is, transformers resizes with it: some pixels then differ by one or two
    levels of 255. After qwen-vl-utils, which resizes with Pillow as we do, only the rounding of the
    normalization differs."""
    if qwen_vl_utils() is None:
        pytest.skip("qwen_vl_utils cannot be imported: it needs torchvision")
    processor = Processor(genuine_checkpoint(tmp_path, family))
    peer = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(peer).__name__.replace("_", "").lower() == f"{family}processor".replace("_", "")
    bounds = {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
    level = 1 / (255 * min(processor.image_processor.image_std))
    patch = processor.config.vision.patch_size
    for name, image in real_images(tmp_path).items():
        prompt = processor.encode("What is it?", [image], ("a",))
        content = [{"type": "image", "image": image, **bounds}]
        content += [{"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}]
        text = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        fetched, _ = qwen_vl_utils().process_vision_info(messages, image_patch_size=patch)
        for images, bound in ([image], 2.01 * level), (fetched, 1e-6):
            expected = peer(text=[text], images=images, return_tensors="pt")
            assert expected["input_ids"][0].tolist() == prompt.input_ids.tolist()
            assert torch.equal(expected["image_grid_thw"], prompt.image_grid_thw)
            apart = (expected["pixel_values"] - prompt.pixel_values).abs()
            print(f"{family} {name}: apart by {apart.max():.2g} at most, {apart.mean():.2g} mean")
            assert apart.max() < bound and apart.mean() < 0.2 * level
