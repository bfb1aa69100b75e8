"""The gated delta net (Yang et al. 2024, "Gated Delta Networks"): a mixer (models/mixer.py) whose
memory of the past is one matrix for each head, however long that past is.

`GatedDeltaNet` runs over packed sequences (models/delta_rule.py), `DeltaState` keeps each sample's
matrices while completions are drawn, `DeltaStep` adds a token to each sample.

A step that updated each matrix would read it, decay it and add to it: five times over its memory.
Here a matrix stands for WINDOW tokens. Keys and corrections of the tokens since are kept beside it,
as a chunk keeps them in training, and a step reads the matrix once; every WINDOW tokens they are
added to it (`DeltaState.between`). That is 1 + 4 / WINDOW times over the matrices a token, and once
over what is kept beside them.

Shapes: T packed tokens; H heads of values on KH of keys, R = H / KH; Dk and Dv their dimensions; W
columns of q | k | v; M entries of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import QwenVLConfig
from models.decoding.product import Product
from models.delta_rule import EPS, delta_rule, last_columns
from models.layers import at_least_float32
from models.mixer import Layout, Move
from models.packed_attention import Bounds
from models.packed_chunks import PackedChunks, packed_chunks

WINDOW = 16  # tokens


class LayerState(NamedTuple):
    """Of a layer's entries; all but columns in float32 or wider.

    memory: (slots, KH, Dk, R Dv + WINDOW), the matrix, and beside it the keys of the tokens since,
    by their number modulo WINDOW. Of these tokens also corrections, (slots, KH, R, WINDOW, Dv);
    decays, (slots, KH, R, WINDOW + 1), the sum of g from the matrix to the token, infinite where
    there is none yet, and last 0, the matrix's own. total: (slots, KH, R, 1), the newest token's.
    columns: (slots, kernel, W) in the model's dtype, what the convolution takes, by the tokens'
    number modulo kernel.
    """

    memory: Tensor
    corrections: Tensor
    decays: Tensor
    total: Tensor
    columns: Tensor


def _shapes(config: QwenVLConfig, layout: Layout) -> LayerState:
    """The shape of each part."""
    heads, slots = config.delta, layout.slots
    repeats = heads.values // heads.keys
    of_values = slots, heads.keys, repeats
    return LayerState(
        memory=(slots, heads.keys, heads.key_dim, repeats * heads.value_dim + WINDOW),
        corrections=(*of_values, WINDOW, heads.value_dim),
        decays=(*of_values, WINDOW + 1),
        total=(*of_values, 1),
        columns=(slots, heads.kernel, sum(heads.widths)),
    )


def _sizes(config: QwenVLConfig, layout: Layout, dtype: torch.dtype) -> list[int]:
    """Bytes of each part, to multiples of 16."""
    wide = at_least_float32(dtype)
    counts = [torch.Size(shape).numel() for shape in _shapes(config, layout)]
    sizes = [count * wide.itemsize for count in counts[:-1]] + [counts[-1] * dtype.itemsize]
    return [-(-size // 16) * 16 for size in sizes]


class DeltaState:
    """The matrices of each sample, which begin as its prompt's, and what is kept beside them.

    Entry i of the batch is the i-th of each tensor. layers: all entries that there is room for;
    batch: the entries that are decoded.
    """

    def __init__(self, config: QwenVLConfig, layout: Layout, memory: Tensor, dtype: torch.dtype):
        wide = at_least_float32(dtype)
        shapes, sizes = _shapes(config, layout), _sizes(config, layout, dtype)
        self.heads, self.layout, self.device = config.delta, layout, memory.device
        self.layers = []
        for layer in memory.unbind():
            parts = layer[: sum(sizes)].split(sizes)
            dtypes = [wide] * (len(parts) - 1) + [dtype]
            views = [
                part.view(kind)[: torch.Size(shape).numel()].view(shape)
                for part, kind, shape in zip(parts, dtypes, shapes, strict=True)
            ]
            self.layers.append(LayerState(*views))
            self.layers[-1].decays[..., :WINDOW] = torch.inf
        self._take(layout.slots)

    def _take(self, count: int) -> None:
        """The batch is the first `count` entries."""
        self.count = count
        self.batch = [LayerState(*(part[:count] for part in layer)) for layer in self.layers]

    @staticmethod
    def nbytes(config: QwenVLConfig, layout: Layout, dtype: torch.dtype) -> int:
        return sum(_sizes(config, layout, dtype))

    def matrix(self, layer: LayerState) -> Tensor:
        """(M, KH, Dk, R, Dv), a part of its memory."""
        return layer.memory[..., :-WINDOW].unflatten(3, (-1, self.heads.value_dim))

    def expect(self, first: int, lengths: list[int]) -> None:
        self._expected = slice(first, first + len(lengths))

    def store(self, layer: int, matrices: Tensor, columns: Tensor) -> None:
        """matrices: (prompts, H, Dk, Dv). columns: (prompts, kernel - 1, W), before the
        convolution."""
        kept, group = self.layers[layer], self.layout.group
        of_prompts, of_columns = (
            x.unflatten(0, (-1, group))[self._expected] for x in (self.matrix(kept), kept.columns)
        )
        of_prompts.copy_(matrices.unflatten(1, (self.heads.keys, -1)).transpose(2, 3)[:, None])
        of_columns[:, :, 1:] = columns[:, None]

    def index(self, slots: list[int], lengths: list[int], tokens: int) -> tuple[Tensor, ...]:
        assert len(slots) == self.count  # entries follow each other in memory
        return ()

    def between(self, tokens: int) -> None:
        if tokens == 0 or tokens % WINDOW:
            return
        for layer in self.batch:  # what is kept beside the matrices is added to them
            memory, corrections, decays, total, _ = layer
            weighed = corrections * (total - decays[..., :WINDOW]).exp()[..., None]
            weighed = weighed.transpose(2, 3).flatten(3).flatten(0, 1)  # (M KH, WINDOW, R Dv)
            self.matrix(layer).mul_(total.exp()[:, :, None])
            matrix, keys = memory.flatten(0, 1).split((weighed.shape[2], WINDOW), 2)
            matrix.baddbmm_(keys, weighed)
            decays[..., :WINDOW] = torch.inf
            total.zero_()

    def recall(self, layer: int, qk: Tensor, v: Tensor, g: Tensor, beta: Tensor, at: Tensor):
        """One token of the rule for each entry: keeps its key and correction, and returns what its
        q reads, (M, KH, R, Dv).

        qk: (M, KH, 2, Dk). v: (M, KH, R, Dv). g, beta: (M, KH, R, 1). at: (1,) int64, the token's
        number modulo WINDOW. All in float32 or wider.
        """
        memory, corrections, decays, total, _ = self.batch[layer]
        total.add_(g)
        since = (total - decays).exp_()  # 0 for tokens that are not there yet
        decays.index_copy_(3, at, total)
        memory[..., -WINDOW:].index_copy_(3, at, qk[:, :, 1, :, None])
        # what q and k read: of the matrix, and of the tokens since as in attention
        both = torch.bmm(qk.flatten(0, 1), memory.flatten(0, 1)).view(*qk.shape[:3], -1)
        of_matrix, scores = both.split((both.shape[3] - WINDOW, WINDOW), 3)
        weights = (scores[:, :, None] * since[..., None, :WINDOW]).flatten(0, 2)
        read = torch.bmm(weights, corrections.flatten(0, 2)).view(*v.shape[:3], 2, -1)
        of_matrix = of_matrix.unflatten(3, v.shape[2:]).transpose(2, 3)
        read.addcmul_(of_matrix, since[..., WINDOW:, None])
        correction = (v - read[:, :, :, 1]).mul_(beta)
        corrections.index_copy_(3, at, correction[:, :, :, None])
        q_dot_k = scores[:, :, :1].index_select(3, at)
        return torch.addcmul(read[:, :, :, 0], q_dot_k, correction)

    def shrink(self, move: Move, layout: Layout, tokens: int) -> None:
        entries = torch.tensor(move.entries, device=self.device)
        for kept in (x for layer in self.layers for x in layer):
            kept[: len(entries)] = kept.index_select(0, entries)
        self._take(len(entries))


class Token(NamedTuple):
    """Of one token: its number modulo WINDOW and modulo the kernel, (1,) int64 each; the
    convolution's weights in the order in which columns lie, (layers, kernel, W) float32 or wider.
    """

    state: DeltaState
    window_slot: Tensor
    column_slot: Tensor
    conv: Tensor


class DeltaStep:
    """`GatedDeltaNet.forward` for one token of each sample, up to rounding."""

    def __init__(self, config: QwenVLConfig, mixers: Sequence["GatedDeltaNet"], device):
        heads = self.heads = config.delta
        self.inputs = [Product.of(*mixer.inputs) for mixer in mixers]
        self.out = [Product.of(mixer.out_proj) for mixer in mixers]
        wide = at_least_float32(mixers[0].conv1d.weight.dtype)
        self.conv = torch.stack([mixer.conv1d.weight.squeeze(1).T for mixer in mixers]).to(wide)
        self.rate, self.bias = (
            torch.stack(parts).to(wide).view(len(mixers), heads.keys, -1, 1)
            for parts in ([-mixer.A_log.exp() for mixer in mixers], [m.dt_bias for m in mixers])
        )
        self.norm = torch.stack([mixer.norm.weight.to(wide) for mixer in mixers])
        self.split_sizes = sum(heads.widths), heads.widths[2] + 2 * heads.values
        self.eps = config.rms_norm_eps
        self.slots = torch.arange(heads.kernel, device=device)
        self.unit_weight = self.conv.new_full((heads.key_dim,), heads.key_dim**-0.5)
        products = [x for product in (*self.inputs, *self.out) for x in product.tensors]
        self.tensors = [*products, self.conv, self.rate, self.bias, self.norm]

    @staticmethod
    def operations(config: QwenVLConfig) -> int:
        return 40

    def begin(
        self,
        state: DeltaState,
        index: tuple[Tensor, ...],
        positions: Tensor,
        tokens: Tensor,
        bound: int,
    ) -> Token:
        kernel = self.heads.kernel
        ages = (tokens - self.slots) % kernel  # of the columns that lie there
        conv = self.conv.index_select(1, kernel - 1 - ages)
        return Token(state, tokens % WINDOW, tokens % kernel, conv)

    def __call__(self, layer: int, x: Tensor, residual: Tensor, token: Token) -> Tensor:
        heads, count, wide = self.heads, len(x), self.conv.dtype
        kept = token.state.batch[layer].columns
        columns, others = self.inputs[layer](x).split(self.split_sizes, 1)
        # the convolution, over the newest columns in whatever order they lie
        kept.index_copy_(1, token.column_slot, columns[:, None])
        mixed = F.silu((kept * token.conv[layer]).sum(1))
        qk, v = mixed.split((2 * heads.widths[0], heads.widths[2]), 1)
        # l2-normalized by rms_norm: a weight of Dk^-1/2 turns its mean into a sum. q's further
        # factor Dk^-1/2 is left out: the output's norm cancels any, with its eps scaled by Dk.
        qk = qk.view(count, 2, heads.keys, -1).transpose(1, 2).contiguous()
        qk = F.rms_norm(qk, qk.shape[3:], self.unit_weight, EPS / heads.key_dim)
        z, gates = others.to(wide).split((heads.widths[2], 2 * heads.values), 1)
        b, a = gates.view(count, 2, *self.bias.shape[1:]).unbind(1)
        g = F.softplus(a + self.bias[layer]) * self.rate[layer]
        v = v.view(*g.shape[:3], heads.value_dim)
        out = token.state.recall(layer, qk, v, g, b.sigmoid(), token.window_slot)
        out = F.rms_norm(out, out.shape[3:], self.norm[layer], self.eps * heads.key_dim)
        out = torch.mul(out.view_as(z), F.silu(z), out=torch.empty_like(z, dtype=x.dtype))
        return self.out[layer](out, add=residual)


class GatedNorm(nn.Module):
    """weight * (root-mean-square norm of each head) * silu(gate), in float32 at least."""

    FLOAT32 = ("weight",)

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(T, H, D) float32 or wider, (T, H D) -> (T, H D) in the gate's dtype."""
        x = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).flatten(1)
        return (x * F.silu(gate.to(x.dtype))).to(gate.dtype)


class GatedDeltaNet(nn.Module):
    """The gated delta rule between linear layers, (T, hidden) -> (T, hidden).

    A_log and the norm's weight are published in float32, and stay so. 4 bits leave in_proj_b and
    in_proj_a as they are: they are small, and the errors of what they decide add up over tokens.
    """

    NAME = "linear_attn"
    JOINED = (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),)
    ADAPTED = ("in_proj_qkv", "in_proj_z", "out_proj")
    FLOAT32 = ("A_log",)
    UNPACKED = ("in_proj_b", "in_proj_a")
    State = DeltaState
    Step = DeltaStep

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        width, heads = config.hidden_size, config.delta
        self.heads, columns = heads, sum(heads.widths)
        self.in_proj_qkv = nn.Linear(width, columns, bias=False)
        self.in_proj_z = nn.Linear(width, heads.widths[2], bias=False)
        self.in_proj_b = nn.Linear(width, heads.values, bias=False)
        self.in_proj_a = nn.Linear(width, heads.values, bias=False)
        self.conv1d = nn.Conv1d(columns, columns, heads.kernel, groups=columns, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(heads.values))
        self.A_log = nn.Parameter(torch.zeros(heads.values))
        self.norm = GatedNorm(heads.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(heads.widths[2], width, bias=False)

    def initialize(self, generator: torch.Generator | None) -> None:
        self.dt_bias.fill_(1.0)
        self.A_log.uniform_(0.01, 16, generator=generator).log_()

    @property
    def inputs(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.JOINED[0]]

    @staticmethod
    def shared(
        config: QwenVLConfig, position_ids: Tensor, bounds: Bounds, dtype: torch.dtype
    ) -> list[PackedChunks]:
        return packed_chunks(bounds.rows, config.delta, bounds.device)

    @staticmethod
    def products(config: QwenVLConfig, rows: tuple[tuple[int, ...], ...]) -> int:
        """Of the recurrence itself: k and q read the matrix, k is added to it."""
        heads = config.delta
        return 6 * heads.values * heads.key_dim * heads.value_dim * sum(map(sum, rows))

    def forward(
        self,
        x: Tensor,
        shared: list[PackedChunks],
        store: Callable[[Tensor, Tensor], None] | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        columns, z, b, a = (linear(x) for linear in self.inputs)
        wide = at_least_float32(x.dtype)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        beta = b.to(wide).sigmoid()
        conv = self.conv1d.weight.squeeze(1)
        out, matrices = delta_rule(columns, g, beta, conv, shared, self.heads)
        if store is not None:
            store(matrices, last_columns(columns, shared))
        if read is not None:
            out, z = out[read], z[read]
        return self.out_proj(self.norm(out, z))
