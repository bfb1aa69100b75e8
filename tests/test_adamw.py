"""AdamW without float32 masters: against PyTorch's, against bitsandbytes' own, and its rounding."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  the "fake" backend

import grpo.engine.adamw
import train_cls
from grpo.engine.adamw import (
    BETA1,
    BETA2,
    LARGEST,
    MOMENTS,
    Bf16Moment,
    EightBitMoment,
    LightAdamW,
    Noise,
    code_values,
)
from grpo.engine.load import load_models
from grpo.engine.optimizer import OPTIMIZERS, Optimizer, total_norm
from grpo.engine.ranks import Ranks
from grpo.engine.shard import reshard
from models.load import load_model
from tests.runs import CHECKPOINT, SHORT, read_steps, train
from tests.tiny import tiny_config, tiny_model, tiny_prompt

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def noise(rows: int, columns: int, key: str = "k") -> Noise:
    return Noise(key, 0, rows * columns, CPU)


class Small(nn.Module):
    """A matrix of whole blocks, one with rest, a convolution and a vector."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"a": (96, 512), "b": (40, 300), "c": (8, 3, 2, 4), "d": (64,)}.items():
            values = 0.05 * torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(values.to(dtype)))


def updates(model: nn.Module, optimizer: Optimizer, count: int, rate: float = 1e-3) -> list[float]:
    """Steps with gradients of very different sizes; their norms."""
    norms = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            size = torch.rand(parameter.shape[-1], generator=generator) ** 4
            gradient = torch.randn(parameter.shape, generator=generator) * size
            (parameter.float() * gradient).sum().backward()
        norms.append(optimizer.step(rate, 1.0))
    return norms


@pytest.mark.parametrize(
    "optim, dtype, most",
    [
        ("adamw_anyprecision", torch.float32, 0.01),
        ("adamw_8bit", torch.float32, 0.03),
        ("adamw_anyprecision", torch.bfloat16, 0.15),  # the weights' own rounding
        ("adamw_8bit", torch.bfloat16, 0.15),
    ],
)
def test_it_goes_where_adamw_goes(optim, dtype, most):
    start, full, light = Small(torch.float32), Small(torch.float32), Small(dtype)
    with torch.no_grad():
        for name, parameter in light.named_parameters():
            full.get_parameter(name).copy_(parameter)
            start.get_parameter(name).copy_(parameter)
    norms = updates(full, Optimizer(full, 0.1), 30)
    others = updates(light, Optimizer(light, 0.1, optim=optim), 30)
    assert others == pytest.approx(norms, rel=1e-3)
    for name, parameter in light.named_parameters():
        way = full.get_parameter(name) - start.get_parameter(name)
        apart = (parameter.float() - full.get_parameter(name)).norm() / way.norm()
        assert apart < most, f"{name}: {apart:.3f}"


def test_eight_bits_are_those_of_bitsandbytes():
    """Its table; and its own AdamW8bit on the same gradients, which keeps v and not its root, and
    on a CPU takes 0 for 2e-5."""
    from bitsandbytes.functional import create_dynamic_map
    from bitsandbytes.optim import AdamW8bit

    for signed in (True, False):
        torch.testing.assert_close(
            code_values(signed, CPU), create_dynamic_map(signed), rtol=1e-6, atol=0
        )
    ours, theirs = Small(torch.float32), Small(torch.float32)
    optimizer = Optimizer(ours, 0.1, optim="adamw_8bit")
    peer = AdamW8bit([theirs.a], lr=1e-3, weight_decay=0.1, min_8bit_size=1)
    for step in range(20):
        gradient = torch.randn(96, 512, generator=torch.Generator().manual_seed(step))
        theirs.a.grad, ours.a.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step(1e-3, 0.0)
    way = theirs.a - Small(torch.float32).a
    assert (ours.a - theirs.a).norm() / way.norm() < 0.02
    codes = optimizer.light.state["a"][0].codes.view(torch.uint8).flatten().int()
    assert (peer.state[theirs.a]["state1"].flatten().int() - codes).abs().float().mean() < 0.1


def test_a_number_is_stored_as_the_nearest_entry_of_its_block():
    value = torch.randn(5, 300) * 10 ** torch.linspace(-8, 2, 300)
    value[1, :256], value[2] = 0.0, -value[2].abs()
    for signed in (True, False):
        here = value if signed else value.abs()  # of v the root is stored
        moment = EightBitMoment(torch.empty(5, 300), 300, signed, None)
        moment.store(slice(0, 5), here if signed else here.square(), noise(5, 300))
        found = moment.load(slice(0, 5), CPU)
        found = found if signed else found.sqrt()
        for row in range(5):
            for block in (slice(0, 256), slice(256, 300)):
                largest = here[row, block].abs().max()
                distances = (here[row, block, None] - largest * code_values(signed, CPU)).abs()
                apart = (found[row, block] - here[row, block]).abs()
                torch.testing.assert_close(apart, distances.min(1).values, rtol=1e-4, atol=1e-9)


def test_a_vector_has_a_float32_master_and_a_matrix_is_its_own():
    model = Small(torch.bfloat16)
    optimizer = Optimizer(model, 0.0, optim="adamw_8bit")
    for name, parameter in model.named_parameters():
        is_own = optimizer.masters[name] is parameter
        assert is_own == (parameter.ndim > 1), name
    assert optimizer.masters["d"].dtype == torch.float32
    bytes_ = sum(t.numel() * t.itemsize for t in optimizer.light.state["a"][0].tensors().values())
    assert bytes_ == 96 * 512 * (1 + 4 / 256)


def test_rounding_takes_a_neighbour_and_is_right_on_average():
    value = torch.tensor([1.0, -1.0, 0.0, 1.001, -3e-5, 2.7, 1e-38]).repeat(4000, 1)
    rounded = noise(4000, 7).rounded(value, torch.bfloat16)
    assert torch.equal(rounded[:, :3].float(), value[:, :3]), "what bf16 has stays"
    below = value.to(torch.bfloat16).float()
    step = torch.maximum((below.abs() * 2.0**-7), torch.tensor(1e-40))
    assert ((rounded.float() - value).abs() <= step).all()
    spread = rounded.float().std(0)[3:]
    error = (rounded.float().mean(0) - value[0]).abs()[3:]
    assert (error < 4 * spread / 4000**0.5).all() and (spread > 0).all()
    again = noise(4000, 7).rounded(value, torch.bfloat16)
    assert torch.equal(again, rounded) and not torch.equal(
        noise(4000, 7, "other").rounded(value, torch.bfloat16), rounded
    )


@pytest.mark.parametrize("optim", MOMENTS)
def test_updates_far_below_the_weights_resolution_are_not_lost(optim):
    """1e-6 on weights of about 1, whose neighbours are 0.008 away; 100 times, the same way."""
    weight = nn.Parameter(torch.full((256, 1024), 1.1, dtype=torch.bfloat16))
    before = weight.detach().float()
    light = LightAdamW({"w": weight}, optim, 0.0, seed=0)
    for update in range(1, 101):
        weight.grad = torch.full_like(weight, 0.3)
        light.step(1e-6, update, 1.0)
    moved = (before - weight.float()).mean().item()
    assert moved == pytest.approx(100e-6, rel=0.15)


def test_a_second_moment_that_was_rounded_to_zero_throws_no_weight_away():
    weight = nn.Parameter(torch.zeros(1, 256))
    light = LightAdamW({"w": weight}, "adamw_8bit", 0.0, seed=0)
    mean, square = light.state["w"]
    mean.store(slice(0, 1), torch.full((1, 256), 1e-3), noise(1, 256))
    assert (square.load(slice(0, 1), CPU) == 0).all()
    weight.grad = torch.zeros_like(weight)
    light.step(1.0, 100, 1.0)
    torch.testing.assert_close(weight.detach(), torch.full((1, 256), -LARGEST))


def test_no_update_of_exact_moments_is_as_large_as_the_limit():
    """By the worst gradients there are (m and sqrt(v) with equality): g falls as (b1 / b2)^i."""
    past = torch.arange(400.0, dtype=torch.float64)
    gradients = (BETA1 / BETA2) ** past
    m = ((1 - BETA1) * BETA1**past * gradients).sum()
    v = ((1 - BETA2) * BETA2**past * gradients.square()).sum()
    assert m / v.sqrt() == pytest.approx(LARGEST, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", MOMENTS)
def test_how_many_rows_are_worked_on_at_once_changes_no_bit(optim, dtype, monkeypatch):
    found = []
    for numbers in (2**23, 1000):
        monkeypatch.setattr(grpo.engine.adamw, "NUMBERS", numbers)
        model = Small(dtype)
        updates(model, Optimizer(model, 0.1, optim=optim), 5)
        found.append(list(model.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_random_bits_are_splitmix64s():
    seed, mask, expected = hashlib.sha256(b"key").digest()[:8], 2**64 - 1, []
    state = int.from_bytes(seed, "big")
    for _ in range(1000):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert [number & mask for number in Noise("key", 0, 1000, CPU).bits.tolist()] == expected
    assert [number & mask for number in Noise("key", 600, 9, CPU).bits.tolist()] == expected[
        600:609
    ]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_masters_beside_the_model_compute_the_same(optim):
    """--cpu_offload on one GPU. Here "cpu:0" counts as another device than "cpu"."""
    found = []
    for device in (None, torch.device("cpu:0")):
        model = tiny_model(tiny_config(), torch.float32)
        optimizer = Optimizer(model, 0.1, optim=optim, device=device)
        updates(model, optimizer, 2)
        found.append(list(model.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    own = optimizer.light.weights if optimizer.light else {}
    beside = [m for name, m in optimizer.masters.items() if name not in own]
    assert beside and not any(m is p for m in beside for p in model.parameters())


@pytest.mark.parametrize("optim", MOMENTS)
def test_moments_lie_where_they_are_wanted(optim):
    """Of a plain weight and of a sharded one, whose mesh is elsewhere (one rank by itself)."""
    model, meta = Small(torch.bfloat16), torch.device("meta")
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    assert all(t.is_meta for t in LightAdamW(matrices, optim, 0.0, 0, meta).tensors().values())
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = {
            name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            for name, p in matrices.items()
        }
        for device in (None, meta):
            for name, tensor in LightAdamW(sharded, optim, 0.0, 0, device).tensors().items():
                weight = sharded[name.split(".")[1]]
                assert tensor.to_local().is_meta == (device is meta)
                assert len(tensor) == len(weight) and tensor.placements == weight.placements
                assert len(tensor.to_local()) == len(weight.to_local())
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_kept_on_the_cpu_comes_and_goes():
    """Here "cpu:0" counts as another device than "cpu": what goes there is copied."""
    model, prompt = tiny_model(tiny_config(), torch.float32), tiny_prompt(tiny_config(), [(4, 4)])

    def hidden() -> torch.Tensor:
        bounds = model.bounds([(len(prompt),)])
        return model.hidden_states(prompt.input_ids, prompt.position_ids, bounds, [prompt])

    def places() -> list[int]:
        return [parameter.data_ptr() for parameter in model.parameters()]

    expected, kept = hidden(), places()
    model.keep_on_cpu(torch.device("cpu:0"))
    assert places() == kept and model.device == torch.device("cpu:0")
    for _ in range(2):
        assert torch.equal(hidden(), expected)
        assert not set(places()) & set(kept)
        reshard(None, model)
        assert places() == kept


def test_the_flags_reach_models_and_optimizer():
    """On one rank --cpu_offload keeps reference and moments on the CPU, never the policy."""
    flags = {"model_name_or_path": "m", "dataset_name": "d", "seed": 7, "optim": "adamw_8bit"}
    for offload in (False, True):
        config = train_cls.Config(**flags, cpu_offload=offload, weight_decay=0.25)
        run = SimpleNamespace(config=config, ranks=ALONE, dtype=torch.bfloat16, kernel="sdpa")
        data = SimpleNamespace(folder=CHECKPOINT, processor=SimpleNamespace(suppressed_ids=[]))
        policy, sampler, reference, optimizer = load_models(run, data, cuda_graphs=False)
        assert (optimizer.light.seed, optimizer.light.weight_decay) == (7, 0.25)
        assert optimizer.device == (CPU if offload else None)
        assert (reference._on_cpu is not None) == offload
        assert policy is sampler and policy._on_cpu is None


def test_a_bf16_moment_decays():
    """A thousandth less each time, where two bf16 numbers are four to eight thousandths apart."""
    moment = Bf16Moment(torch.empty(1, 4096), 4096, False, None)
    moment.store(slice(0, 1), torch.ones(1, 4096), noise(1, 4096))
    for update in range(1000):
        value = moment.load(slice(0, 1), CPU) * BETA2
        moment.store(slice(0, 1), value, noise(1, 4096, f"{update}"))
    mean = moment.load(slice(0, 1), CPU).mean().item()
    assert mean == pytest.approx(BETA2**1000, rel=0.03)


def test_the_norm_is_float32_whatever_the_gradients_are():
    gradients = [torch.randn(100, 100).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    expected = sum(g.double().square().sum() for g in gradients).sqrt()
    assert total_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("optim", MOMENTS)
def test_a_run_in_bf16_saves_what_it_trains(optim, tmp_path):
    """The checkpoint is bf16, its vectors float32; with LoRA the flag is refused."""
    options = [*SHORT, "--optim", optim, "--bf16", "true", "--save_steps", "2"]
    train(tmp_path / "run", *options, "--learning_rate", "1e-2", "--freeze_vision")
    steps = [line for line in read_steps(tmp_path / "run") if "loss" in line]
    assert all(line["sampling/logp_difference_max"] < 0.5 for line in steps)
    model = load_model(tmp_path / "run" / "final", torch.bfloat16, "cpu")
    start = load_model(train_cls.DEMO.parent / "checkpoint", torch.bfloat16, "cpu")
    for (name, one), two in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(one, two) == name.startswith("visual."), name
    checkpoint = tmp_path / "run" / "checkpoint-2"
    again = load_model(checkpoint, torch.float32, "cpu")
    wide = dict(again.named_parameters())["model.norm.weight"]
    assert not torch.equal(wide, wide.to(torch.bfloat16).float()), "vectors are not rounded"
    torch.testing.assert_close(
        again.model.embed_tokens.weight, model.model.embed_tokens.weight.float()
    )
    with pytest.raises(ValueError, match="--optim .* does not go with --use_peft: adapters"):
        train_cls.main([*SHORT, "--use_peft", "--optim", optim])
