"""Adapters: against autograd on W + scale B A, against peft, and in runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import train_cls
import train_det
from benchmarks.memory import peak, published
from demo.published import save_model
from grpo.engine.adapters import lora_of
from grpo.engine.optimizer import Optimizer
from grpo.flags.config import TrainingConfig
from grpo.logps import pack_chunks, pack_logps
from grpo.pack import make_packs
from grpo.run.checks import check_copies
from models.families import FAMILIES, parse_config
from models.load import find_folder, load_model
from models.lora import (
    SETTINGS,
    WEIGHTS,
    LoRA,
    LoRALinear,
    check_fit,
    initial,
    is_adapter,
    read_adapter,
    without_adapters,
)
from tests.peer import own_hidden, reference_inputs, reference_model
from tests.runs import CHECKPOINT, SHORT, assert_resumes, read_lines, train
from tests.test_families import GRIDS, groups_of
from tests.tiny import IMAGE, family_config, tiny_model, tiny_prompt

by_family = pytest.mark.parametrize("family", FAMILIES)
TOWER = {"qwen2_vl": "visual.fc1", "qwen2_5_vl": "visual.gate_proj", "qwen3_vl": "visual.proj"}
TOWER["qwen3_5"] = TOWER["qwen3_vl"]
DELTA = ("in_proj_qkv", "in_proj_z", "out_proj")  # of linear attention


def adapted(family: str, targets=("q_proj", "v_proj", "down_proj"), b: float = 0.3, **more):
    """A tiny float64 model with adapters, also in linear attention; b: the size of B."""
    model = tiny_model(family_config(family))
    targets = (*targets, *DELTA) if family == "qwen3_5" else targets
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.adapt(LoRA(3, 4.0, tuple(targets), **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(initial(name, parameter.shape, seed=1))
                if name.endswith("lora_B"):
                    parameter.normal_(0, b) if b else parameter.zero_()
    return model, base


@by_family
def test_off_it_is_the_base_and_at_the_start_too(family):
    prompt = tiny_prompt(family_config(family), GRIDS["several"])
    plain = own_hidden(tiny_model(family_config(family)), [prompt])
    targets = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", TOWER[family])
    model, _ = adapted(family, targets)
    assert not torch.equal(own_hidden(model, [prompt]), plain)
    with without_adapters(model):
        assert torch.equal(own_hidden(model, [prompt]), plain)
    assert not torch.equal(own_hidden(model, [prompt]), plain), "they are on again"
    model, _ = adapted(family, targets, b=0)
    assert torch.equal(own_hidden(model, [prompt]), plain)


def test_the_gates_of_linear_attention_have_no_adapters_by_default():
    """They are as narrow as there are heads."""
    layers = LoRA(3, 4.0).layers(tiny_model(family_config("qwen3_5")))
    mixers = {name.removeprefix("model.layers.") for name in layers if ".mlp." not in name}
    expected = {f"{i}.linear_attn.{name}" for i in (1, 2) for name in DELTA}
    expected |= {f"{i}.self_attn.{name}_proj" for i in (0, 3) for name in "qkvo"}
    assert mixers == expected and len(layers) == len(mixers) + 4 * 3


@pytest.mark.parametrize("use_rslora", [False, True])
@by_family
def test_gradients_equal_autograd_on_the_merged_weight(family, use_rslora):
    """Packed, against W + scale B A put in the place of W, prompt and completions in one pack and
    each pack by itself; sampled log-probs are those of training; the base has no gradient."""
    torch.manual_seed(0)
    targets = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", TOWER[family])
    model, base = adapted(family, targets, use_rslora=use_rslora)
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    groups = groups_of(model, 4)
    (pack,) = make_packs(groups, 10**9)
    sampled = torch.cat([logp for group in groups for logp in group.sampling_logps])
    with torch.no_grad():
        torch.testing.assert_close(pack_logps(model, pack, 1.0).float(), sampled)

    plain = tiny_model(family_config(family))
    plain.suppressed_ids = model.suppressed_ids
    adapters = {
        n: p.detach().requires_grad_() for n, p in model.named_parameters() if is_adapter(n)
    }
    scale = 4.0 / (3**0.5 if use_rslora else 3)
    weights = dict(base)
    for name in adapters:
        if name.endswith("lora_A"):
            layer = name.removesuffix(".lora_A")
            change = scale * adapters[f"{layer}.lora_B"] @ adapters[name]
            weights[f"{layer}.weight"] = base[f"{layer}.weight"] + change

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = plain

        def forward(self):
            return pack_logps(self.model, pack, 1.0).sum()

    scored = functional_call(Scored(), {f"model.{n}": w for n, w in weights.items()}, ())
    expected = torch.autograd.grad(scored, list(adapters.values()))
    for part in make_packs(groups, 120):
        for tokens in pack_chunks(model, part, 1.0, chunk=7):
            tokens.logps.sum().backward()
    for (name, _), gradient in zip(adapters.items(), expected, strict=True):
        found = model.get_parameter(name).grad
        assert gradient.abs().max() > 1e-6, "a blunt test"
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-10)
    assert all(p.grad is None for n, p in model.named_parameters() if not is_adapter(n))


@by_family
def test_merged_weights_give_the_same_logits(family):
    model, base = adapted(family)
    prompt = tiny_prompt(model.config, GRIDS["one"])
    plain = tiny_model(family_config(family))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                change = layer.scale * layer.lora_B @ layer.lora_A
                plain.get_submodule(name).weight += change
                merged = layer.merged(base[f"{name}.weight"], layer.lora_A, layer.lora_B)
                torch.testing.assert_close(merged, (base[f"{name}.weight"] + change).float())
    torch.testing.assert_close(own_hidden(model, [prompt]), own_hidden(plain, [prompt]))


def test_initial_values_follow_from_seed_and_name():
    shape = torch.Size((8, 100))
    one = initial("model.layers.0.mlp.up_proj.lora_A", shape, 3)
    assert torch.equal(one, initial("model.layers.0.mlp.up_proj.lora_A", shape, 3))
    assert not torch.equal(one, initial("model.layers.1.mlp.up_proj.lora_A", shape, 3))
    assert not torch.equal(one, initial("model.layers.0.mlp.up_proj.lora_A", shape, 4))
    assert one.abs().max() <= 0.1 and one.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert not initial("model.layers.0.mlp.up_proj.lora_B", shape, 3).any()


# ---- runs ----------------------------------------------------------------------------------------

LORA = [*SHORT, "--use_peft", "--lora_r", "4", "--learning_rate", "5e-3", "--warmup_ratio", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps of two updates with a checkpoint after each second."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    options = ["--max_steps", "4", "--save_steps", "2", "--num_iterations", "2", "--kl_alarm", "9"]
    train(folder, *LORA, *options)
    return folder


@pytest.mark.slow
def test_a_run_trains_adapters_alone(run):
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in steps)
    assert steps[0]["kl_max"] < 1e-9 < steps[-1]["kl_max"], "the reference is the base"
    saved = load_file(run / "checkpoint-4" / WEIGHTS)
    assert all(".lora_" in name for name in saved) and len(saved) == 4 * 7 * 2
    start = load_file(CHECKPOINT / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    assert final.keys() == start.keys()
    for name, weight in final.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        key = key.replace("model.layers.", "model.language_model.layers.")
        if f"{key}.lora_A.weight" in saved:
            change = 8 * saved[f"{key}.lora_B.weight"] @ saved[f"{key}.lora_A.weight"]
            torch.testing.assert_close(weight, start[name].float() + change)
            assert change.any()
        else:
            assert torch.equal(weight, start[name].float()), name


@pytest.mark.slow
def test_a_run_resumed_is_the_run_that_was_never_stopped(run, tmp_path):
    assert_resumes(run, tmp_path / "run", "checkpoint-4", "final")


@pytest.mark.slow
def test_peft_loads_our_adapter_and_final_is_merged(run):
    import peft

    prompt_ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    inputs = {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
    inputs["mm_token_type_ids"] = torch.zeros_like(prompt_ids)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    merged = load(run / "final", dtype=torch.float32)(**inputs).logits
    base = load(CHECKPOINT, dtype=torch.float32)
    plain = base(**inputs).logits.detach()
    for folder in (run / "final" / "adapter", run / "checkpoint-4"):
        model = peft.PeftModel.from_pretrained(load(CHECKPOINT, dtype=torch.float32), folder)
        torch.testing.assert_close(model(**inputs).logits, merged, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 1e-3, "a blunt test"
    raw = json.loads((run / "final" / "adapter" / SETTINGS).read_text())
    assert raw["base_model_name_or_path"] == str(CHECKPOINT)
    assert (raw["r"], raw["lora_alpha"]) == (4, 32)


@by_family
def test_ours_is_what_peft_saves(family, tmp_path):
    """An adapter made by peft, of some layers only: the same logits here."""
    import peft

    model = tiny_model(family_config(family), torch.float32, scale=2)
    peer = reference_model(model, torch.float32)
    settings = {
        "r": 5,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "up_proj", *(DELTA if family == "qwen3_5" else ())],
        "use_rslora": True,
    }
    settings["layers_to_transform"], settings["layers_pattern"] = [0, 2], "layers"
    peer = peft.get_peft_model(peer, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    peer.save_pretrained(tmp_path / "adapter")
    save_model(model, tmp_path / "base")
    prompt = tiny_prompt(model.config, GRIDS["several"])
    expected = peer(**reference_inputs(prompt, torch.float32)).logits[0]

    lora = read_adapter(tmp_path / "adapter")
    loaded = load_model(tmp_path / "base", torch.float32, "cpu")
    loaded.adapt(lora)
    check_fit(tmp_path / "adapter", loaded)
    Optimizer(loaded, 0.0).start([tmp_path / "adapter" / WEIGHTS], None)
    logits = own_hidden(loaded, [prompt]) @ loaded.head_weight.T
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    plain = own_hidden(model, [prompt]) @ model.head_weight.T
    assert (logits - plain).abs().max() > 0.01, "a blunt test"


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter(run, tmp_path):
    """Another seed and rate: step 1 is the policy that the adapter is, KL counts from the base."""
    adapter = str(run / "final" / "adapter")
    options = [*SHORT, "--use_peft", "--adapter_name_or_path", adapter, "--max_steps", "1"]
    lines = train(tmp_path / "run", *options, "--learning_rate", "0")
    assert lines[1]["kl"] > 0
    one = load_file(run / "final" / "adapter" / WEIGHTS)
    two = load_file(tmp_path / "run" / "final" / "adapter" / WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in one)
    again = ["--config", str(tmp_path / "run" / "config.yaml")]  # names --lora_r, its default
    train(tmp_path / "again", *again)
    three = load_file(tmp_path / "again" / "final" / "adapter" / WEIGHTS)
    assert all(torch.equal(two[name], three[name]) for name in two)
    with pytest.raises(ValueError, match="--lora_r 8: the adapter in .* has 4; leave it out"):
        train(tmp_path / "other", *options, "--lora_r", "8")
    with pytest.raises(ValueError, match="an adapter, not a model: name its base"):
        train_cls.main(["--model_name_or_path", adapter, "--dataset_name", "demo:flowers"])


def test_the_tower_has_adapters_where_it_is_named(tmp_path):
    options = [*LORA, "--max_steps", "1", "--lora_target_modules", "visual.qkv", "v_proj"]
    train(tmp_path / "run", *options)
    saved = load_file(tmp_path / "run" / "final" / "adapter" / WEIGHTS)
    names = {name.split(".")[-3] for name in saved}
    assert names == {"qkv", "v_proj"}
    assert all(saved[name].any() for name in saved if "qkv.lora_B" in name), "not trained"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--use_peft", "--lora_dropout", "0.05"], "--lora_dropout is 0.05; it must be 0"),
        (["--lora_dropout", "0.05"], "--lora_dropout is 0.05; it must be 0"),
        (["--use_peft", "--lora_target_modules", "lm_head"], "no linear layer lm_head for"),
        (
            ["--use_peft", "--freeze_vision", "--lora_target_modules", "visual.qkv"],
            "--freeze_vision does not go with --lora_target_modules, which has layers of the",
        ),
        (["--use_peft", "--lora_target_modules", "qproj"], "no linear layer qproj .* q_proj"),
        (
            ["--use_peft", "--adapter_name_or_path", "nowhere"],
            "nowhere: no such folder",
        ),
        (["--use_peft", "--lora_task_type", "x"], "unknown flag --lora_task_type"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_cls.main([*SHORT, "--output_dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"peft_type": None}, "peft_type = None is not supported"),
        ({"r": "4"}, "r is '4', not a positive number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a positive number"),
        ([1], "holds no JSON object"),
    ],
)
def test_other_adapters_of_peft_are_refused(run, tmp_path, change, message):
    shutil.copytree(run / "final" / "adapter", tmp_path / "a")
    raw = json.loads((tmp_path / "a" / SETTINGS).read_text())
    raw = raw | change if isinstance(change, dict) else change
    (tmp_path / "a" / SETTINGS).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "rename, shape, message",
    [
        (
            "layers.0.self_attn.q_proj",
            (8, 128),
            "q_proj.lora_A has shape .8, 128., this",
        ),
        ("layers.7.self_attn.q_proj", None, "no linear layer model.layers.7.self_attn.q_proj"),
        ("", None, "lora_A is missing, and 0 more"),
    ],
)
def test_an_adapter_of_another_model_is_refused_before_weights_are_loaded(
    run, tmp_path, rename, shape, message
):
    """Also where its rows could be cut to fit."""
    shutil.copytree(run / "final" / "adapter", tmp_path / "a")
    weights = load_file(tmp_path / "a" / WEIGHTS)
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    old = weights.pop(key)
    if rename:
        weights[key.replace("layers.0.self_attn.q_proj", rename)] = (
            old if shape is None else torch.zeros(shape)
        )
    save_file(weights, tmp_path / "a" / WEIGHTS)
    argv = [*SHORT, "--use_peft", "--adapter_name_or_path", str(tmp_path / "a"), "--dry_run"]
    with pytest.raises(ValueError, match=message):
        train_cls.main([*argv, "--output_dir", str(tmp_path / "run")])


@pytest.mark.slow
def test_a_changed_base_is_noticed_on_resuming_without_a_reference(tmp_path):
    """Its checkpoints hold adapters alone, and --beta 0 loads no reference."""
    base = tmp_path / "base"
    shutil.copytree(CHECKPOINT, base)
    options = [*LORA, "--beta", "0", "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    paths = ["--model_name_or_path", str(base), "--dataset_name", "demo:flowers"]
    assert train_cls.main([*paths, *options]) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, base / "model.safetensors")
    resume = ["--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="the base model is not what the run began with"):
        train_cls.main([*resume, "--max_steps", "3"])


@pytest.mark.slow
def test_detection_with_adapters_and_everything_on(tmp_path):
    options = [
        "--max_steps",
        "2",
        "--prompts_per_step",
        "2",
        "--num_generations",
        "4",
        "--use_peft",
    ]
    options += ["--eval_samples", "4", "--max_completion_length", "96", "--learning_rate", "5e-3"]
    options += ["--dynamic_sampling", "--bf16", "true", "--gradient_checkpointing", "true"]
    lines = train(tmp_path / "run", *options, script=train_det)
    assert all(line["sampling/logp_difference_max"] < 0.5 for line in lines[1:])
    assert load_file(tmp_path / "run" / "final" / "adapter" / WEIGHTS)


@pytest.mark.slow
def test_the_plan_of_published_sizes_with_adapters():
    """What a card of 24 GB has room for."""
    assert find_folder(str(CHECKPOINT)) == CHECKPOINT
    flags = {"use_peft": True, "tokens_per_pack": 4096}
    for name, prompts, most in (
        ("Qwen2-VL 2B", 8, 12),
        ("Qwen2.5-VL 7B", 8, 22.5),
        ("Qwen3-VL 8B", 4, 22.5),  # 22.53 with 8
    ):
        config = parse_config(published(name), name)
        assert lora_of(TrainingConfig(model_name_or_path="m", dataset_name="d")) is None
        assert peak(config, 1, prompts_per_step=prompts, **flags) < most, name
        assert peak(config, 1, **flags) < 0.4 * peak(config, 1)
        assert peak(config, 8, **flags) < peak(config, 1, **flags), "nothing is held twice"


def test_ranks_whose_adapters_differ_are_found():
    model, _ = adapted("qwen2_vl")
    model = model.float()
    ranks = SimpleNamespace(world=2, gather=lambda mine: [*mine, *mine])
    optimizer = Optimizer(model, 0.0, ranks)
    check_copies(optimizer, ranks)
    ranks.gather = lambda mine: [mine[0], mine[0] + 1]
    with pytest.raises(RuntimeError, match="no longer the same on all ranks"):
        check_copies(optimizer, ranks)
