"""The head on completion tokens: log-probs and entropy, a chunk of tokens at a time.

No (tokens, vocabulary) tensor is ever held: logits exist for a chunk, in one of two ways with the
same numbers. `token_chunks` yields chunk after chunk and forms each chunk's gradient from the
probabilities that it still has: three products with the head's weight. `token_logps` returns all
tokens at once; its backward pass forms each chunk's logits again, a fourth product.

With p = softmax(z), z = W h / temperature, target t, entropy H and g = dL / dlogp of one token:

    slope         = (1 - p_t) W_t - sum of p_v W_v over v != t
    dL / dh       = g slope / temperature
    H             = -logp + h . slope / temperature
    dL / dW_t    += g (1 - p_t) h / temperature
    dL / dW_v    -= g p_v h / temperature, v != t

1 - p_t is the others' share of the sum, to one part in 10^7 of 1. If the loss also has a gradient
e = dL / dH, then dH / dz_v = -p_v (log p_v + H), and p_v becomes, in both products,

    c_v           = p_v (g + e (log p_v + H)) = -dL / dz_v, v != t
    dL / dz_t     = sum of c_v over v != t

which is a product more (the slope cannot be used) and one buffer more.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_LOGITS = 2**25  # that exist at once: 128 MB in float32; on a GPU twice as many


class _TokenLogps(torch.autograd.Function):
    """All tokens, chunk by chunk; the backward pass forms the probabilities again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk, entropies):
        buffers = _Buffers(weight, min(chunk, len(hidden)))
        logps, slopes = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp, *softmax = _softmax(h, weight, t, temperature, suppressed, buffers, entropies)
            logps.append(logp)
            if entropies:
                slopes.append(_slope(weight, t, *softmax))
        logps = torch.cat(logps)
        if not entropies:
            return logps, None
        slope = torch.cat(slopes)
        entropy = _entropy(hidden, logps, slope, temperature)
        ctx.save_for_backward(hidden, weight, targets, slope)
        ctx.settings = temperature, suppressed, chunk
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        hidden, weight, targets, slope = ctx.saved_tensors
        temperature, suppressed, chunk = ctx.settings
        grad = torch.zeros_like(slope[:, 0]) if grad is None else grad
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0] and (grad_entropy is None or not len(targets)):
            grad_hidden = (slope * (grad / temperature)[:, None]).to(hidden.dtype)
        if ctx.needs_input_grad[1] or grad_entropy is not None:
            buffers = _Buffers(weight, min(chunk, len(hidden)))
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(weight, dtype=buffers.logits.dtype)
            parts = []
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                h, t, g = hidden[part], targets[part], grad[part]
                _, *softmax = _softmax(h, weight, t, temperature, suppressed, buffers)
                if grad_entropy is not None:
                    softmax = _with_entropy(*softmax[1:], g, grad_entropy[part], buffers)
                    parts.append(_slope(weight, t, *softmax) / temperature)
                    g = torch.ones_like(g)
                if grad_weight is not None:
                    _add_grad_weight(grad_weight, h, t, g / temperature, *softmax)
            if parts:
                grad_hidden = torch.cat(parts).to(hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 5


class _ChunkLogps(torch.autograd.Function):
    """One chunk; its probabilities stay in `buffers` until its backward pass, which adds the
    weight's gradient to `grad_weight` (None if the weight is frozen)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, buffers, grad_weight):
        logps, *softmax = _softmax(hidden, weight, targets, temperature, suppressed, buffers)
        slope = _slope(weight, targets, *softmax)
        entropy = _entropy(hidden, logps, slope, temperature)
        # Saved as tensors: torch then raises if the next chunk overwrote them before this backward.
        ctx.save_for_backward(hidden, weight, targets, slope, *softmax)
        ctx.settings = temperature, buffers, grad_weight
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        hidden, weight, targets, slope, *softmax = ctx.saved_tensors
        temperature, buffers, grad_weight = ctx.settings
        ctx.settings = temperature, None, None  # what holds on to the loss must not keep them alive
        grad = torch.zeros_like(slope[:, 0]) if grad is None else grad
        if grad_entropy is not None:
            softmax = _with_entropy(*softmax[1:], grad, grad_entropy, buffers)
            slope, grad = _slope(weight, targets, *softmax), torch.ones_like(grad)
        grad = grad / temperature
        if grad_weight is not None:
            _add_grad_weight(grad_weight, hidden, targets, grad, *softmax)
        return (slope * grad[:, None]).to(hidden.dtype), *[None] * 6


class _Buffers:
    """Memory for every chunk, (chunk, V): fresh memory costs as much again as what is computed.

    logits: in float32 at least. products: in the weight's dtype, the same memory if that is wide
    enough. more: as logits, made when first asked for.
    """

    def __init__(self, weight: Tensor, chunk: int):
        self.products = weight.new_empty(chunk, len(weight))
        wide = torch.promote_types(weight.dtype, torch.float32)
        same = weight.dtype == wide
        self.logits = self.products if same else torch.empty_like(self.products, dtype=wide)

    @functools.cached_property
    def more(self) -> Tensor:
        return torch.empty_like(self.logits)


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    suppressed: Tensor | None,
    buffers: _Buffers,
    factors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps (C,); exp(logit - largest) of all but the targets (C, V), written over `buffers`; what
    these sum to (C,); and the sum with the target's (C,).

    factors: the second is wanted in the weight's dtype, for products.
    """
    logits, products = (b[: len(hidden)] for b in (buffers.logits, buffers.products))
    scaled = torch.mm(hidden, weight.T, out=products)
    if temperature != 1.0:
        scaled = logits.copy_(products).div_(temperature)
    if suppressed is not None:
        scaled.index_fill_(1, suppressed, float("-inf"))
    torch.sub(scaled, scaled.amax(1, keepdim=True).to(logits.dtype), out=logits)
    shifted = logits.gather(1, targets[:, None])
    others = logits.exp_().scatter_(1, targets[:, None], 0.0)
    shifted = shifted.squeeze(1)
    target = shifted.exp()
    total = others.sum(1) + target
    if factors and products.dtype != others.dtype:
        others = products.copy_(others)
    return shifted - total.log(), others, total - target, total


def _slope(weight: Tensor, targets: Tensor, others: Tensor, rest: Tensor, total: Tensor) -> Tensor:
    """(C, D), see the module's text."""
    expected = (others @ weight).to(total.dtype)
    return torch.addcmul(-expected, rest[:, None], weight[targets]) / total[:, None]


def _entropy(hidden: Tensor, logps: Tensor, slope: Tensor, temperature: float) -> Tensor:
    return torch.linalg.vecdot(hidden.to(slope.dtype), slope) / temperature - logps


def _with_entropy(
    rest: Tensor, total: Tensor, grad: Tensor, grad_entropy: Tensor, buffers: _Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """c_v in the place of p_v (see the module's text), of the chunk that is in `buffers`: c (C, V)
    in the weight's dtype, its sum (C,) and 1, as `_softmax`'s last three. H comes from the logits
    in full precision, not from slopes that bf16 has rounded."""
    others, c = buffers.logits[: len(total)], buffers.more[: len(total)]
    torch.xlogy(others, others, out=c)
    target = total - rest
    entropy = total.log() - (c.sum(1) + torch.xlogy(target, target)) / total
    c.mul_(grad_entropy[:, None])
    c.addcmul_(others, (grad + grad_entropy * (entropy - total.log()))[:, None])
    c.div_(total[:, None])
    narrow = c if others.dtype == buffers.products.dtype else buffers.products[: len(c)].copy_(c)
    return narrow, c.sum(1), torch.ones_like(total)


def _add_grad_weight(
    grad_weight: Tensor,
    hidden: Tensor,
    targets: Tensor,
    grad: Tensor,
    others: Tensor,
    rest: Tensor,
    total: Tensor,
) -> None:
    """Adds dL / dW to grad_weight (V, D), in the logits' precision: bf16 would round every partial
    sum. grad: dL / dlogp / temperature, (C,)."""
    scaled = hidden.to(total.dtype) * (grad / total)[:, None]
    if hidden.dtype == total.dtype:
        grad_weight.addmm_(others.T, scaled, alpha=-1)
    else:
        grad_weight -= others.T @ scaled.to(hidden.dtype)
    grad_weight.index_add_(0, targets, scaled * rest[:, None])


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits exist at once: `MAX_LOGITS` numbers, but 64 tokens at least.

    Each chunk reads the head twice and adds to its gradient once, in float32. A GPU multiplies so
    fast that this shows: there the chunks are twice as large.
    """
    most = MAX_LOGITS if device == "cpu" else 2 * MAX_LOGITS
    return min(1024, max(64, most // vocabulary))


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    chunk: int | None = None,
    entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob (nats) of each target and entropy (nats) of each distribution.

    hidden: (C, D), at the positions that predict the targets. weight: (V, D). targets: (C,) int64.
    suppressed: int64 ids with probability 0, as in sampling. Returns (C,), (C,) in float32 (float64
    for float64 inputs); gradients flow from both to hidden and weight. Where no gradient is wanted
    the entropy is None unless `entropies` is true: it costs a product. Memory: a (chunk, V) buffer,
    by default of `chunk_tokens` tokens, and another if the entropy has a gradient.
    """
    chunk = chunk or chunk_tokens(len(weight), weight.device.type)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    inputs = hidden, weight, targets, temperature, suppressed, chunk
    return _TokenLogps.apply(*inputs, trained or entropies)


def token_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(part, logps, entropy) of one chunk of tokens after another, as `token_logps` has them.

    part: which tokens these are; logps and entropy: (c,). Call backward on each chunk's loss before
    asking for the next; the gradient of hidden and weight follows once, after the last chunk, so
    take them all.
    """
    chunk = chunk or chunk_tokens(len(weight), weight.device.type)
    chunk = max(1, min(chunk, len(targets)))
    buffers = _Buffers(weight, chunk)
    trained = weight.requires_grad
    grad_weight = torch.zeros_like(weight, dtype=buffers.logits.dtype) if trained else None
    inputs, grad_hidden = None, []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        leaf = hidden[part].detach().requires_grad_()
        inputs = leaf, weight.detach(), targets[part], temperature, suppressed, buffers
        yield part, *_ChunkLogps.apply(*inputs, grad_weight)
        assert leaf.grad is not None, "call backward on this chunk's loss first"
        grad_hidden.append(leaf.grad)
    inputs = buffers = None  # memory for the backward pass
    if trained:  # first: a sharded model's gradients leave with the end of the other pass
        rounded = grad_weight.to(weight.dtype)
        del grad_weight  # of the head's size in float32
        weight.backward(rounded)
        del rounded
    if hidden.requires_grad:  # adds to the head's gradient in place if the head is tied
        hidden.backward(torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden))
