"""Counts at torch's dispatcher for a peer's code: `Count` where integers keep their values.

On the meta device nothing has values, but transformers and TRL read ids, masks and grids. So these
are tensors on the CPU, which stand for the GPU's: what is done with them counts as launches. Where
one is combined with a tensor on meta, only its shape is used.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.dispatch import NO_KERNEL, Count, Norm, moved


class PeerCount(Count):
    """As `Count`; integers on the CPU stand for the GPU's, and may meet tensors on meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        found = []
        tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        on_meta = any(t.is_meta for t in found)
        if name == "_to_copy":  # what has no values goes nowhere; what has some keeps them
            kwargs.pop("device", None)
        if on_meta and name == "masked_select":  # of a mask with values
            size = int(args[1].expand_as(args[0]).sum())
            args, func = (args[0].new_empty(size),), torch.ops.aten.clone.default
        elif on_meta and any(not t.is_meta for t in found):
            if name.startswith("index"):  # masks as the indices at which they are true
                args = (args[0], places(args[1]), *args[2:])
            args, kwargs = tree_map(to_meta, (args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [t for t in (result,) if isinstance(t, Tensor)]
        here = found + made and not on_meta and not any(t.is_meta for t in made)
        if here and not func.is_view and name not in NO_KERNEL:
            self.operations[name] += 1
            self.take(0, moved(name, func, args, kwargs, found, made))
        return result

    def state(self) -> tuple[float, float, int, float]:
        return self.flops, self.bytes, self.launches, self.seconds


def to_meta(x):
    """A tensor's shape, without its values."""
    if not isinstance(x, Tensor) or x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def places(indices):
    """An operation's indices, with those of its masks in place of the masks."""
    if isinstance(indices, Tensor) or not isinstance(indices, (list, tuple)):
        return indices
    pairs = [
        i.nonzero(as_tuple=True) if i is not None and i.dtype == torch.bool else (i,)
        for i in indices
    ]
    return [index for some in pairs for index in some]


def less(a: tuple, b: tuple) -> tuple:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def plus(a: tuple, b: tuple, times: float = 1) -> tuple:
    return tuple(x + times * y for x, y in zip(a, b, strict=True))


class Flash(torch.autograd.Function):
    """(B, T, heads, D) from q, k, v of (B, heads, T, D); pairs: of queries and keys that see one
    another, over the batch."""

    @staticmethod
    def forward(ctx, q, k, v, pairs):
        ctx.save_for_backward(q, k, v)
        ctx.flops = 2 * q.shape[1] * q.shape[3] * pairs  # of one product
        note("flash", 1, 2 * ctx.flops, 2 * q.nbytes + k.nbytes + v.nbytes)
        return q.new_empty(q.transpose(1, 2).shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        note("flash", 1, 5 * ctx.flops, 4 * q.nbytes + 2 * k.nbytes + 2 * v.nbytes)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def note(name: str, launches: int, flops: float, size: float) -> None:
    """Adds work that torch's dispatcher does not see to the count that is open."""
    Norm.count.operations[name] += launches
    Norm.count.take(flops, size)


def attention(module, query, key, value, attention_mask, is_causal=None, cu_seq_lens_q=None, **_):
    """transformers' door to attention; nothing is padded, so there is no mask."""
    assert attention_mask is None
    rows, seen = query.shape[2], key.shape[2]
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.tolist()
        pairs = sum((b - a) ** 2 for a, b in pairwise(ends))
    elif module.is_causal if is_causal is None else is_causal:
        pairs = query.shape[0] * (rows * seen - rows * (rows - 1) // 2)
    else:
        pairs = query.shape[0] * rows * seen
    return Flash.apply(query, key, value, pairs), None
