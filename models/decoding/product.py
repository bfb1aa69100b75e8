"""Linear layers with one input as one product, as decoding multiplies by them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.four_bit import FourBitLinear
from models.lora import LoRALinear

LARGE = 2**20  # numbers of a matrix; with fewer, `mm` is as fast
MANY = 12  # rows


class Product(NamedTuple):
    """Linear layers with one input as one product, their outputs side by side; and their adapters.

    weight: (in, out), a view of the layers' own; None if it is in 4 bits and unpacked for each
    product, from `packed`. bias: (out,). adapter_A: (n r, in) of the n layers that have adapters,
    adapter_B: (out, n r), block-diagonal, times each layer's scale.
    """

    weight: Tensor | None
    packed: tuple[FourBitLinear, ...]
    bias: Tensor | None
    adapter_A: Tensor | None
    adapter_B: Tensor | None

    @classmethod
    def of(cls, *linears: nn.Linear) -> "Product":
        packed = linears if isinstance(linears[0], FourBitLinear) else ()
        weight = None if packed else joined(linears).T
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(biases)
        adapted = [linear for linear in linears if isinstance(linear, LoRALinear)]
        if not adapted:
            return cls(weight, packed, bias, None, None)
        up = [
            linear.lora_B * linear.scale
            if linear in adapted
            else adapted[0].lora_B.new_empty(linear.out_features, 0)
            for linear in linears
        ]
        down = torch.cat([linear.lora_A for linear in adapted])
        return cls(weight, packed, bias, down, torch.block_diag(*up))

    @property
    def tensors(self) -> list[Tensor]:
        """All of it but what is in 4 bits."""
        return [part for part in self if isinstance(part, Tensor)]

    def __call__(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """(M, in) -> (M, out): with the bias, into `out` if there is one; or without a bias, added
        to `add` (M, out) in place."""
        weight = joined(self.packed).T if self.packed else self.weight
        if add is not None:
            out = add_product(add, x, weight.T)
        elif beats_mm(x, weight.T):
            product = large_product(x, weight.T, self.bias)
            out = product if out is None else out.copy_(product)
        elif self.bias is not None:
            out = torch.addmm(self.bias, x, weight, out=out)
        else:
            out = torch.mm(x, weight, out=out)
        if self.adapter_A is not None:
            add_product(out, torch.mm(x, self.adapter_A.T), self.adapter_B)
        return out


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Adds x W^T to `out` (M, out) in place. x: (M, in). weight: (out, in)."""
    if beats_mm(x, weight):
        return out.add_(large_product(x, weight))
    return out.addmm_(x, weight.T)


def beats_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether `large_product` is faster than `mm` for x (M, in) and weight (out, in): on a CPU, for
    large matrices; in bfloat16, where `mm` is oneDNN's already, only for many rows."""
    if x.device.type != "cpu" or weight.numel() < LARGE:
        return False
    if x.dtype == torch.float32:
        return torch.backends.mkldnn.is_available()
    return x.dtype == torch.bfloat16 and len(x) >= MANY


def large_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, in) times a large matrix (out, in), (M, out), without gradients: where it `beats_mm`.

    `mm` in float32 is MKL's: for a dozen rows it takes up to three times as long as oneDNN,
    whichever factor comes first (docs/LOG.md).
    """
    if x.dtype == torch.float32:
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    product = torch.mm(weight, x.T).T.contiguous()
    return product if bias is None else product.add_(bias)


def joined(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights of these layers as one (out, in): the block that they are parts of if
    models/decoding/storage.py laid them out so, else a copy; an unpacked one if they are in 4 bits.
    """
    if isinstance(linears[0], FourBitLinear):
        if len(linears) == 1:
            return linears[0].unpacked()
        sizes, like = [linear.out_features for linear in linears], linears[0].scales
        block = torch.empty(
            sum(sizes), linears[0].in_features, dtype=like.dtype, device=like.absmax.device
        )
        for linear, part in zip(linears, block.split(sizes), strict=True):
            four_bit = isinstance(linear, FourBitLinear)
            part.copy_(linear.unpacked() if four_bit else linear.weight.detach())
        return block
    first, *others = weights = [linear.weight.detach() for linear in linears]
    end = first.storage_offset() + first.numel()
    for weight in others:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.storage_offset() != end:
            return torch.cat(weights)
        end += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
