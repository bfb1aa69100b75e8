"""The gated delta rule over packed rows: a recurrence whose state is a matrix for each head.

Each head has a state S, (Dk, Dv), which at each token forgets and is then corrected where the
token's key points (Yang et al. 2024, "Gated Delta Networks", eq. 10):

    S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T        o_t = S_t^T q_t

q, k and v are columns of one projection after a causal convolution over time and SiLU; q and k have
length 1, and q is divided by sqrt(Dk) besides. A row's prompt is computed once: its last state, and
its last columns before the convolution, are where each of its completions begins, and in the
backward pass the gradients of all completions arrive there.

Sequences are cut into chunks (section 3.3 of the paper). Within a chunk everything is a product of
matrices, for all chunks of all sequences at once; only the states go from chunk to chunk in turn.
Of all this the backward pass keeps the inputs and for each chunk a state and the inverse of a
matrix, and forms the rest again.
The rule is computed in float32 at least, whatever the inputs are.

Not here: one token at a time (models/delta_net.py).

Shapes: T packed tokens; N chunks of L tokens; H heads of values on KH of keys, each for H / KH
neighbours; Dk and Dv their dimensions; W = 2 KH Dk + H Dv columns of q | k | v.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import DeltaHeads
from models.packed_chunks import Chunks, PackedChunks

EPS = 1e-6  # inside the root of the length of q and k, as published


class IntraChunk(NamedTuple):
    """What a chunk makes of its tokens, whatever state it begins with, float32 or wider. u and w
    are the WY representation of its corrections.

    attn: (N, H, L, L), how much of each earlier token's correction an output reads. u: (N, H, L,
    Dv), the corrections if the state were 0, and w: (N, H, L, Dk), what the state changes of them.
    q: (N, H, L, Dk), what an output reads of the state. k: (N, H, L, Dk), what the corrections add
    to the state. decay: (N, H, 1, 1), of the state.
    """

    attn: Tensor
    u: Tensor
    w: Tensor
    q: Tensor
    k: Tensor
    decay: Tensor


def intra_chunk(
    qk: Tensor, v: Tensor, g: Tensor, beta: Tensor, known: Tensor | None = None
) -> tuple[IntraChunk, Tensor]:
    """`IntraChunk` of each chunk, and the inverse that its corrections take.

    qk: (2, N, KH, L, Dk), q and k of any length. v: (N, KH, H / KH, L, Dv). g, beta: (N, KH, H /
    KH, L), 0 for padding, which then changes no state. known: the inverse of an earlier call.
    """
    qk = qk * (qk.square().sum(-1, keepdim=True) + EPS).rsqrt()
    q, k = qk.unbind()
    of_q, of_k = ((x @ k.mT)[:, :, None] for x in (q, k))
    q, k = q[:, :, None], k[:, :, None]
    decayed, size, scale = g.cumsum(-1), g.shape[-1], q.shape[-1] ** -0.5
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    between = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(later, -torch.inf).exp()
    since, end = decayed.exp(), decayed[..., -1:]
    system = of_k * (between * beta[..., None])  # and 1 on its diagonal
    inverse = Inverse.apply(system, known)
    parts = IntraChunk(
        attn=of_q * (between * scale),
        u=inverse @ (v * beta[..., None]),
        w=inverse @ (k * (beta * since)[..., None]),
        q=q * (since * scale)[..., None],
        k=k * (end - decayed).exp()[..., None],
        decay=end.exp()[..., None],
    )
    return IntraChunk(*(x.flatten(1, 2) for x in parts)), inverse


class Inverse(torch.autograd.Function):
    """Of unit lower triangular matrices, (..., L, L), of which only what is below the diagonal is
    read. known: the inverse, if it has been computed before."""

    @staticmethod
    def forward(ctx, matrix: Tensor, known: Tensor | None) -> Tensor:
        if known is None:
            one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            one = one.expand_as(matrix)
            known = torch.linalg.solve_triangular(matrix, one, upper=False, unitriangular=True)
        ctx.save_for_backward(known)
        return known.view_as(known)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).neg_().tril_(-1), None


def scan_chunks(
    part: IntraChunk, counts: tuple[int, ...], start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk. start: (sequences, H, Dk, Dv), overwritten.

    Returns the states that chunks begin with, (N, H, Dk, Dv); those that sequences end with, in
    place of `start`; and the corrections, (N, H, L, Dv), in place of part.u.
    """
    states = part.u.new_empty(*part.u.shape[:2], *start.shape[2:])
    first = 0
    for count in counts:
        here, now = slice(first, first + count), start[:count]
        states[here] = now
        x = part.u[here].flatten(0, 1)
        x.baddbmm_(part.w[here].flatten(0, 1), now.flatten(0, 1), alpha=-1)
        now.mul_(part.decay[here]).flatten(0, 1).baddbmm_(part.k[here].flatten(0, 1).mT, x)
        first += count
    return states, start, part.u


def scan_chunks_backward(
    part: IntraChunk, states: Tensor, counts: tuple[int, ...], grad: Tensor, end: Tensor
) -> tuple[IntraChunk, Tensor]:
    """Gradients of `IntraChunk`, and of the states that sequences begin with, in place of `end`.

    grad: (N, H, L, Dv), of the outputs. end: (sequences, H, Dk, Dv), of the states that sequences
    end with.
    """
    x = part.u - part.w @ states
    grad_x = part.attn.mT @ grad  # what outputs of the chunk add; later ones come below
    grad_states = torch.empty_like(states)  # of those that chunks end with
    of_state = part.q.mT @ grad
    first = sum(counts)
    for count in reversed(counts):
        first -= count
        here, now = slice(first, first + count), end[:count]
        grad_states[here] = now
        of_x = grad_x[here].flatten(0, 1)
        of_x.baddbmm_(part.k[here].flatten(0, 1), now.flatten(0, 1))
        now.mul_(part.decay[here]).add_(of_state[here])
        now.flatten(0, 1).baddbmm_(part.w[here].flatten(0, 1).mT, of_x, alpha=-1)
    gradients = IntraChunk(
        attn=grad @ x.mT,
        u=grad_x,
        w=-(grad_x @ states.mT),
        q=grad @ states.mT,
        k=x @ grad_states.mT,
        decay=(states * grad_states).sum((-2, -1), keepdim=True),
    )
    return gradients, end


def convolved(x: Tensor, conv: Tensor, packed: PackedChunks) -> Tensor:
    """Each column's causal convolution over packed sequences, (T, W). conv: (W, kernel)."""
    taps = conv.T
    out = x * taps[-1]
    for back in range(1, len(taps)):
        out[back:].addcmul_(x[:-back], taps[-1 - back])
    first, window, real = packed.firsts
    return out.index_copy_(0, first, (x[window] * real[..., None] * taps).sum(1))


def back_convolved(
    grad: Tensor, x: Tensor, conv: Tensor, packed: PackedChunks, is_trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, if it is trained, of conv. grad: (T, W), overwritten."""
    taps, (first, window, real) = conv.T, packed.firsts
    of_first = grad[first][:, None] * real[..., None]
    grad.index_fill_(0, first, 0)
    of_x = grad * taps[-1]
    for back in range(1, len(taps)):
        of_x[:-back].addcmul_(grad[back:], taps[-1 - back])
    of_x.index_put_((window.flatten(),), (of_first * taps).flatten(0, 1), accumulate=True)
    if not is_trained:
        return of_x, None
    of_taps = [(grad[back:] * x[: len(x) - back]).sum(0) for back in reversed(range(len(taps)))]
    return of_x, (torch.stack(of_taps) + (of_first * x[window]).sum(0)).T


def gather_chunks(part: Chunks, mixed: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads):
    """What `intra_chunk` takes, of packed tensors."""
    index, repeats = part.index, heads.values // heads.keys
    two, key, value = (torch.arange(n, device=g.device) for n in (2, heads.keys, repeats))
    qk, v = mixed.split((2 * heads.widths[0], heads.widths[2]), 1)
    qk = qk.unflatten(1, (2, heads.keys, -1))
    qk = qk[index[None, :, None], two[:, None, None, None], key[:, None]]
    v = v.unflatten(1, (heads.keys, repeats, -1))
    v = v[index[:, None, None], key[:, None, None], value[:, None]]
    filled = ~part.real[..., None]
    g, beta = (x[index].masked_fill_(filled, 0) for x in (g, beta))
    return qk, v, *(x.mT.unflatten(1, (-1, repeats)) for x in (g, beta))


class DeltaRule(torch.autograd.Function):
    """As `delta_rule`, but for the order of the states."""

    @staticmethod
    def forward(ctx, columns, g, beta, conv, packed: PackedChunks, heads: DeltaHeads):
        mixed = F.silu(convolved(columns.to(g.dtype), conv.to(g.dtype), packed))
        outputs, kept, ends = [], [], None
        for part in packed.chunks:
            inner, inverse = intra_chunk(*gather_chunks(part, mixed, g, beta, heads))
            shape = part.counts[0], heads.values, heads.key_dim, heads.value_dim
            start = g.new_zeros(shape) if part.start is None else ends[part.start]
            states, end, x = scan_chunks(inner, part.counts, start)
            ends = end if part.start is None else ends
            outputs.append((inner.q @ states + inner.attn @ x).transpose(1, 2).flatten(0, 1))
            kept += [states, inverse]
            del inner, x
        # all of it as saved tensors: gradient checkpointing drops these
        ctx.save_for_backward(columns, g, beta, conv, *kept)
        ctx.packed, ctx.heads = packed, heads
        ctx.mark_non_differentiable(ends)
        return torch.cat(outputs)[packed.chunk_position], ends

    @staticmethod
    def backward(ctx, grad, _):
        columns, g, beta, conv, *kept = ctx.saved_tensors
        packed, heads = ctx.packed, ctx.heads
        before = convolved(columns.to(g.dtype), conv.to(g.dtype), packed)
        mixed = F.silu(before)
        sizes = [part.index.numel() for part in packed.chunks]
        grads = grad.new_zeros(sum(sizes), *grad.shape[1:]).index_copy_(
            0, packed.chunk_position, grad
        )
        found, end = [], None
        parts = zip(packed.chunks, kept[::2], kept[1::2], grads.split(sizes), strict=True)
        for part, states, inverse, of_outputs in reversed(list(parts)):
            with torch.enable_grad():
                leaves = gather_chunks(part, mixed, g, beta, heads)
                leaves = [x.detach().requires_grad_() for x in leaves]
                inner, _ = intra_chunk(*leaves, inverse)
            of_outputs = of_outputs.unflatten(0, part.index.shape).transpose(1, 2).contiguous()
            of_end = states.new_zeros(part.counts[0], *states.shape[1:]) if end is None else end
            gradients, of_start = scan_chunks_backward(
                IntraChunk(*(x.detach() for x in inner)), states, part.counts, of_outputs, of_end
            )
            if part.start is not None:  # where completions begin their prompts end
                ends = states.new_zeros(packed.chunks[0].counts[0], *states.shape[1:])
                end = ends.index_put_((part.start,), of_start, accumulate=True)
            of_qk, of_v, *of_gates = torch.autograd.grad(inner, leaves, gradients)
            of_mixed = of_qk.new_empty(*part.index.shape, sum(heads.widths))
            to_qk, to_v = of_mixed.split((2 * heads.widths[0], heads.widths[2]), 2)
            to_qk.unflatten(2, (2, heads.keys, -1)).copy_(of_qk.permute(1, 3, 0, 2, 4))
            to_v.unflatten(2, (heads.keys, -1, heads.value_dim)).copy_(of_v.permute(0, 3, 1, 2, 4))
            of_gates = [x.flatten(1, 2).mT for x in of_gates]
            found.append([x.flatten(0, 1) for x in (of_mixed, *of_gates)])
            del inner, gradients
        of_mixed, of_g, of_beta = (
            torch.cat(of_parts[::-1])[packed.chunk_position]
            for of_parts in zip(*found, strict=True)
        )
        of_mixed = torch.ops.aten.silu_backward(of_mixed, before)
        of_columns, of_conv = back_convolved(
            of_mixed, columns.to(g.dtype), conv.to(g.dtype), packed, ctx.needs_input_grad[3]
        )
        of_conv = of_conv if of_conv is None else of_conv.to(conv.dtype)
        return of_columns.to(columns.dtype), of_g, of_beta, of_conv, None, None


def delta_rule(
    columns: Tensor,
    g: Tensor,
    beta: Tensor,
    conv: Tensor,
    parts: Sequence[PackedChunks],
    heads: DeltaHeads,
) -> tuple[Tensor, Tensor]:
    """The outputs of packed rows, (T, H, Dv), and the states that their prompts end with, (rows, H,
    Dk, Dv), both float32 or wider. A gradient goes through the outputs alone.

    columns: (T, W), q | k | v before the convolution. g: (T, H) float32 or wider, the logarithm of
    the decay, at most 0. beta: (T, H) in g's dtype, 0 to 1. conv: (W, kernel), the last for the
    token itself.
    """
    outputs, states = [], []
    for part in parts:
        of_part = (x[part.tokens] for x in (columns, g, beta))
        out, ends = DeltaRule.apply(*of_part, conv, part, heads)
        outputs.append(out)
        states.append(ends[part.place])
    return torch.cat(outputs), torch.cat(states)


def last_columns(columns: Tensor, parts: Sequence[PackedChunks]) -> Tensor:
    """(rows, kernel - 1, W): of each prompt's last tokens, 0 where it has fewer."""
    return torch.cat(
        [columns[part.tokens][part.ends[0]] * part.ends[1][..., None] for part in parts]
    )
