"""What a model's passes hold in memory besides its weights: the layers are asked.

A layer is run on torch's meta device, where tensors have shapes and no numbers, and each storage
that it makes is counted from when it is made until it is freed. So a layer of any kind is counted
as it is written. Two kernels alone are replaced, because the meta device would take another route
than the device that is planned for: see `Kernels`.

Not here: weights, gradients of weights, the head (grpo/plan/memory.py).
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.plan.sizes import count
from models.config import QwenVLConfig
from models.decoding.storage import cast
from models.lora import LoRA, check_fit
from models.qwen_vl import QwenVL

META = torch.device("meta")
Rows = tuple[tuple[int, ...], ...]  # packed: (prompt, completion, ..., completion) tokens of each


class Held(TorchDispatchMode):
    """Counts the bytes of tensors on a device that are made inside and still exist.

    weights: those of the layers, which are counted elsewhere. now: bytes at this moment; most: the
    largest value so far.
    """

    def __init__(self, weights: Iterable[Tensor], device: torch.device = META):
        super().__init__()
        self.device = device
        self.now = self.most = 0
        # storages by their address in the host's memory: all data pointers are 0 on meta
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self.count(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or key in self.weights:
            return

        def freed(_) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size


class Kernels(TorchFunctionMode):
    """SDPA, and for a GPU RMSNorm, as one kernel each, as on the device that is planned for.

    On meta SDPA would form the scores of all pairs of tokens, and RMSNorm takes several operations,
    which is right for a CPU alone.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        if func is F.rms_norm and self.device == "cuda":
            return FusedNorm.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


class FusedAttention(torch.autograd.Function):
    """Keeps q, k and v (rows, heads, tokens, head dimension), the output, and a float32 number for
    each query of each head (Dao et al. 2022, algorithm 2)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class FusedNorm(torch.autograd.Function):
    """Keeps its input, and a float32 number for each vector that it scales."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:2])


class Bytes(NamedTuple):
    """Of one pass: the most during the forward pass, what is left after it, the most during the
    backward pass."""

    forward: int
    left: int
    backward: int


class Skeleton:
    """A model on the meta device, whose layers can be run one at a time.

    lora: its adapters; adapter: the folder that they come from. device: "cpu" or "cuda", the one
    that is planned for; kernel: of attention there. counts: of its numbers. layers, blocks: all of
    the decoder's and of the vision tower's.

    Raises UserError for an adapter folder that does not fit the model.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        lora: LoRA | None = None,
        adapter: str | None = None,
        bf16: bool = True,
        device: str = "cuda",
        kernel: str = "flash_attention_2",
    ):
        with META:
            self.model = QwenVL(config, kernel)
            if lora is not None:
                self.model.adapt(lora)
        if adapter is not None:
            check_fit(Path(adapter), self.model)
        cast(self.model, torch.bfloat16 if bf16 else torch.float32)
        self.config, self.device, self.kernel = config, device, kernel
        self.counts = count(self.model)
        self.layers, self.blocks = list(self.model.model.layers), list(self.model.visual.blocks)

        def drop(parameter: nn.Parameter) -> None:
            parameter.grad = None

        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(drop)

    def decode(
        self,
        layers: Sequence[nn.Module],
        rows: Rows,
        gradient: bool,
        backward: bool = False,
        checkpointing: bool = False,
        read: int | None = None,
    ) -> Bytes:
        """A pass over packed rows of a decoder with these layers; embeddings count.

        read: how many tokens' outputs are wanted of the last layer; None is all.
        """
        decoder, dtype, tokens = self.model.model, self.model.dtype, sum(map(sum, rows))
        decoder.layers, decoder.gradient_checkpointing = nn.ModuleList(layers), checkpointing

        def forward() -> Tensor:
            x = torch.empty(tokens, self.config.hidden_size, dtype=dtype, device=META)
            positions = torch.empty(3, tokens, dtype=torch.int64, device=META)
            wanted = None if read is None else torch.empty(read, dtype=torch.int64, device=META)
            bounds = self.model.bounds(list(rows))
            return decoder(x.requires_grad_(gradient), positions, bounds, read=wanted)

        return self._run(forward, gradient, backward)

    def encode(
        self,
        blocks: Sequence[nn.Module],
        tokens: int,
        gradient: bool,
        backward: bool = False,
        checkpointing: bool = False,
    ) -> Bytes:
        """A pass over an image of so many tokens of a vision tower with these blocks; pixels
        count."""
        tower, vision, dtype = self.model.visual, self.config.vision, self.model.dtype
        tower.blocks, tower.gradient_checkpointing = nn.ModuleList(blocks), checkpointing
        merge = vision.spatial_merge_size
        height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
        grid = torch.tensor([[1, merge * height, merge * (tokens // height)]])

        def forward() -> Tensor:
            pixels = torch.empty(tokens * merge**2, vision.patch_dim, dtype=dtype, device=META)
            return tower(pixels, grid, self.kernel)

        return self._run(forward, gradient, backward)

    def _run(self, forward: Callable[[], Tensor], gradient: bool, backward: bool) -> Bytes:
        weights = self.model.parameters()
        with Kernels(self.device), Held(weights) as held, torch.set_grad_enabled(gradient):
            out = forward()
            most, left = held.most, held.now
            held.most = held.now
            if backward:
                torch.autograd.backward([out], [torch.empty_like(out)])
            return Bytes(most, left, held.most)


skeleton = cache(Skeleton)


@dataclass(frozen=True)
class DecoderHolds:
    """Bytes that a training pass of the decoder holds, with embeddings and final norm.

    kept: as the forward pass ends, of which last_kept for the last layer. Then what is held besides
    what is still kept in the backward pass of the last layer (last_layer) and of another (layer);
    first_layer: all that is held in the first one's.
    """

    kept: int
    last_kept: int
    last_layer: int
    layer: int
    first_layer: int


@dataclass(frozen=True)
class TowerHolds:
    """Bytes that a training pass of the vision tower holds for one image.

    kept: as the forward pass ends. block: what is held besides what is still kept in the backward
    pass of a block; first_block: all that is held in the first one's.
    """

    kept: int
    block: int
    first_block: int


@cache
def decoder_forward(model: Skeleton, rows: Rows) -> int:
    """Bytes that the decoder holds at most in a pass without gradients."""
    two = ([layer, layer] for layer in kinds(model.layers))
    return max(model.decode(layers, rows, gradient=False).forward for layers in two)


@cache
def decoder_holds(model: Skeleton, rows: Rows, checkpointing: bool) -> DecoderHolds:
    """What the decoder holds in a training pass over these rows."""
    *others, last = model.layers
    read = sum(sum(completions) for _, *completions in rows)

    def kept(layers: list[nn.Module], read: int | None) -> int:
        run = model.decode(layers, rows, True, checkpointing=checkpointing, read=read)
        return run.left

    def backward(layer: nn.Module, read: int | None) -> int:  # it forms all of the layer again
        return model.decode([layer], rows, True, backward=True, read=read).backward

    total = last_kept = kept([last], read)
    layer = first_layer = 0
    for other, times in kinds(others).items():
        one = kept([other, last], read)  # with what all layers of a kind share
        total += one - last_kept
        if times > 1:
            total += (times - 1) * (kept([other, other, last], read) - one)
        most = backward(other, None)
        layer, first_layer = max(layer, most - kept([other], None)), max(first_layer, most)
    return DecoderHolds(total, last_kept, backward(last, read) - last_kept, layer, first_layer)


@cache
def tower_forward(model: Skeleton, tokens: int) -> int:
    """Bytes held at most while an image of so many tokens is encoded without gradients."""
    return model.encode(model.blocks, tokens, gradient=False).forward if tokens else 0


@cache
def tower_holds(model: Skeleton, tokens: int, checkpointing: bool) -> TowerHolds:
    """What the vision tower holds in a training pass for an image of so many tokens."""
    if not tokens:
        return TowerHolds(0, 0, 0)
    every = model.encode(model.blocks, tokens, gradient=True, checkpointing=checkpointing)
    block = first_block = 0
    for one in kinds(model.blocks):
        whole = model.encode([one], tokens, gradient=True, backward=True)
        kept = model.encode([one], tokens, gradient=True, checkpointing=checkpointing)
        block = max(block, whole.backward - kept.left)
        first_block = max(first_block, whole.backward)
    return TowerHolds(every.left, block, first_block)


def kinds(layers: Sequence[nn.Module]) -> Counter[nn.Module]:
    """One layer of each kind, and how many there are: alike are those with alike parameters."""
    first, counts = {}, Counter()
    for layer in layers:
        named = layer.named_parameters()
        kind = type(layer), *((name, p.shape, p.requires_grad) for name, p in named)
        counts[first.setdefault(kind, layer)] += 1
    return counts
