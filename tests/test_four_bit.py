"""A frozen base in 4 bits: against bitsandbytes' own layer, and in runs."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train_cls
import train_det
from demo.published import save_model
from grpo.engine.load import load_models
from grpo.engine.ranks import Ranks
from grpo.engine.shard import checksum, load_weights
from grpo.logps import pack_chunks, pack_logps
from grpo.pack import make_packs
from models.decoding.product import joined
from models.decoding.storage import allocate, cast
from models.families import FAMILIES
from models.four_bit import BYTES, FourBitLinear, four_bit_layers
from models.load import empty_model, load_model
from models.lora import WEIGHTS, LoRA, initial, is_adapter, without_adapters
from tests.runs import CHECKPOINT, SHORT, assert_resumes, read_lines, train
from tests.test_families import groups_of
from tests.tiny import IMAGE, family_config, tiny_model

ALONE = Ranks(0, 1, torch.device("cpu"))
by_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_that_of_bitsandbytes(dtype):
    """Value and gradient; and it takes little more than half a byte a weight."""
    import bitsandbytes

    torch.manual_seed(0)
    linear = nn.Linear(1024, 768).to(dtype)
    options = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
    peer = bitsandbytes.nn.Linear4bit(1024, 768, **options)
    peer.load_state_dict(linear.state_dict())
    peer = peer.to("cpu")
    ours = FourBitLinear(1024, 768, bias=False)
    ours.bias = linear.bias
    ours.pack(linear.weight.detach())
    one, two = (torch.randn(9, 1024, dtype=dtype).requires_grad_() for _ in range(2))
    two.data.copy_(one.data)
    loose = {} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(ours(one), peer(two), **loose)
    with torch.no_grad():
        error = (ours(one) - linear(one)).float().norm() / linear(one).float().norm()
    assert 0.01 < error < 0.2, "it is quantized"
    for layer, x in ((ours, one), (peer, two)):
        layer(x).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, **loose)
    state = ours.scales
    parts = [ours.packed, state.absmax, state.state2.absmax]
    bytes_ = sum(part.numel() * part.itemsize for part in parts)
    assert bytes_ == pytest.approx(BYTES * 1024 * 768, rel=0.01)
    assert ours.weight is None and list(ours.parameters()) == [linear.bias]


def quantized(folder, family: str, dtype=torch.float32):
    """(a model in 4 bits with adapters that are not 0, the same with these weights unpacked)."""
    plain = tiny_model(family_config(family), torch.float32, scale=2)
    save_model(plain, folder)
    delta = family == "qwen3_5"
    targets = ("q_proj", "v_proj", "down_proj", *(("in_proj_qkv", "out_proj") * delta))
    lora = LoRA(3, 4.0, targets)
    model = allocate(empty_model(folder, lora=lora, four_bit=True), dtype, "cpu")
    load_weights(model, folder)
    plain = cast(plain, dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(initial(name, parameter.shape, seed=1))
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.3)
    layers = four_bit_layers(model)
    # of a delta net three and three of its feed-forward, not the small ones of its gates
    assert len(layers) == 4 * 7 - 2 * delta and not any("visual" in name for name in layers)
    assert not any(name.endswith(("in_proj_a", "in_proj_b")) for name in layers)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = plain.get_submodule(name).weight
            assert (layer.unpacked() - weight).abs().max() > 1e-3
            weight.copy_(layer.unpacked())
    plain.adapt(lora)
    for name, parameter in model.named_parameters():
        plain.get_parameter(name).data.copy_(parameter.detach())
    for one in (model, plain):
        one.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    return model, plain


@by_family
def test_sampling_and_training_are_those_of_the_unpacked_weights(family, tmp_path):
    """Log-probs of packs, gradients of adapters, sampled tokens; with adapters and without."""
    model, plain = quantized(tmp_path, family)
    torch.manual_seed(2)
    groups = groups_of(model, 4)
    torch.manual_seed(2)
    others = groups_of(plain, 4)
    assert [g.completion_ids for g in groups] == [g.completion_ids for g in others]
    (pack,) = make_packs(groups, 10**9)
    sampled = torch.cat([logp for group in groups for logp in group.sampling_logps])
    with torch.no_grad():
        torch.testing.assert_close(pack_logps(model, pack, 1.0), sampled, atol=1e-4, rtol=1e-4)
        with without_adapters(model), without_adapters(plain):
            base = [pack_logps(one, pack, 1.0) for one in (model, plain)]
        torch.testing.assert_close(*base)
        assert (base[0] - sampled).abs().max() > 1e-2, "a blunt test"
    for one in (model, plain):
        one.model.gradient_checkpointing = True
        for tokens in pack_chunks(one, pack, 1.0, chunk=7):
            tokens.logps.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not is_adapter(name)), name
        if parameter.grad is not None:
            expected = plain.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


def test_joined_weights_are_those_of_the_layers(tmp_path):
    model, _ = quantized(tmp_path, "qwen2_vl", torch.bfloat16)
    attention = model.model.layers[1].self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    block = joined(linears)
    assert block.dtype == torch.bfloat16
    assert torch.equal(block, torch.cat([linear.unpacked() for linear in linears]))


def test_a_changed_weight_changes_the_checksum(tmp_path):
    """As when a run is resumed over another base."""
    model, _ = quantized(tmp_path, "qwen2_vl")
    before = checksum(model, ALONE)
    model.model.layers[2].mlp.up_proj.packed[3] += 1
    assert checksum(model, ALONE) != before
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 2  # the same codes at another scale
    save_file(weights, tmp_path / "model.safetensors")
    other = allocate(empty_model(tmp_path, four_bit=True), torch.float32, "cpu")
    load_weights(other, tmp_path)
    assert checksum(other, ALONE) != before


def test_no_unpacked_weight_outlives_its_product():
    layer = FourBitLinear(256, 128, bias=False)
    layer.pack(torch.randn(128, 256))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(torch.randn(3, 256).requires_grad_())
    assert (128, 256) not in kept and (256, 128) not in kept
    out.sum().backward()


def test_the_flag_reaches_the_model():
    flags = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True}
    for four_bit in (False, True):
        config = train_cls.Config(**flags, load_in_4bit=four_bit, lora_target_modules=["q_proj"])
        run = SimpleNamespace(config=config, ranks=ALONE, dtype=torch.bfloat16, kernel="sdpa")
        data = SimpleNamespace(folder=CHECKPOINT, processor=SimpleNamespace(suppressed_ids=[]))
        policy, sampler, reference, _ = load_models(run, data, cuda_graphs=False)
        assert policy is sampler is reference
        layers = policy.config.num_hidden_layers
        assert len(four_bit_layers(policy)) == (7 * layers if four_bit else 0)


LORA = [*SHORT, "--use_peft", "--load_in_4bit", "--lora_r", "4", "--learning_rate", "5e-3"]


@pytest.mark.slow
def test_a_run_in_four_bits(tmp_path):
    """Sampled and trained are one policy; final/ is the checkpoint's own weights and the adapter;
    a run resumed is the run that was never stopped."""
    run, again = tmp_path / "run", tmp_path / "again"
    options = ["--max_steps", "4", "--save_steps", "2", "--num_iterations", "2"]
    train(run, *LORA, *options, "--lora_target_modules", "q_proj", "down_proj")
    steps = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in steps)
    assert steps[0]["kl_max"] < 1e-9 < steps[-1]["kl_max"], "the reference is the base"

    adapter = load_file(run / "final" / "adapter" / WEIGHTS)
    start, final = (load_file(f / "model.safetensors") for f in (CHECKPOINT, run / "final"))
    changed = 0
    for name, weight in final.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        key = key.replace("model.layers.", "model.language_model.layers.")
        expected = start[name].float()
        if f"{key}.lora_A.weight" in adapter:
            change = 8 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            expected = expected + change
            changed += bool(change.any())
        torch.testing.assert_close(weight, expected)
    assert changed == len(adapter) / 2 > 0
    load_model(run / "final", torch.float32, "cpu")

    assert_resumes(run, again, "checkpoint-4", "final")


def test_a_base_that_is_gone_at_the_end_loses_no_training(tmp_path, monkeypatch):
    """final/ needs its weights again. The adapter is in a checkpoint, and final/ can be made up."""
    base = tmp_path / "base"
    shutil.copytree(CHECKPOINT, base)
    weights, save = base / "model.safetensors", train_cls.Run.finish

    def without(run):
        weights.rename(base / "away")
        save(run)

    argv = ["--config", str(train_cls.DEMO), "--model_name_or_path", str(base), *LORA]
    argv += ["--max_steps", "1", "--save_steps", "0", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train_cls.Run, "finish", without)
        with pytest.raises(ValueError, match="final could not be written: .*neither model.safe"):
            train_cls.main(argv)
    assert not (tmp_path / "run" / "final").exists()
    (base / "away").rename(weights)
    assert train_cls.main([*argv, "--resume_from_checkpoint", "auto"]) == 0
    assert load_file(tmp_path / "run" / "final" / "adapter" / WEIGHTS)


@pytest.mark.slow
def test_detection_in_four_bits_and_bf16(tmp_path):
    options = ["--max_steps", "1", "--prompts_per_step", "2", "--num_generations", "4", "--bf16"]
    options += ["--use_peft", "--load_in_4bit", "--eval_samples", "2", "--freeze_vision", "false"]
    train(tmp_path / "run", *options, "--max_completion_length", "96", script=train_det)
    assert load_file(tmp_path / "run" / "final" / "adapter" / WEIGHTS)


def test_four_bits_are_for_adapters(monkeypatch):
    with pytest.raises(ValueError, match="--load_in_4bit needs --use_peft"):
        train_cls.main([*SHORT, "--load_in_4bit"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        train_cls.main([*SHORT, "--use_peft", "--load_in_4bit"])
