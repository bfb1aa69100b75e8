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
Of all this the backward pass keeps the inputs and a state for each chunk, and forms the rest again.
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

EPS = 1e-6  # added to the square of the length of q and k: padding is 0


class Inside(NamedTuple):
    """What a chunk makes of its tokens, whatever state it begins with, float32 or wider.

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


def inside(columns: Tensor, g: Tensor, beta: Tensor, conv: Tensor, heads: DeltaHeads) -> Inside:
    """`Inside` of each chunk.

    columns: (N, kernel - 1 + L, W), with those before each chunk. g, beta: (N, L, H). conv: (W,
    kernel). All in float32 or wider, and 0 for padding, which then changes no state.
    """
    mixed = F.silu(F.conv1d(columns.mT, conv[:, None], groups=len(conv)))
    of_qk, of_v = mixed.split((2 * heads.widths[0], heads.widths[2]), 1)
    of_qk = of_qk.unflatten(1, (2, heads.keys, heads.key_dim))
    of_qk = of_qk * (of_qk.square().sum(3, keepdim=True) + EPS).rsqrt()
    q, k = of_qk.permute(1, 0, 2, 4, 3).contiguous().unbind()  # (N, KH, L, Dk)
    repeats = heads.values // heads.keys
    of_q, of_k = ((x @ k.mT)[:, :, None] for x in (q, k))
    q, k = q[:, :, None], k[:, :, None]  # (N, KH, H / KH, ...), as all that follows
    v = of_v.unflatten(1, (heads.keys, repeats, heads.value_dim)).mT
    g, beta = (x.mT.unflatten(1, (-1, repeats)) for x in (g, beta))
    decayed, size = g.cumsum(-1), g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    between = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(later, -torch.inf).exp()
    since, end = decayed.exp(), decayed[..., -1:]
    right = torch.cat((v * beta[..., None], k * (beta * since)[..., None]), -1)
    system = of_k * (between * beta[..., None])  # and 1 on its diagonal
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split((heads.value_dim, heads.key_dim), -1)
    scale = heads.key_dim**-0.5
    parts = Inside(
        attn=of_q * (between * scale),
        u=u,
        w=w,
        q=q * (since * scale)[..., None],
        k=k * (end - decayed).exp()[..., None],
        decay=end.exp()[..., None],
    )
    return Inside(*(x.flatten(1, 2).contiguous() for x in parts))


def through(part: Inside, counts: tuple[int, ...], start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def back_through(
    part: Inside, states: Tensor, counts: tuple[int, ...], grad: Tensor, end: Tensor
) -> tuple[Inside, Tensor]:
    """Gradients of `Inside`, and of the states that sequences begin with, in place of `end`.

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
    gradients = Inside(
        attn=grad @ x.mT,
        u=grad_x,
        w=-(grad_x @ states.mT),
        q=grad @ states.mT,
        k=x @ grad_states.mT,
        decay=(states * grad_states).sum((-2, -1), keepdim=True),
    )
    return gradients, end


class DeltaRule(torch.autograd.Function):
    """As `delta_rule`, but for the order of the states; these have no gradient."""

    @staticmethod
    def forward(ctx, columns, g, beta, conv, packed: PackedChunks, heads: DeltaHeads):
        outputs, kept, ends = [], [], None
        for part in packed.chunks:
            inner = inside(*gathered(part, columns, g, beta, conv), heads)
            shape = part.counts[0], heads.values, heads.key_dim, heads.value_dim
            start = inner.u.new_zeros(shape) if part.start is None else ends[part.start]
            states, end, x = through(inner, part.counts, start)
            ends = end if part.start is None else ends
            outputs.append((inner.q @ states + inner.attn @ x).transpose(1, 2).flatten(0, 1))
            kept.append(states)
            del inner, x
        ctx.save_for_backward(columns, g, beta, conv, *kept)
        ctx.packed, ctx.heads = packed, heads
        ctx.mark_non_differentiable(ends)
        return torch.cat(outputs)[packed.found], ends

    @staticmethod
    def backward(ctx, grad, _):
        columns, g, beta, conv, *kept = ctx.saved_tensors
        chunks, found = ctx.packed.chunks, ctx.packed.found
        sizes = [len(part.index) * part.size for part in chunks]
        grads = grad.new_zeros(sum(sizes), *grad.shape[1:]).index_copy_(0, found, grad)
        grads = grads.split(sizes)
        tail, end, of_tokens, of_tails, of_conv = ctx.heads.kernel - 1, None, [], [], 0
        for part, states, of_outputs in reversed(list(zip(chunks, kept, grads, strict=True))):
            with torch.enable_grad():
                leaves = gathered(part, columns, g, beta, conv)
                leaves = [x.detach().requires_grad_() for x in leaves]
                inner = inside(*leaves, ctx.heads)
            of_outputs = of_outputs.unflatten(0, (-1, part.size)).transpose(1, 2).contiguous()
            of_start = states.new_zeros(part.counts[0], *states.shape[1:]) if end is None else end
            gradients, of_start = back_through(
                Inside(*(x.detach() for x in inner)), states, part.counts, of_outputs, of_start
            )
            if part.start is not None:  # where completions begin their prompts end
                ends = states.new_zeros(chunks[0].counts[0], *states.shape[1:])
                end = ends.index_put_((part.start,), of_start, accumulate=True)
            of_columns, of_g, of_beta, more = torch.autograd.grad(inner, leaves, gradients)
            of_conv = of_conv + more
            own = of_columns[:, tail:], of_g, of_beta
            of_tokens.append([x.flatten(0, 1) for x in own])
            before = part.real[:, :tail]
            of_tails.append((part.index[:, :tail], of_columns[:, :tail] * before[..., None]))
            del inner, gradients
        of_columns, of_g, of_beta = (
            torch.cat(list(reversed(x)))[found] for x in zip(*of_tokens, strict=True)
        )
        for index, values in of_tails:
            of_columns.index_put_((index.flatten(),), values.flatten(0, 1), accumulate=True)
        of_columns, of_conv = of_columns.to(columns.dtype), of_conv.to(conv.dtype)
        return of_columns, of_g.to(g.dtype), of_beta.to(beta.dtype), of_conv, None, None


def gathered(
    part: Chunks, columns: Tensor, g: Tensor, beta: Tensor, conv: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `inside` takes of packed tensors, 0 for padding, all in float32 at least."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    tail = conv.shape[1] - 1
    own, padding = part.index[:, tail:], ~part.real[..., None]
    return (
        columns[part.index].to(wide).masked_fill_(padding, 0),
        g[own].to(wide).masked_fill_(padding[:, tail:], 0),
        beta[own].to(wide).masked_fill_(padding[:, tail:], 0),
        conv.to(wide),
    )


def delta_rule(
    columns: Tensor,
    g: Tensor,
    beta: Tensor,
    conv: Tensor,
    parts: Sequence[PackedChunks],
    heads: DeltaHeads,
) -> tuple[Tensor, Tensor]:
    """The outputs of packed rows, (T, H, Dv), and the states that their prompts end with, (rows, H,
    Dk, Dv), both float32 or wider.

    columns: (T, W), q | k | v before the convolution. g: (T, H), the logarithm of the decay, at
    most 0. beta: (T, H), 0 to 1. conv: (W, kernel), the last for the token itself.
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
