"""Counts at torch's dispatcher: launches, waits for the device, and on the meta device work."""

import math
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
FLOPS, BANDWIDTH = 800e12, 3.0e12  # of an H100, bfloat16: a second, bytes a second
COPIES = {"_to_copy", "copy_", "clone"}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_"}
NO_KERNEL |= {"record_stream", "is_pinned", "set_", "lift_fresh", "detach", "alias", "pin_memory"}
NO_KERNEL |= {"_pin_memory", "_local_scalar_dense"}
OVERWRITE = {"copy_", "zero_", "fill_"}  # do not read what they write
FEW = {"embedding", "index", "index_select", "gather", "scatter_", "index_fill_", "index_add_"}
FEW |= {"index_copy_", "index_put_"}


class Count(TorchDispatchMode):
    """What passes through torch's dispatcher: launches, waits by line of our code, operations on
    (chunk, V) and copies among them; on meta also multiplications, bytes and seconds."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.operations, self.waits = vocabulary, Counter(), Counter()
        self.logits = self.logit_copies = self.flops = self.bytes = self.seconds = 0

    def __enter__(self):
        Norm.count = self
        return super().__enter__()

    @property
    def launches(self) -> int:
        return self.operations.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        syncs = getattr(torch, "_rehearsal", ({}, Counter()))[1]
        before = syncs.total()
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if all(t.device.type == "cpu" for t in given + made):
            return result
        if syncs.total() > before or self.blocks(name, func, args, kwargs):
            self.waits[place()] += 1
        if func.is_view or name in NO_KERNEL or not made and not given:
            return result
        self.operations[name] += 1
        if any(t.ndim == 2 and t.shape[1] == self.vocabulary for t in given + made):
            self.logits += 1
            self.logit_copies += name in COPIES
        packet, flops = func._overloadpacket, 0
        if name.startswith("_varlen_attn"):
            flops = attention_flops(name, args)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        self.take(flops, moved(name, func, args, kwargs, given, made))
        return result

    def take(self, flops: float, size: float) -> None:
        self.flops += flops
        self.bytes += size
        self.seconds += max(flops / FLOPS, size / BANDWIDTH)

    @staticmethod
    def blocks(name, func, args, kwargs) -> bool:
        """Waits that the emulated device does not count (it does not know pinned memory)."""
        if name == "_to_copy" and args[0].device.type == "cpu":
            return not kwargs.get("non_blocking")
        if name == "lift_fresh":  # of torch.tensor(..., device=)
            return True
        if name == "copy_" and args[0].device != args[1].device:
            return not (len(args) > 2 and args[2])
        if name == "index":
            return any(t is not None and t.dtype == torch.bool for t in args[1])
        return func is torch.ops.aten.repeat_interleave.Tensor and not kwargs.get("output_size")


def place() -> str:
    """The innermost line of our code that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.parent.name != "benchmarks":
            return f"{path.relative_to(ROOT)}:{frame.lineno} `{frame.line}`"
    return "a benchmark or autograd"


def moved(name, func, args, kwargs, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that one operation reads and writes, each tensor once."""

    def size(t: Tensor) -> int:  # what is expanded is read once
        lengths = zip(t.shape, t.stride(), strict=True)
        return math.prod(n for n, step in lengths if step) * t.itemsize

    if name in FEW:
        few = given[1:] if name.endswith("_") else made
        return 2 * sum(size(t) for t in few)
    if name.startswith("_foreach") and not made and name != "_foreach_copy_":
        return 2 * sum(size(t) for t in given)
    if name in OVERWRITE or func._overloadname == "out":
        made = made if name not in OVERWRITE else made[:1]
        given = [t for t in given if all(t is not one for one in made)]
    return sum(size(t) for t in given) + sum(size(t) for t in made)


def attention_flops(name: str, args) -> int:
    """Of variable-length attention: two products, or five of a backward pass; for causal ones only
    what is seen. Prompts are of one length, completions of another, which is smaller."""
    backward = "backward" in name
    q, cu_q, longest, keys = (args[i] for i in ((1, 6, 8, 9) if backward else (0, 3, 5, 6)))
    tokens, heads, dim = q.shape
    sequences, own = len(cu_q) - 1, keys - longest
    pairs = tokens * longest
    if any(isinstance(x, (list, tuple)) and list(x) == [-1, 0] for x in args):
        rows = (tokens - sequences * own) // (longest - own)
        pairs = rows * longest * (longest + 1) // 2
        pairs += (sequences - rows) * (own * longest + own * (own + 1) // 2)
    return (10 if backward else 4) * heads * dim * pairs


class Norm(torch.autograd.Function):
    """RMSNorm on meta as one kernel and its backward pass as two, as on CUDA."""

    count: Count | None = None  # where they are counted

    @classmethod
    def note(cls, kernels: int, size: int) -> None:
        if cls.count is not None:
            cls.count.operations["_fused_rms_norm"] += kernels
            cls.count.take(0, size)

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        Norm.note(1, 2 * x.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        Norm.note(2, 5 * x.nbytes)
        return torch.empty_like(x), torch.empty_like(weight)
