"""The hand-written model against transformers, on random weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.nn.functional import linear

import models.load
from demo.published import save_model
from models.load import load_model
from models.names import parameter_name
from models.packed_attention import Bounds, attention, choose_implementation
from models.prompt import mrope_position_ids
from models.qwen_vl import image_features
from tests.peer import own_hidden, reference_inputs, reference_model
from tests.tiny import IMAGE, tiny_config, tiny_model, tiny_prompt

GRIDS = {"none": [], "one": [(4, 6)], "several": [(4, 4), (2, 8), (6, 4)]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("images", GRIDS)
def test_logits_and_gradients_equal_transformers_in_float64(
    exact_reference, images, kv_heads, tied
):
    model = tiny_model(tiny_config(tied, kv_heads))
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
def test_logits_equal_unchanged_transformers_in_float32(images):
    model = tiny_model(tiny_config(), torch.float32)
    peer = reference_model(model, torch.float32)
    prompt = tiny_prompt(model.config, GRIDS[images])
    logits = linear(own_hidden(model, [prompt]), model.head_weight)
    expected = peer(**reference_inputs(prompt, torch.float32)).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_positions_equal_transformers():
    config = tiny_config()
    peer = reference_model(tiny_model(config), torch.float64)
    for grids in GRIDS.values():
        prompt = tiny_prompt(config, grids)
        inputs = reference_inputs(prompt, torch.float64)
        if not grids:
            continue
        del inputs["pixel_values"]
        expected, delta = peer.model.get_rope_index(**inputs)
        assert torch.equal(prompt.position_ids, expected[:, 0])
        assert prompt.next_position == len(prompt) + int(delta)


def test_positions_refuse_a_wrong_number_of_image_tokens():
    config = tiny_config()
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match="fewer"):
        mrope_position_ids(torch.tensor([1, IMAGE, IMAGE]), grid, config)
    with pytest.raises(ValueError, match="more"):
        mrope_position_ids(torch.tensor([1] + [IMAGE] * 5), grid, config)


def test_packed_prompts_do_not_see_each_other():
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    together = own_hidden(model, prompts).split([len(p) for p in prompts])
    for prompt, hidden in zip(prompts, together, strict=True):
        torch.testing.assert_close(hidden, own_hidden(model, [prompt]), atol=1e-12, rtol=1e-12)


def test_group_row_equals_separate_sequences():
    """[prompt | c1 | c2 | c3] in one row gives each completion what prompt + completion gives."""
    model = tiny_model(tiny_config())
    prompt = tiny_prompt(model.config, [(4, 4)])
    completions = [torch.randint(0, 56, (n,)) for n in (1, 7, 4)]
    lengths = [len(prompt), *(len(c) for c in completions)]
    steps = torch.cat([torch.arange(len(c)) for c in completions]) + prompt.next_position
    packed = model(
        torch.cat([prompt.input_ids, *completions]),
        torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1),
        model.bounds([tuple(lengths)]),
        image_features(model, [prompt]),
    ).split(lengths)
    for completion, hidden in zip(completions, packed[1:], strict=True):
        steps = torch.arange(len(completion)) + prompt.next_position
        alone = model(
            torch.cat([prompt.input_ids, completion]),
            torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1),
            model.bounds([(len(prompt) + len(completion),)]),
            image_features(model, [prompt]),
        )
        torch.testing.assert_close(hidden, alone[len(prompt) :], atol=1e-12, rtol=1e-12)


def varlen_reference(q, k, v, bounds):
    """What a variable-length kernel computes from `bounds.varlen`, sequence by sequence."""
    key_index, cu_q, cu_k, max_q, max_k = bounds.varlen
    if key_index is not None:
        k, v = k[key_index], v[key_index]
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = []
    for i in range(len(cu_q) - 1):
        qi, ki, vi = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        assert len(qi) <= max_q and len(ki) <= max_k
        scores = torch.einsum("qhd,khd->hqk", qi, ki) / qi.shape[-1] ** 0.5
        if bounds.causal:  # aligned to the end
            hidden = torch.ones(len(qi), len(ki)).triu(1 + len(ki) - len(qi)).bool()
            scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vi))
    return torch.cat(out)


@pytest.mark.parametrize(
    "rows, causal",
    [([(5, 3, 1, 4), (2,), (4, 6)], True), ([(5,), (1,), (7,)], True), ([(6,), (4,)], False)],
)
def test_masked_and_gathered_attention_agree(rows, causal):
    total = sum(map(sum, rows))
    torch.manual_seed(0)
    q = torch.randn(total, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, total, 2, 8, dtype=torch.float64)
    bounds = Bounds(tuple(rows), torch.device("cpu"), causal)
    torch.testing.assert_close(attention(q, k, v, bounds), varlen_reference(q, k, v, bounds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 80, 128])  # 80 is the published vision tower's
@pytest.mark.parametrize(
    "rows, causal",
    [([(50, 30, 1, 4), (20,)], True), ([(33,), (64,)], True), ([(60,), (7,)], False)],
)
def test_flash_attention_agrees_with_sdpa_on_cuda(rows, causal, dim):
    """Values and gradients."""
    total = sum(map(sum, rows))
    q = torch.randn(total, 4, dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, total, 2, dim, device="cuda", dtype=torch.bfloat16)
    direction = torch.randn_like(q)
    results = []
    for implementation, dtype in (("flash_attention_2", torch.bfloat16), ("sdpa", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        bounds = Bounds(tuple(rows), q.device, causal, implementation)
        out = attention(*inputs, bounds)
        results.append([out, *torch.autograd.grad(out, inputs, direction.to(dtype))])
    for flash, exact in zip(*results, strict=True):
        assert (flash.double() - exact).norm() / exact.norm() < 2e-2


def test_flash_attention_is_refused_where_it_cannot_run():
    assert choose_implementation("auto", torch.device("cpu"), torch.float32) == "sdpa"
    with pytest.raises(ValueError, match="CUDA"):
        choose_implementation("flash_attention_2", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="auto"):
        choose_implementation("eager", torch.device("cpu"), torch.float32)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        model = tiny_model(tiny_config())
        model.model.gradient_checkpointing = model.visual.gradient_checkpointing = enabled
        own_hidden(model, [tiny_prompt(model.config, [(4, 4)])]).pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_the_same_image_is_encoded_once(monkeypatch):
    model = tiny_model(tiny_config())
    a, b = tiny_prompt(model.config, [(4, 4)], seed=0), tiny_prompt(model.config, [(4, 6)], seed=1)
    seen = []
    original = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda p, g: seen.append(len(g)) or original(p, g))
    features = image_features(model, [a, b, a])
    assert seen == [2]
    single = [image_features(model, [p]) for p in (a, b, a)]
    torch.testing.assert_close(features, torch.cat(single), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [10**9, 20_000], ids=["one file", "several"])
def test_saved_checkpoints_load_here_and_in_transformers(tmp_path, monkeypatch, tied, dtype, most):
    monkeypatch.setattr(models.load, "MAX_FILE_BYTES", most)
    model = tiny_model(tiny_config(tied), torch.float32).to(dtype)
    save_model(model, tmp_path, dtype)
    files = models.load.weight_files(tmp_path)
    assert sorted(files) == sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 if most == 20_000 else [f.name for f in files] == ["model.safetensors"]
    for file in files:  # of up to so many bytes, or one tensor
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= most
    assert sorted(name for file in files for name in load_file(file)) == sorted(
        name for name, _ in model.named_parameters()
    )
    again = load_model(tmp_path, dtype, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    peer, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=dtype
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in peer.named_parameters():
        name = parameter_name(name)
        if name != "lm_head.weight" or not tied:
            assert torch.equal(parameter, model.get_parameter(name))


def test_files_that_lack_a_part_are_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    """As where ranks write to folders of their own, and the main one joins what it sees."""
    whole, save = {"a": torch.ones(4, 3), "b": torch.ones(2)}, distributed_checkpoint.save

    def partly(tensors, **options):
        save(tensors | {"a": tensors["a"][:2]}, **options)

    monkeypatch.setattr(distributed_checkpoint, "save", partly)
    with pytest.raises(OSError, match="1 tensors are not there in full, a .*all ranks see"):
        models.load.save_tensors(whole, tmp_path)


def stored(folder) -> list:
    return [pair for path in folder.glob("*.safetensors") for pair in load_file(path).items()]


def test_checkpoints_that_transformers_writes_are_read(tmp_path):
    model = tiny_model(tiny_config(tied=False), torch.float32)
    reference_model(model, torch.float32).save_pretrained(tmp_path, max_shard_size="100KB")
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load_model(tmp_path, torch.float32, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    # and the newer names, in one file of another dtype
    names = {}
    for name, tensor in stored(tmp_path):
        name = parameter_name(name)
        newer = "model." + name if name.startswith("visual.") else name
        newer = newer.replace("model.", "model.language_model.", 1) if newer == name else newer
        names["lm_head.weight" if name.startswith("lm_head") else newer] = tensor.half()
    for path in tmp_path.glob("model*"):
        path.unlink()
    save_file(names, tmp_path / "model.safetensors")
    assert any(n.startswith("model.language_model.layers") for n in names)
    again = load_model(tmp_path, torch.float32, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.half().float(), again.get_parameter(name))


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(tiny_config(), torch.float32)
    save_model(model, tmp_path, torch.float32)
    return tmp_path


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra: unexpected"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(48).long()}), "I64"),
    ],
)
def test_loading_is_strict(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        load_model(saved, torch.float32, "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llava"}, "llava.*qwen2_vl"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "400"}, "vocab_size is '400', not a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]}}, "mrope_section"),
    ],
)
def test_other_models_are_refused_by_name(saved, change, message):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        load_model(saved, torch.float32, "cpu")


def test_damaged_and_absent_files_are_named(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(saved, torch.float32, "cpu")
    path.rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load_model(saved, torch.float32, "cpu")
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002"):
        load_model(saved, torch.float32, "cpu")
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(saved, torch.float32, "cpu")
