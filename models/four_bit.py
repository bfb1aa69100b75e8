"""Frozen linear layers in 4 bits: NF4 with double quantization (Dettmers et al. 2023, QLoRA).

Each weight is one of 16 values times the largest of its block of 64; these are kept in 8 bits
(section 3). bitsandbytes packs and unpacks. Whoever multiplies by such a weight unpacks it first,
in training as in decoding, so both compute the same policy; no unpacked weight outlives its
product. Only the decoder's layers are packed: not the embedding, the head and the vision tower.
"""

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight takes


@functools.cache
def library() -> ModuleType:
    """bitsandbytes.functional, imported when it is needed."""
    # it warns of a kernel for some CPUs that it does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


class FourBitLinear(nn.Linear):
    """A frozen linear layer, (..., in) -> (..., out); it has no `weight` but the packed one."""

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None):
        super().__init__(in_features, out_features, bias, device)
        self.weight = None

    def pack(self, weight: Tensor) -> None:
        """Takes over a weight (out, in), on the device and in the dtype to compute in.

        packed: 8 bits for two numbers; scales: bitsandbytes' QuantState; bits: a sum over the bits
        of the weight as it came.
        """
        self.bits = int(weight.view(torch.uint8).sum(dtype=torch.int64))
        options = {"quant_type": "nf4", "compress_statistics": True}
        self.packed, self.scales = library().quantize_4bit(weight, **options)

    def unpacked(self) -> Tensor:
        """The weight (out, in), in the dtype that it was packed from."""
        return library().dequantize_4bit(self.packed, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


def packable(decoder: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers in `decoder`, each with the module that has it and its name there, but for
    those that the module names in UNPACKED."""
    return [
        (parent, name, layer)
        for parent in decoder.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and name not in getattr(parent, "UNPACKED", ())
    ]


def use_four_bits(decoder: nn.Module) -> None:
    """Puts a FourBitLinear in the place of each `packable` layer; `pack` fills them."""
    for parent, name, layer in packable(decoder):
        packed = FourBitLinear(layer.in_features, layer.out_features, bias=False)
        packed.bias = layer.bias
        setattr(parent, name, packed)


def four_bit_layers(model: nn.Module) -> dict[str, FourBitLinear]:
    """The layers of the model whose weights are in 4 bits, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FourBitLinear)}


class _Product(torch.autograd.Function):
    """x W^T + b, b frozen, without keeping the unpacked W for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked(), None
