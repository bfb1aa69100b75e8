"""Each family against transformers, on random weights of odd sizes."""

import json
import random
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from benchmarks.memory import SIZES, published
from demo.published import save_model
from grpo.engine.optimizer import Optimizer
from grpo.engine.ranks import Ranks
from grpo.engine.shard import load_weights
from grpo.logps import pack_chunks, pack_logps
from grpo.pack import make_packs
from grpo.rollout import Group
from grpo.run.checkpoint import save_final
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.decoding.product import joined
from models.decoding.storage import allocate
from models.families import FAMILIES, parse_config, read_config
from models.folder import weight_files
from models.load import empty_model, load_model
from models.lora import LoRA, is_adapter
from models.names import parameter_name
from models.qwen_vl import image_features, with_image_features
from tests.peer import own_hidden, reference_inputs, reference_model
from tests.tiny import IMAGE, family_config, second_token_weights, tiny_model, tiny_prompt

# rows and columns of patches; a window of the tiny Qwen2.5-VL is 4 x 4 of them
GRIDS = {"none": [], "one": [(6, 10)], "several": [(4, 4), (2, 14), (6, 4), (8, 8), (6, 4)]}

ALONE = Ranks(0, 1, torch.device("cpu"))

by_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("images", GRIDS)
@by_family
def test_logits_and_gradients_equal_transformers(exact_reference, family, images, tied):
    model = tiny_model(family_config(family, tied))
    peer = reference_model(model, torch.float64)
    prompt = tiny_prompt(model.config, GRIDS[images])
    logits = linear(own_hidden(model, [prompt]), model.head_weight)
    expected = peer(**reference_inputs(prompt, torch.float64)).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)

    torch.manual_seed(1)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {parameter_name(n): p.grad for n, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        if images == "none" and name.startswith("visual."):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-9)
            assert parameter.grad.abs().max() > 1e-6, f"{name} gets no gradient: a blunt test"


@pytest.mark.parametrize("images", GRIDS)
@by_family
def test_logits_equal_unchanged_transformers_in_float32(family, images):
    model = tiny_model(family_config(family), torch.float32, scale=2)
    prompt = tiny_prompt(model.config, GRIDS[images])
    logits = linear(own_hidden(model, [prompt]), model.head_weight)
    peer = reference_model(model, torch.float32)
    expected = peer(**reference_inputs(prompt, torch.float32)).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@by_family
def test_positions_equal_transformers_for_random_prompts(family):
    chance, config = random.Random(0), family_config(family)
    peer = reference_model(tiny_model(config), torch.float32)
    for seed in range(50):
        sides = [2 * chance.randint(1, 9) for _ in range(2 * chance.randint(1, 4))]
        grids = list(zip(sides[::2], sides[1::2], strict=True))
        prompt = tiny_prompt(config, grids, text=chance.randint(1, 9), seed=seed)
        inputs = reference_inputs(prompt, torch.float32)
        del inputs["pixel_values"]
        expected, delta = peer.model.get_rope_index(**inputs)
        assert torch.equal(prompt.position_ids, expected[:, 0])
        assert prompt.next_position == len(prompt) + int(delta)


@by_family
def test_greedy_text_equals_transformers_generate(family):
    model = tiny_model(family_config(family), torch.float32, scale=6)
    peer, stop = reference_model(model, torch.float32), (7, 11)
    model.suppressed_ids = None
    said = set()
    for seed, grids in enumerate([*GRIDS.values()] * 2):
        prompt = tiny_prompt(model.config, grids, seed=seed)
        sampling = Sampling(24, temperature=0, stop_ids=stop)
        (own,), _ = generate(model, [prompt], 1, sampling, torch.zeros(1, 24))
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": list(stop)}
        out = peer.generate(**reference_inputs(prompt, torch.float32), pad_token_id=0, **options)
        assert own == out[0, len(prompt) :].tolist()
        said.add(tuple(own))
    assert len(said) > 3, "the same text for all prompts: a blunt test"


def groups_of(model, count: int) -> list[Group]:
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    uniforms = torch.rand(3 * count, 12, dtype=torch.float64)
    sampling = Sampling(12, stop_ids=(3, 7, 11, 20, 31))
    completions, logps = generate(model, prompts, count, sampling, uniforms)
    return [
        Group(p, completions[i : i + count], logps[i : i + count], [False] * count)
        for p, i in zip(prompts, range(0, 3 * count, count), strict=True)
    ]


@by_family
def test_sampled_and_trained_log_probs_and_gradients_of_packs(family):
    """Sampled log-probs are those of the packs; gradients those of G copies of each prompt, one
    at a time, with dense logits. With the last layer at the read positions only, checkpointing, and
    with features that come with the prompts."""
    torch.manual_seed(0)
    model = tiny_model(family_config(family))
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    groups = groups_of(model, 4)
    assert len({len(c) for g in groups for c in g.completion_ids}) > 3, "a blunt test"
    total = 0
    for group in groups:
        for completion in group.completion_ids:
            prompt, tokens = group.prompt, torch.tensor(completion)
            steps = torch.arange(len(tokens)) + prompt.next_position
            hidden = model(
                torch.cat([prompt.input_ids, tokens]),
                torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1),
                model.bounds([(len(prompt) + len(tokens),)]),
                image_features(model, [prompt]),
            )[len(prompt) - 1 : -1]
            logits = linear(hidden, model.head_weight)
            logits = logits.index_fill(1, model.suppressed_ids, float("-inf"))
            total = total - logits.log_softmax(-1)[range(len(tokens)), completion].sum()
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    (pack,) = make_packs(groups, 10**9)
    sampled = torch.cat([logp for group in groups for logp in group.sampling_logps])
    with torch.no_grad():
        torch.testing.assert_close(pack_logps(model, pack, 1.0).float(), sampled)
        frozen = replace(pack, prompts=with_image_features(model, pack.prompts))
        torch.testing.assert_close(pack_logps(model, frozen, 1.0).float(), sampled)
    for checkpointing in (False, True):
        model.visual.gradient_checkpointing = model.model.gradient_checkpointing = checkpointing
        model.zero_grad()
        for part in make_packs(groups, 120):
            for tokens in pack_chunks(model, part, 1.0, chunk=7):
                (-tokens.logps.sum()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@by_family
def test_checkpoints_in_both_directions_and_both_layouts(tmp_path, family, tied):
    """As published and as transformers 5 writes them; the same logits from every folder."""
    model = tiny_model(family_config(family, tied), torch.float32, scale=2)
    prompt = tiny_prompt(model.config, GRIDS["several"])
    peer = reference_model(model, torch.float32)
    expected = peer(**reference_inputs(prompt, torch.float32)).logits[0]

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_model(model, ours)
    raw = json.loads((ours / "config.json").read_text())
    nested = family in ("qwen3_vl", "qwen3_5")
    assert ("text_config" in raw) == nested, "not as this family is published"
    names = [name for path in weight_files(ours) for name in load_names(path)]
    assert ("model.language_model.norm.weight" in names) == nested
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(
        ours, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    logits = again(**reference_inputs(prompt, torch.float32)).logits[0]
    torch.testing.assert_close(logits, expected)

    peer.save_pretrained(theirs)
    assert "text_config" in json.loads((theirs / "config.json").read_text())
    assert read_config(theirs) == replace(
        read_config(ours), bos_token_id=read_config(theirs).bos_token_id
    )
    for folder in (ours, theirs):
        loaded = load_model(folder, torch.float32, "cpu")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name))


def load_names(path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_shapes_of_transformers(name):
    from models.qwen_vl import QwenVL

    raw = published(name)
    with torch.device("meta"):
        model = QwenVL(parse_config(raw, name))
        config = transformers.CONFIG_MAPPING[raw["model_type"]](**published(name))
        peer = transformers.AutoModelForImageTextToText.from_config(config)
    own = {n: p.shape for n, p in model.named_parameters()}
    assert own == {parameter_name(n): p.shape for n, p in peer.named_parameters()}
    known = {"Qwen3.5 0.8B": 852_985_920, "Qwen3.5 2B": 2_213_241_664}  # as the hub counts them
    total = sum(shape.numel() for shape in own.values())
    assert total == known.get(name, total)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe.*mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\).*in bfloat16"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"rope_scaling": {"mrope_section": [24, 20, 20]}}}, "rope_theta"),
        ({"text_config": {"head_dim": 96}}, "mrope_section"),
        ({"text_config": {"num_hidden_layers": 3}}, "deepstack.*more than 3"),
        ({"vision_config": {"deepstack_visual_indexes": [5, 11, 40]}}, "rising indexes below 24"),
        ({"vision_config": {"num_position_embeddings": 2300}}, "not a square"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
    ],
)
def test_what_is_not_done_here_is_refused(change, message):
    refused("Qwen3-VL 2B", change, message)


def refused(name: str, change: dict, message: str) -> None:
    """The config.json of a published model with this change in it is."""
    raw = published(name)
    parse_config(raw, "here")
    if "rope_theta" in message:
        del raw["text_config"]["rope_theta"]
    for name, value in change.items():
        raw[name] = raw.get(name, {}) | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        parse_config(raw, "here")


EVERY_OTHER = ["linear_attention", "full_attention"] * 12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen3_5_moe"}, "qwen3_5_moe.*mixture of experts"),
        ({"model_type": "qwen3_5_text"}, "qwen3_5_text.*without its vision tower"),
        ({"model_type": "qwen4_exp"}, "qwen4_exp.*not written here"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\).*in bfloat16"),
        ({"text_config": {"attn_output_gate": False}}, "attn_output_gate"),
        ({"text_config": {"layer_types": EVERY_OTHER[:-1]}}, "each of 24 layers"),
        ({"text_config": {"layer_types": [*EVERY_OTHER[:-1], "mamba"]}}, "each of 24 layers"),
        ({"text_config": {"layer_types": [["mamba"]] * 24}}, "each of 24 layers"),
        (
            {
                "text_config": {
                    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": "0.25"}
                }
            },
            "partial_rotary_factor is '0.25', not a number",
        ),
        ({"text_config": {"linear_num_value_heads": 24}}, "24 heads of values and 16 of keys"),
        ({"text_config": {"head_dim": 128}}, "mrope_section.*32 of 128"),
        ({"vision_config": {"deepstack_visual_indexes": [5]}}, "deepstack_visual_indexes"),
    ],
)
def test_what_is_not_done_here_of_qwen3_5_is_refused(change, message):
    refused("Qwen3.5 2B", change, message)


def test_layers_of_qwen3_5_are_what_its_config_says():
    """As published, every fourth is full attention; and an empty DeepStack is none."""
    raw = published("Qwen3.5 0.8B")
    every_fourth = parse_config(raw, "here").layer_types
    assert every_fourth == ("linear_attention",) * 3 + ("full_attention",) + every_fourth[:-4]
    raw["text_config"] |= {"layer_types": EVERY_OTHER}
    raw["vision_config"] |= {"deepstack_visual_indexes": []}
    config = parse_config(raw, "here")
    assert config.layer_types == tuple(EVERY_OTHER)
    rope = raw["text_config"]["rope_parameters"] | {"mrope_section": [24, 20, 20]}
    del rope["partial_rotary_factor"]  # where transformers reads it, too
    raw["text_config"] |= {"rope_parameters": rope, "partial_rotary_factor": 0.5}
    assert parse_config(raw, "here").rotary_dim == 128
    assert config.vision.feature_width == config.hidden_size


@pytest.mark.parametrize("lora", [None, LoRA(2, 4.0)], ids=["all weights", "LoRA"])
def test_final_has_the_weights_that_nothing_trains_and_the_dtypes_of_the_source(tmp_path, lora):
    """A layer that predicts a second token, which transformers does not read either; the decay and
    the norm of linear attention in float32."""
    config = family_config("qwen3_5")
    save_model(tiny_model(config, torch.float32, scale=1), tmp_path, torch.bfloat16)
    start, extra = load_file(tmp_path / "model.safetensors"), second_token_weights(config)
    assert len(extra) == 15 and start["model.language_model.norm.weight"].dtype == torch.bfloat16
    save_file(start | extra, tmp_path / "model.safetensors")

    model = allocate(empty_model(tmp_path, lora=lora), torch.bfloat16, "cpu")
    load_weights(model, tmp_path)
    optimizer = Optimizer(model, 0.0)
    with torch.no_grad():
        for name, master in optimizer.masters.items():
            if is_adapter(name):
                master.normal_(0, 0.1)
            master.grad = torch.randn_like(master)
    optimizer.step(1e-2, 0.0)
    folder = save_final(tmp_path, tmp_path, model, optimizer, ALONE, torch.bfloat16)
    final = load_file(folder / "model.safetensors")
    assert final.keys() == start.keys() | extra.keys()
    assert all(torch.equal(final[name], weight) for name, weight in extra.items())
    assert {n: w.dtype for n, w in final.items()} == {
        n: w.dtype for n, w in (start | extra).items()
    }
    in_float32 = {n.split("linear_attn.")[-1] for n, w in final.items() if w.dtype == torch.float32}
    assert in_float32 == {"A_log", "norm.weight"}
    changed = [name for name in start if not torch.equal(final[name], start[name])]
    assert all("_proj" in name for name in changed) if lora else len(changed) == len(start)

    peer, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    prompt = tiny_prompt(config, GRIDS["one"])
    expected = peer(**reference_inputs(prompt, torch.float32)).logits[0]
    loaded = load_model(folder, torch.float32, "cpu")
    logits = linear(own_hidden(loaded, [prompt]), loaded.head_weight)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_family
def test_what_decoding_reads_as_one_matrix_is_no_copy(tmp_path, family, dtype):
    model = tiny_model(family_config(family), torch.float32)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype, "cpu")
    for layer in loaded.model.layers:
        assert [len(parts) for parts in layer.joined] in ([3, 2], [4, 2])
        for parts in layer.joined:
            one = joined(parts)
            assert torch.equal(one, torch.cat([part.weight for part in parts]))
            one[-1, -1] = 7  # a change of it is one of the parameter
            assert parts[-1].weight[-1, -1] == 7
    apart = model.model.layers[0].mlp
    copy = joined((apart.gate_proj, apart.up_proj))
    assert torch.equal(copy, torch.cat((apart.gate_proj.weight, apart.up_proj.weight)))
    copy.zero_()
    assert apart.gate_proj.weight.any()


def test_a_head_that_only_claims_to_be_tied_is_refused(tmp_path):
    """Some tools write a tied head a second time; a head of its own must not be lost."""
    model = tiny_model(family_config("qwen3_vl", tied=True), torch.float32)
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.language_model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    load_model(tmp_path, torch.float32, "cpu")
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight: is not tied to the embedding"):
        load_model(tmp_path, torch.float32, "cpu")


def test_where_the_switch_of_tied_heads_stands(tmp_path):
    """As transformers reads it: Qwen3-VL's at the top alone, the others' also in text_config."""
    for name in ("Qwen3-VL 2B", "Qwen2.5-VL 3B"):
        raw = published(name)
        raw |= {"tie_word_embeddings": False}
        raw["text_config"] = raw.get("text_config", {}) | {"tie_word_embeddings": True}
        assert parse_config(raw, name).tie_word_embeddings == (name == "Qwen2.5-VL 3B")
