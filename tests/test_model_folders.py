"""Model folders as other tools leave them: read where it is only a name, else named with the way
out; and config.json of any content."""

import copy
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_cls
from data import files
from data.errors import UserError
from grpo.engine.ranks import Ranks
from grpo.engine.shard import load_weights, materialize
from models.families import parse_config, read_config
from models.folder import weight_files
from models.load import check_checkpoint, check_finite, empty_model, load_model, meta_model
from models.lora import read_adapter
from models.processor import Processor
from tests import tiny
from tests.runs import CHECKPOINT, SHORT

POINTER = files.POINTER + b".github.com/spec/v1\noid sha256:ab\nsize 2882152\n"
DEEP = "[" * 100_000


@pytest.fixture
def model(tmp_path) -> Path:
    return shutil.copytree(CHECKPOINT, tmp_path / "model")


def look(folder: Path) -> None:
    """What every run does before it reads a row."""
    Processor(folder)
    check_checkpoint(folder)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def put(folder: Path, name: str, what) -> None:
    """Replaces a file by text, bytes, a JSON value, a pipe, a folder, or a link."""
    remove(folder, name)
    if what == "pipe":
        os.mkfifo(folder / name)
    elif what == "folder":
        (folder / name).mkdir()
    elif isinstance(what, Path):
        (folder / name).symlink_to(what)
    elif isinstance(what, bytes):
        (folder / name).write_bytes(what)
    else:
        (folder / name).write_text(what if isinstance(what, str) else json.dumps(what))


def changed(folder: Path, name: str, **values) -> None:
    put(folder, name, json.loads((folder / name).read_text()) | values)


def weights() -> dict[str, torch.Tensor]:
    return load_file(CHECKPOINT / "model.safetensors")


def in_shards(folder: Path, count: int = 3) -> None:
    """Without an index, as some copies leave them."""
    remove(folder, "model.safetensors")
    names = sorted(tensors := weights())
    for number in range(1, count + 1):
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number - 1 :: count]}, path)


EVERY = ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
EVERY += ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "what, said",
    [
        (POINTER, "git lfs pull"),
        ("pipe", r"a pipe \(FIFO\)"),
        ("folder", "a folder"),
        (Path("/dev/zero"), "a device"),
        (Path("../../blobs/gone"), "a link to a file that is not there"),
    ],
    ids=["git-lfs", "pipe", "folder", "device", "link"],
)
def test_each_file_must_be_a_regular_file_and_not_a_pointer(model, name, what, said):
    put(model, name, what)
    with pytest.raises(UserError, match=f"{name}: .*{said}"):
        look(model)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.module."])
def test_what_a_wrapper_puts_before_every_name_goes(model, prefix):
    put(model, "model.safetensors", b"")
    save_file({prefix + k: v for k, v in weights().items()}, model / "model.safetensors")
    check_checkpoint(model)
    read = load_model(model, torch.float32, "cpu").state_dict()
    expected = load_model(CHECKPOINT, torch.float32, "cpu").state_dict()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_shards_without_an_index_are_read_if_all_are_there(model):
    in_shards(model)
    look(model)
    read, expected = (load_model(f, torch.float32, "cpu").state_dict() for f in (model, CHECKPOINT))
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing: model-00002-of-00003"):
        look(model)


LEFT_OUT = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize(
    "gone, said",
    [
        (["preprocessor_config.json"], "no preprocessor_config.json. A trainer that saves only"),
        (LEFT_OUT, "no tokenizer_config.json and no tokenizer.json. A trainer"),
        (
            [*LEFT_OUT, "preprocessor_config.json"],
            r"no tokenizer_config.json and no tokenizer.json and no preprocessor_config.json\. .*"
            r"copy them from the folder of the model that it began with \(me/base\)",
        ),
        (["model.safetensors"], "neither model.safetensors nor model.safetensors.index.json"),
        (["config.json"], "no config.json: this is not a model folder"),
    ],
)
def test_files_that_are_missing_are_named_at_once_with_where_they_come_from(model, gone, said):
    changed(model, "config.json", _name_or_path="me/base")
    remove(model, *gone)
    with pytest.raises(UserError, match=said):
        look(model)


def test_a_folder_that_another_trainer_left_names_the_step_that_makes_it_a_model(model):
    remove(model, "model.safetensors")
    cases = [
        ("pytorch_model.bin", r"is a pickle .*\n  python -c .*from_pretrained\('"),
        ("pytorch_model_fsdp_0", "accelerate merge-weights PARTS"),
        ("zero_to_fp32.py", r"python zero_to_fp32.py \. \. --safe_serialization"),
    ]
    for name, said in cases:
        (model / name).touch()
        with pytest.raises(UserError, match=said):
            weight_files(model)
    parent = model.parent
    for number in (9, 10):
        shutil.copytree(CHECKPOINT, parent / f"checkpoint-{number}")
    shutil.rmtree(model)
    with pytest.raises(UserError, match=r"in folders below: give .*/checkpoint-10$"):
        read_config(parent)
    shutil.copytree(CHECKPOINT, parent / "final")
    with pytest.raises(UserError, match=r"give .*/final$"):
        read_config(parent)
    (parent / "adapter" / "checkpoint-7").mkdir(parents=True)
    put(parent / "adapter" / "checkpoint-7", "adapter_config.json", {})
    with pytest.raises(UserError, match=r"there is an adapter in .*/checkpoint-7$"):
        read_adapter(parent / "adapter")


def test_quantized_and_unmerged_weights_are_called_so(model):
    changed(model, "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"quantized \(fp8\).* take the checkpoint in bfloat16"):
        look(model)
    shutil.copyfile(CHECKPOINT / "config.json", model / "config.json")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights() | {name: weights()[name].to(torch.float8_e4m3fn)}, model / "a")
    (model / "a").replace(model / "model.safetensors")
    with pytest.raises(UserError, match="q_proj.weight: F8_E4M3 is not .*\nthe weights are quant"):
        look(model)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in weights().items()}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 128)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match="unexpected\nan adapter is in the same files: merge it"):
        look(model)


@pytest.mark.slow
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_when_they_are_loaded_and_by_a_dry_run(model, number):
    tensors = weights()
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = number
    save_file(tensors, model / "model.safetensors")
    said = "the weight model.layers.1.mlp.up_proj.weight holds NaN or infinity"
    with pytest.raises(UserError, match=said):
        check_finite(model)
    alone = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=said):
        load_weights(materialize(empty_model(model), alone, torch.float32, None), model)
    check_finite(CHECKPOINT)
    argv = ["--model_name_or_path", str(model), "--dataset_name", "demo:flowers", *SHORT]
    with pytest.raises(UserError, match=said):
        train_cls.main([*argv, "--output_dir", str(model / "run"), "--dry_run"])


@pytest.mark.parametrize(
    "name, what, said",
    [
        ("tokenizer.json", DEEP, "the tokenizer cannot be read .*RecursionError"),
        ("tokenizer.json", "{}", "the tokenizer cannot be read .*copy its files again"),
        ("tokenizer.json", "[]", "the tokenizer cannot be read"),
        ("tokenizer_config.json", "null", "the tokenizer cannot be read"),
        ("tokenizer_config.json", DEEP, "the tokenizer cannot be read"),
        ("config.json", DEEP, "config.json: not JSON"),
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", b"\xff\xfe{\0}\0", "not UTF-8 text.* iconv -f UTF-16"),
        ("generation_config.json", DEEP, "generation_config.json: not JSON"),
        ("generation_config.json", {"eos_token_id": [386, 99999]}, "eos_token_id is .* below 400"),
        ("generation_config.json", {"eos_token_id": -1}, r"eos_token_id is \[-1\], not one"),
        ("generation_config.json", {"eos_token_id": True}, "not one or more token ids"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "not one or more token ids"),
        ("chat_template.json", {"chat_template": "{{ raise_exception('no') }}"}, "fails .*: no"),
        ("chat_template.json", {"chat_template": "{% for"}, "fails .*TemplateSyntaxError"),
        ("chat_template.json", {"chat_template": "{{ a.b.c }}"}, "fails .*'a' is undefined"),
        ("chat_template.json", {"chat_template": [1]}, "fails "),
        ("chat_template.json", {"chat_template": "hello"}, "make 0 image tokens .*text model's"),
        ("preprocessor_config.json", {"image_mean": "x"}, "settings cannot be used"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "no numbers that a model can take"),
        ("preprocessor_config.json", {"min_pixels": "x"}, "from 'x' and .* not whole numbers"),
        ("preprocessor_config.json", {"size": [1]}, ""),
        ("model.safetensors.index.json", DEEP, "index.json: not JSON"),
        ("model.safetensors.index.json", {}, "not a weight index: weight_map is None"),
        ("model.safetensors.index.json", {"weight_map": {"a": [1]}}, "not a weight index"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x"}}, "no file of its folder"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x" * 5000}}, "no file of its fol"),
        ("model.safetensors.index.json", {"weight_map": {"a": "a\0"}}, "no file of its folder"),
    ],
)
def test_a_damaged_file_is_one_short_message(model, name, what, said):
    if "index" in name:
        remove(model, "model.safetensors")
    put(model, name, what)
    if not said:  # a setting that has a default
        return look(model)
    with pytest.raises(UserError, match=f"(?s){said}") as caught:
        look(model)
    assert len(str(caught.value)) < 800 and str(model) in str(caught.value)


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(model):
    raw = json.loads((model / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    more = {str(n): raw["396"] | {"content": f"<|new{n}|>"} for n in range(398, 402)}
    changed(model, "tokenizer_config.json", added_tokens_decoder=raw | more)
    with pytest.raises(UserError, match="has the id 401, and config.json a vocabulary of 400"):
        look(model)


def test_settings_of_the_checkpoint_that_are_lists_are_read(model):
    changed(model, "config.json", eos_token_id=[386, 384])
    assert read_config(model).eos_token_id == (386, 384)
    assert hash(read_config(model)) == hash(read_config(model))


WRONG = [None, "x", "8", -1, 0, 1.5, True, [], {}, [1, "a"], {"a": 1}, 10**30, 10**9, float("nan")]
WRONG += [[None] * 3, [[1]], {"b": [1]}, 7]
RAW: dict[str, dict] = {}


def raw_config(family: str) -> dict:
    """A tiny config.json of this family, as tests/tiny.py writes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "parse_config", lambda raw, where: RAW.setdefault(family, raw))
        with suppress(AttributeError):  # it looks at the config
            tiny.family_config(family)
    return RAW[family]


def keys_of(raw: dict, before: tuple = ()):
    for key, value in raw.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_any_value_of_any_key_of_a_config_is_read_or_refused(family, tmp_path):
    raw = raw_config(family)
    refused = 0
    for path in list(keys_of(raw)):
        for value in WRONG:
            other = copy.deepcopy(raw)
            part = other
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = value
            try:
                hash(parse_config(other, "config.json"))
            except UserError as error:
                refused += 1
                assert str(error).startswith("config.json: ") and len(str(error)) < 600
    assert refused > 8 * len(raw), "blunt"
    # each of a size that a model may have, and their product none that a tensor may have
    raw["vision_config"] |= {"spatial_merge_size": 64, "embed_dim": 2**25, "hidden_size": 2**25}
    raw["vision_config"] |= {"window_size": 10**6}
    raw["vision_config"] |= {"out_hidden_size": 48} if family != "qwen2_vl" else {"hidden_size": 48}
    put(tmp_path, "config.json", raw)
    with pytest.raises(UserError, match="no model has these sizes"):
        meta_model(tmp_path)
