"""The decode step's products with weights, in each form and in both ways a CPU multiplies."""

import pytest
import torch
from torch import nn

from models.decoding import product as products
from models.decoding.generate import head
from models.decoding.product import LARGE, MANY, Product, beats_mm
from models.four_bit import FourBitLinear
from models.lora import LoRA, LoRAFourBitLinear, LoRALinear

WIDTHS, WIDTH = (128, 64), 64  # of two layers with one input


@pytest.fixture
def counted(monkeypatch):
    """Every matrix is large. Returns the shapes of the weights that `large_product` has taken."""
    taken, original = [], products.large_product

    def large_product(x, weight, bias=None):
        taken.append(tuple(weight.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "large_product", large_product)
    return taken


def layers(dtype, bias, adapters, four_bits):
    """Two linear layers, and their (out, in) weights in float64."""
    made, weights = [], []
    for width in WIDTHS:
        kind = FourBitLinear if four_bits else nn.Linear
        layer = kind(WIDTH, width, bias=bias).to(dtype)
        if adapters:
            kind = LoRAFourBitLinear if four_bits else LoRALinear
            layer = kind(layer, LoRA(4, 8.0), like=torch.empty(0, dtype=dtype))
            nn.init.normal_(layer.lora_A, 0, 0.1)
            nn.init.normal_(layer.lora_B, 0, 0.1)
        if four_bits:
            layer.pack((torch.randn(width, WIDTH) / 8).to(dtype))
        weight = (layer.unpacked() if four_bits else layer.weight).double()
        if adapters:
            weight = weight + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        made.append(layer)
        weights.append(weight)
    return made, torch.cat(weights)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("rows", [1, 7, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_are_those_of_float64_in_every_form(counted, dtype, rows, adapters, four_bits):
    torch.manual_seed(0)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    wide = torch.randn(rows, 2 * WIDTH).to(dtype)
    for x in (wide[:, :WIDTH].contiguous(), wide[:, WIDTH:]):
        for bias in (False, True):
            linears, weight = layers(dtype, bias, adapters, four_bits)
            product = Product.of(*linears)
            right = x.double() @ weight.T
            if bias:
                right = right + torch.cat([linear.bias for linear in linears]).double()
            plain = product(x)
            assert plain.is_contiguous() and plain.dtype == dtype
            torch.testing.assert_close(plain.double(), right, **close)
            for out in (torch.empty_like(plain), plain.new_empty(rows, 500)[:, 100:292]):
                assert product(x, out=out) is out
                torch.testing.assert_close(out.double(), right, **close)
            if not bias:
                sums = plain.new_ones(rows, sum(WIDTHS))
                assert product(x, add=sums) is sums
                torch.testing.assert_close(sums.double(), right + 1, **close)
    large = (sum(WIDTHS), WIDTH)
    used = dtype == torch.float32 or rows == MANY
    assert counted.count(large) == 2 * 7 * used
    assert counted.count((sum(WIDTHS), 8)) == 2 * 7 * used * adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_only_large_matrices_on_a_cpu_are_multiplied_otherwise(dtype):
    def beats(rows, size, device="cpu"):
        x = torch.empty(rows, 1024, dtype=dtype, device=device)
        return beats_mm(x, torch.empty(size // 1024, 1024, dtype=dtype, device=device))

    few, many = (dtype == torch.float32, dtype != torch.float64)
    assert [beats(rows, LARGE) for rows in (1, MANY - 1, MANY, 64)] == [few, few, many, many]
    assert not any(beats(rows, LARGE - 1024) for rows in (1, MANY, 64))
    assert not any(beats(rows, 4 * LARGE, "meta") for rows in (1, MANY, 64)), "any other device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, MANY])
@torch.no_grad()
def test_the_head_of_a_large_vocabulary(dtype, rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 64).to(dtype), torch.randn(LARGE // 64, 64).to(dtype)
    logits = head(hidden, weight)
    assert logits.is_contiguous() and beats_mm(hidden, weight) == (
        dtype == torch.float32 or rows == MANY
    )
    torch.testing.assert_close(
        logits.double(), hidden.double() @ weight.double().T, atol=1e-4, rtol=1e-2
    )
