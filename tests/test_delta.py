"""The gated delta rule over packed rows, and token by token, against its equations in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from grpo.plan.passes import Skeleton
from models import delta_net
from models import packed_chunks as chunks_file
from models.config import DeltaHeads
from models.decoding.draw import Sampling
from models.decoding.storage import cast
from models.delta_rule import delta_rule
from models.layers import ZeroCentredRMSNorm
from models.packed_chunks import packed_chunks
from tests.test_mixers import drawn_and_expected
from tests.tiny import IMAGE, family_config, tiny_model, tiny_prompt

CPU = torch.device("cpu")
HEADS = {
    "one key head for two": DeltaHeads(keys=2, values=4, key_dim=6, value_dim=5, kernel=4),
    "one for three, kernel 2": DeltaHeads(keys=1, values=3, key_dim=8, value_dim=8, kernel=2),
    "kernel 1": DeltaHeads(keys=1, values=2, key_dim=5, value_dim=4, kernel=1),
    "one for one, kernel 6": DeltaHeads(keys=3, values=3, key_dim=4, value_dim=7, kernel=6),
}
ROWS = {
    "one token": ((1,),),
    "short prompts": ((1, 1, 3), (3, 2, 1), (2, 70)),
    "ends of chunks": ((63, 64, 1, 65), (64, 1), (65, 63)),
    "no completions": ((5,), (130,), (64,), (1,)),
    "some without": ((7, 3), (9,), (70, 5, 70), (33,)),
    "an empty one": ((5, 0, 3, 0), (6, 0)),
}


def recurrence(columns, g, beta, conv, heads):
    """A sequence, (T, W) columns and so on, by the equations: outputs (T, H, Dv), last state."""
    past = torch.cat((columns.new_zeros(heads.kernel - 1, columns.shape[1]), columns))
    mixed = [(past[t : t + heads.kernel] * conv.T).sum(0) for t in range(len(columns))]
    state = columns.new_zeros(heads.values, heads.key_dim, heads.value_dim)
    outputs, repeats = [], heads.values // heads.keys
    for t, row in enumerate(mixed):
        q, k, v = (row / (1 + (-row).exp())).split(heads.widths)
        q, k = (x.view(heads.keys, -1).repeat_interleave(repeats, 0) for x in (q, k))
        q, k = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        state = state * g[t].exp()[:, None, None]
        seen = (state * k[:, :, None]).sum(1)
        correction = beta[t][:, None] * (v.view(heads.values, -1) - seen)
        state = state + k[:, :, None] * correction[:, None]
        outputs.append((state * q[:, :, None]).sum(1) / heads.key_dim**0.5)
    return torch.stack(outputs), state


def inputs(rows, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tokens = sum(map(sum, rows))
    g = -3 * randn(tokens, heads.values).square()  # from hardly any decay to all
    beta = randn(tokens, heads.values).sigmoid()
    return [randn(tokens, sum(heads.widths)), g, beta, randn(sum(heads.widths), heads.kernel)]


def one_by_one(leaves, rows, heads):
    """Each prompt, and each completion after a copy of its prompt: outputs, the prompts' states."""
    outputs, states, start = [], [], 0
    *packed, conv = leaves
    for prompt, *completions in rows:
        before = [x[start : start + prompt] for x in packed]
        out, state = recurrence(*before, conv, heads)
        outputs.append(out)
        states.append(state)
        start += prompt
        for length in filter(None, completions):
            own = [
                torch.cat((b, x[start : start + length]))
                for b, x in zip(before, packed, strict=True)
            ]
            outputs.append(recurrence(*own, conv, heads)[0][prompt:])
            start += length
    return torch.cat(outputs), torch.stack(states)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    "kind, at_once", [*((kind, 4096) for kind in HEADS), ("one key head for two", 100)]
)
def test_packed_rows_equal_the_recurrence_on_copies_of_each_prompt(
    monkeypatch, rows, kind, at_once
):
    """Outputs, states and every gradient; those of all completions reach their prompt."""
    heads = HEADS[kind]
    monkeypatch.setattr(chunks_file, "AT_ONCE", at_once)
    monkeypatch.setattr(chunks_file, "LEAST", 64 if at_once == 4096 else 16)
    leaves = [x.requires_grad_() for x in inputs(rows, heads)]
    expected, last = one_by_one(leaves, rows, heads)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    packed = packed_chunks(rows, heads, CPU)
    out, states = delta_rule(*leaves, packed, heads)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(states, last, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad((out * direction).sum(), leaves)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=1e-10)


def test_a_prompts_gradient_comes_from_its_completions():
    """Also where only completions are looked at, through the state and through the convolution."""
    heads, rows = HEADS["one key head for two"], ((3, 2, 5),)
    leaves = [x.requires_grad_() for x in inputs(rows, heads)]
    out, _ = delta_rule(*leaves, packed_chunks(rows, heads, CPU), heads)
    gradient, *_ = torch.autograd.grad(out[3:].sum(), leaves)
    assert (gradient[:3].abs().amax(1) > 1e-6).all()


def test_columns_of_zeros_have_a_finite_gradient():
    """The length of q and k is that of a vector which may be 0."""
    heads, rows = HEADS["one key head for two"], ((4, 3),)
    columns, g, beta, conv = inputs(rows, heads)
    columns = torch.zeros_like(columns).requires_grad_()
    out, _ = delta_rule(columns, g, beta, conv, packed_chunks(rows, heads, CPU), heads)
    (gradient,) = torch.autograd.grad(out.sum(), columns)
    assert out.abs().max() == 0 and gradient.isfinite().all()


def test_a_decay_to_nothing_is_no_overflow():
    """exp(-500) within a chunk: differences of its sums are never positive. In float32 a sum of
    thousands has an error of 1e-4, which is a relative one of what decays."""
    heads, rows = HEADS["one key head for two"], ((70, 66),)
    leaves = inputs(rows, heads)
    leaves[1] = torch.where(torch.rand_like(leaves[1]) < 0.2, -500.0, leaves[1])
    expected, _ = one_by_one(leaves, rows, heads)
    leaves = [x.float().requires_grad_() for x in leaves]
    out, _ = delta_rule(*leaves, packed_chunks(rows, heads, CPU), heads)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_half_precision_comes_in_and_float32_goes_on():
    """Only what comes in is rounded: the rule equals that of the rounded inputs."""
    heads, rows = HEADS["one key head for two"], ((100, 30, 20),)
    columns, g, beta, conv = inputs(rows, heads)
    columns, conv = columns.bfloat16().requires_grad_(), conv.bfloat16().requires_grad_()
    packed = packed_chunks(rows, heads, CPU)
    out, states = delta_rule(columns, g.float(), beta.float(), conv, packed, heads)
    expected, _ = one_by_one([columns.double(), g, beta, conv.double()], rows, heads)
    assert out.dtype == states.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert columns.grad.dtype == conv.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("types", ["linear_attention", "full_attention", "both"])
def test_three_hundred_tokens_on_what_is_drawn_has_the_log_probs_of_the_packed_pass(types):
    """In float64: by then the matrices have been added to 18 times."""
    config = family_config("qwen3_5", tied=True)
    kinds = config.layer_types[:2] if types == "both" else (types,)
    config = replace(config, layer_types=kinds, num_hidden_layers=len(kinds))
    model = tiny_model(config, torch.float64, scale=2)
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    prompts = [tiny_prompt(config, grids, seed=i) for i, grids in enumerate(([], [(4, 6)]))]
    with torch.no_grad():
        drawn = drawn_and_expected(model, prompts, 2, Sampling(300))
    for completion, found, wanted in zip(*drawn, strict=True):
        assert len(completion) == 300
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_sampled_and_trained_log_probs_differ_by_rounding():
    """No more than those of attention alone do: states, keys and corrections are in float32."""
    difference = {}
    for kind in ("linear_attention", "full_attention"):
        config = family_config("qwen3_5", tied=True)
        config = replace(config, layer_types=(kind,) * 4)
        model = cast(tiny_model(config, torch.float32, scale=2), torch.bfloat16)
        model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
        with torch.no_grad():
            drawn = drawn_and_expected(model, [tiny_prompt(config, [(4, 6)])], 8, Sampling(100))
        pairs = zip(*drawn[1:], strict=True)
        difference[kind] = max(float((f - w.float()).abs().max()) for f, w in pairs)
    assert difference["linear_attention"] < 2 * difference["full_attention"] < 0.2


def test_state_is_added_to_every_window(monkeypatch):
    """Whatever the window is, the text is the same; the matrices are written that seldom."""
    config = family_config("qwen3_5")
    model = tiny_model(config, torch.float64)
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    texts, written = set(), {}
    for window in (1, 3, 16):
        monkeypatch.setattr(delta_net, "WINDOW", window)
        between, times = delta_net.DeltaState.between, []

        def counted(state, tokens, between=between, times=times):
            before = state.layers[0].memory[..., : -delta_net.WINDOW].clone()
            between(state, tokens)
            times.append(not torch.equal(before, state.layers[0].memory[..., : -delta_net.WINDOW]))

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(delta_net.DeltaState, "between", counted)
            completions, *_ = drawn_and_expected(model, [tiny_prompt(config, [])], 1, Sampling(25))
        texts.add(tuple(completions[0]))
        written[window] = sum(times)
    assert len(texts) == 1 and written == {1: 23, 3: 7, 16: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_norm_is_float32_and_rounded_once(dtype):
    norm = ZeroCentredRMSNorm(40, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, std=0.5)
    x = torch.randn(7, 40).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * (1 + norm.weight.double())
    torch.testing.assert_close(norm(x).double(), expected.to(dtype).double(), atol=1e-6, rtol=1e-6)
    torch.nn.init.zeros_(norm.weight)
    unit = F.normalize(wide, dim=1) * 40**0.5
    torch.testing.assert_close(norm(x).double(), unit, atol=2e-2, rtol=2e-2)


def test_a_checkpointed_layer_keeps_its_input_alone():
    """No state and no inverse: what a pass keeps of one layer more is what went into it."""
    config = family_config("qwen3_5")
    config = replace(config, layer_types=("linear_attention",) * 4)
    model, rows = Skeleton(config, bf16=False, device="cpu", kernel="sdpa"), ((90, 40, 70), (30,))
    kept = [
        model.decode([model.layers[0]] * count, rows, True, checkpointing=True).left
        for count in (2, 3)
    ]
    assert kept[1] - kept[0] == sum(map(sum, rows)) * config.hidden_size * 4
