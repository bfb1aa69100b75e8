"""models/fused.py: the same numbers as autograd's, whether or not a function is compiled."""

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grpo.engine import head
from grpo.engine.head import _exponentials, token_chunks, token_logps
from models import fused
from models.layers import Gated, cos_sin, gated, rotate
from models.lora import LoRA, LoRALinear
from models.qwen2_vl import QuickGELU

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def by_autograd(x, cos, sin):
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def both(form, *inputs) -> list[torch.Tensor]:
    """The result and the inputs' gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = form(*leaves)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU takes the way of a GPU, for tensors of any size."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "LEAST", 0)
    fused.multiplies_into_float32.cache_clear()
    yield
    fused.multiplies_into_float32.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_numbers_and_gradients_are_those_of_autograd(dtype, wide):
    """To the byte; the tower rotates by float32 cosines, in views of strides of their own."""
    x, y = (3 * torch.randn(37, 3 * 2 * 20)).to(dtype), torch.randn(37, 120).to(dtype)
    turns = cos_sin(torch.randn(37, 10), torch.promote_types(dtype, torch.float32))
    turns = turns if wide else [part.to(dtype) for part in turns]

    def middle(x):
        return x.view(37, 3, 2, 20).unbind(1)[1]

    pairs = [
        (both(Gated.apply, x, y), both(lambda x, y: F.silu(x) * y, x, y)),
        (both(QuickGELU.apply, x), both(lambda x: x * torch.sigmoid(1.702 * x), x)),
        (
            both(lambda x: rotate(middle(x), *turns), x),
            both(lambda x: by_autograd(middle(x), *turns), x),
        ),
    ]
    for found, expected in pairs:
        for here, there in zip(found, expected, strict=True):
            assert here.dtype == there.dtype and torch.equal(here, there)


def wrong(function):
    return lambda *args: function(*args) * 1.2


def impossible(function):
    raise RuntimeError("no C compiler\nand more")


@pytest.mark.parametrize(
    ("make", "said"),
    [(wrong, "its numbers are others"), (impossible, "RuntimeError: no C compiler\n")],
)
def test_what_cannot_be_compiled_or_is_wrong_runs_as_it_is(on_gpu, monkeypatch, capsys, make, said):
    monkeypatch.setattr(torch, "compile", lambda function, **_: make(function))
    door = fused.Fused(gated.function)
    for dtype in DTYPES:
        x, y = torch.randn(100, 8, dtype=dtype), torch.randn(100, 8, dtype=dtype)
        assert torch.equal(door(x, y), F.silu(x) * y)
    line = capsys.readouterr().err
    assert "gated is not compiled, which is slower" in line and said in line
    assert line.count("\n") == 1


def test_the_compiled_form_is_called_where_it_pays_and_compared_once_a_kind(on_gpu, monkeypatch):
    calls = {"compiled": [], "itself": []}

    def noted(name):
        def form(x, y):
            calls[name].append(len(x))
            return gated.function(x, y)

        return form

    monkeypatch.setattr(torch, "compile", lambda function, **_: noted("compiled"))
    door = fused.Fused(noted("itself"))
    for rows in (100, 200, 300):
        door(torch.randn(rows, 8), torch.randn(rows, 8))
    assert calls == {"compiled": [100, 200, 300], "itself": [fused.ROWS]}
    door(torch.randn(8, 90).T, torch.randn(90, 8))  # another kind
    monkeypatch.setattr(fused, "LEAST", 1000)
    door(torch.randn(50, 8), torch.randn(50, 8))
    assert calls["itself"] == [fused.ROWS, fused.ROWS, 50]


def test_where_other_sizes_cannot_be_compiled_anew_it_runs_as_it_is(on_gpu, monkeypatch, capsys):
    def once(x, y):
        if len(x) == 200:  # e.g. beyond what an index of 32 bits reaches
            raise RuntimeError("no space left on device")
        return gated.function(x, y)

    monkeypatch.setattr(torch, "compile", lambda function, **_: once)
    door = fused.Fused(gated.function)
    for rows in (100, 200, 300):
        x, y = torch.randn(rows, 8), torch.randn(rows, 8)
        assert torch.equal(door(x, y), F.silu(x) * y)
    assert capsys.readouterr().err.count("gated is not compiled, which is slower") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torch_compile_makes_one_form_for_all_lengths(on_gpu, capsys):
    """Also under checkpointing, whose second forward pass runs in the backward pass."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for form in (gated, _exponentials):
        form.compiled, form.agreed = None, set()

    def layer(x, y, recompute):
        return checkpoint(Gated.apply, x, y, use_reentrant=False) if recompute else F.silu(x) * y

    for length in (100, 133, 90):
        x, y = torch.randn(length, 24), torch.randn(length, 24)
        results = (both(lambda x, y, on=on: layer(x, y, on), x, y) for on in (True, False))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
        logits, aimed = torch.randn(length, 50).bfloat16(), torch.randn(length, 1)
        args = logits, aimed, 1.0, torch.bfloat16
        torch.testing.assert_close(_exponentials(*args), _exponentials.function(*args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_the_head_has_the_same_numbers_on_a_gpu(on_gpu, monkeypatch, temperature, entropy, capsys):
    """There logits in float32 are not kept: a gradient of the entropy forms them again."""
    monkeypatch.setattr(fused.Fused, "__call__", lambda self, *args: self.function(*args))
    hidden, weight = torch.randn(37, 16).bfloat16(), torch.randn(90, 16).bfloat16()
    given = torch.randint(5, 90, (37,)), temperature, torch.tensor([2, 3]), 10

    def chunks(hidden, weight):
        found = []
        for _, logps, entropies in token_chunks(hidden, weight, *given):
            (logps.sum() + entropy * entropies.sum()).backward()
            found.append(logps.detach())
        return torch.cat(found)

    def at_once(hidden, weight):
        logps, entropies = token_logps(hidden, weight, *given)
        (logps.sum() + entropy * entropies.sum()).backward()
        return logps.detach()

    for form in (chunks, at_once):
        results = []
        for devices in ({"cpu"}, set()):
            monkeypatch.setattr(fused, "DEVICES", devices)
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            with torch.no_grad():
                scored = token_logps(*leaves, *given)[0]
            results.append([form(*leaves), scored, *(leaf.grad for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
    # a CPU cannot multiply bf16 into float32: it says so once, and subtracts the product
    assert capsys.readouterr().err.count("the head's gradient takes another pass over memory") == 1


@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_logits_in_float32_exist_on_a_gpu_only_for_the_entropy(on_gpu, monkeypatch, entropy):
    """As the plan of the memory counts them."""
    monkeypatch.setattr(fused.Fused, "__call__", lambda self, *args: self.function(*args))
    made, original = [], head._Buffers.logits.func
    logits = functools.cached_property(lambda self: made.append(self) or original(self))
    logits.__set_name__(head._Buffers, "logits")
    monkeypatch.setattr(head._Buffers, "logits", logits)
    hidden, weight = (torch.randn(n, 16).bfloat16().requires_grad_() for n in (37, 90))
    given = torch.randint(90, (37,)), 1.0, None, 10
    for _, logps, entropies in token_chunks(hidden, weight, *given):
        (logps.sum() + entropy * entropies.sum() if entropy else logps.sum()).backward()
    logps, entropies = token_logps(hidden, weight, *given)
    (logps.sum() + entropy * entropies.sum() if entropy else logps.sum()).backward()
    assert len(made) == (2 if entropy else 0)


def test_an_adapter_adds_within_its_product_on_a_gpu(monkeypatch):
    lora = LoRALinear(nn.Linear(12, 20).double(), LoRA(4, 8), torch.zeros(1, dtype=torch.float64))
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    results, x = [], torch.randn(9, 12, dtype=torch.float64)
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(fused, "DEVICES", devices)
        monkeypatch.setattr(fused, "LEAST", 0)
        lora.zero_grad()
        found = both(lora, x)
        lora(x).sum().backward()
        results.append([*found, *(parameter.grad.clone() for parameter in lora.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
