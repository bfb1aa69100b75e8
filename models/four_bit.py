"""Frozen linear layers in 4 bits: NF4 with double quantization (Dettmers et al. 2023, QLoRA).

Each weight is one of 16 values times the largest of its block of 64; these are kept in 8 bits
(section 3). bitsandbytes packs and unpacks. Whoever multiplies by such a weight unpacks it first,
in training as in decoding, so both compute the same policy; no unpacked weight outlives its
product. The embedding, the head and the vision tower are not packed.
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

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device=None):
        super().__init__(in_features, out_features, bias, "meta")
        self.weight = None
        self.packed: Tensor | None = None

    def pack(self, weight: Tensor) -> None:
        """Takes over a weight (out, in), on the device and in the dtype to compute in."""
        options = {"quant_type": "nf4", "compress_statistics": True}
        self.packed, self.scales = library().quantize_4bit(weight, **options)

    def unpacked(self, out: Tensor | None = None) -> Tensor:
        """The weight (out, in), written to `out` if that is given."""
        return library().dequantize_4bit(self.packed, self.scales, out=out)

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x W^T without keeping the unpacked W for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked(), None
