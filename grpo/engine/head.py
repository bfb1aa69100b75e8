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

1 - p_t is the other tokens' share of the sum, with an absolute error of about 1e-7. If the loss
also has a gradient e = dL / dH, then dH / dz_v = -p_v (log p_v + H), and both products take

    c_v           = p_v (g + e (log p_v + H)) = -dL / dz_v, v != t
    dL / dz_t     = sum of c_v over v != t

instead of p_v. That costs another product (the slope cannot be used) and another buffer. Not here:
which tokens are scored (grpo/logps.py).
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.fused import fused, on_gpu, subtract_product
from models.layers import at_least_float32

MAX_LOGITS = 2**25  # logits that exist at once: 128 MB in float32
MAX_LOGITS_GPU = 3 * MAX_LOGITS  # twice 192 MB in bfloat16; float32 ones are not kept


class _TokenLogps(torch.autograd.Function):
    """All tokens, chunk by chunk; the backward pass forms the probabilities again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk, entropies):
        buffers = _Buffers(weight, min(chunk, len(hidden)))
        logps, slopes = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp, softmax = _softmax(
                h, weight, t, temperature, suppressed, buffers, for_products=entropies
            )
            logps.append(logp)
            if entropies:
                slopes.append(_slope(weight, t, softmax))
            del softmax  # else it is there beside the next
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
                grad_weight = torch.zeros_like(weight, dtype=buffers.wide)
            parts = []
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                h, t, g = hidden[part], targets[part], grad[part]
                wide = grad_entropy is not None
                _, softmax = _softmax(h, weight, t, temperature, suppressed, buffers, wide=wide)
                if grad_entropy is not None:
                    softmax = _with_entropy(softmax, g, grad_entropy[part], buffers)
                    parts.append(_slope(weight, t, softmax) / temperature)
                    g = torch.ones_like(g)
                if grad_weight is not None:
                    _add_grad_weight(grad_weight, h, t, g / temperature, softmax)
                del softmax
            if parts:
                grad_hidden = torch.cat(parts).to(hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 5


class _ChunkLogps(torch.autograd.Function):
    """One chunk, whose probabilities stay in `buffers` until its backward pass.

    The backward pass adds the weight's gradient to `grad_weight` (None if the weight is frozen).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, buffers, grad_weight):
        logps, softmax = _softmax(hidden, weight, targets, temperature, suppressed, buffers)
        slope = _slope(weight, targets, softmax)
        entropy = _entropy(hidden, logps, slope, temperature)
        # Saved as tensors, so that torch raises if the next chunk has overwritten the buffers.
        ctx.save_for_backward(hidden, weight, targets, slope, *softmax)
        ctx.settings = temperature, suppressed, buffers, grad_weight
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        hidden, weight, targets, slope, others, rest, total = ctx.saved_tensors
        softmax = _Softmax(others, rest, total)
        temperature, suppressed, buffers, grad_weight = ctx.settings
        ctx.settings = temperature, None, None, None  # a kept loss must not keep buffers
        grad = torch.zeros_like(slope[:, 0]) if grad is None else grad
        if grad_entropy is not None:
            if not buffers.keeps_logits:  # formed again, which costs a product
                again = hidden, weight, targets, temperature, suppressed, buffers
                _, softmax = _softmax(*again, wide=True)
            softmax = _with_entropy(softmax, grad, grad_entropy, buffers)
            slope, grad = _slope(weight, targets, softmax), torch.ones_like(grad)
        grad = grad / temperature
        if grad_weight is not None:
            _add_grad_weight(grad_weight, hidden, targets, grad, softmax)
        return (slope * grad[:, None]).to(hidden.dtype), *[None] * 6


class _Buffers:
    """Memory that all chunks use in turn, (chunk, V) each: allocating it for each chunk would take
    as long as the arithmetic.

    products: in the weight's dtype. logits: float32 or wider, the same memory if the weight's dtype
    is. second: like logits. A GPU uses logits and second for a gradient of the entropy alone; they
    are allocated when first needed.
    """

    def __init__(self, weight: Tensor, chunk: int):
        self.products = weight.new_empty(chunk, len(weight))
        self.wide = at_least_float32(weight.dtype)
        self.keeps_logits = weight.dtype == self.wide or not on_gpu(weight)

    @functools.cached_property
    def logits(self) -> Tensor:
        same = self.products.dtype == self.wide
        return self.products if same else torch.empty_like(self.products, dtype=self.wide)

    @functools.cached_property
    def second(self) -> Tensor:
        return torch.empty_like(self.logits)


class _Softmax(NamedTuple):
    """A chunk's softmax before it is normalized, with the target apart.

    others: (C, V), exp(logit - largest) of all tokens but the target, where it is 0. total: (C,),
    the sum with the target's. rest: (C,), total less the target's.
    """

    others: Tensor
    rest: Tensor
    total: Tensor


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    suppressed: Tensor | None,
    buffers: _Buffers,
    for_products: bool = True,
    wide: bool = False,
) -> tuple[Tensor, _Softmax]:
    """Log-probs of the targets, (C,) nats, and the softmax, which is in `buffers`.

    for_products: `others` is wanted in the weight's dtype. wide: it is also wanted in
    `buffers.logits`, where it may be in any case.
    """
    products = torch.mm(hidden, weight.T, out=buffers.products[: len(hidden)])
    if suppressed is not None:
        products.index_fill_(1, suppressed, float("-inf"))
    at = targets[:, None]
    aimed = products.gather(1, at).to(buffers.wide)
    if temperature != 1.0:
        aimed.div_(temperature)
    products.scatter_(1, at, float("-inf"))
    if wide or buffers.keeps_logits:
        others = buffers.logits[: len(hidden)]
        largest, rest, _ = _exponentials.function(products, aimed, temperature, None, others)
        if for_products and products.dtype != others.dtype:
            others = products.copy_(others)
    else:
        dtype = products.dtype if for_products else None
        largest, rest, others = _exponentials(products, aimed, temperature, dtype)
    shifted = (aimed - largest).squeeze(1)
    target = shifted.exp()
    total = rest + target
    return shifted - total.log(), _Softmax(others, total - target, total)


@fused
def _exponentials(
    products: Tensor,
    aimed: Tensor,
    temperature: float,
    dtype: torch.dtype | None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each row of products / temperature, (C, V), and `aimed`, (C, 1): the largest, (C, 1); the
    sum of exp(product / temperature - largest), (C,); these, (C, V) in `dtype`, if one is given.

    They are computed in `logits` if it is given.
    """
    logits = torch.empty_like(products, dtype=aimed.dtype) if logits is None else logits
    scaled = products
    if temperature != 1.0:
        scaled = logits.copy_(products).div_(temperature)
    largest = torch.maximum(scaled.amax(1, keepdim=True).to(aimed.dtype), aimed)
    torch.sub(scaled, largest, out=logits).exp_()
    return largest, logits.sum(1), None if dtype is None else logits.to(dtype)


def _slope(weight: Tensor, targets: Tensor, softmax: _Softmax) -> Tensor:
    """(C, D), see the module's text."""
    others, rest, total = softmax
    expected = (others @ weight).to(total.dtype)
    return torch.addcmul(-expected, rest[:, None], weight[targets]) / total[:, None]


def _entropy(hidden: Tensor, logps: Tensor, slope: Tensor, temperature: float) -> Tensor:
    return torch.linalg.vecdot(hidden.to(slope.dtype), slope) / temperature - logps


def _with_entropy(
    softmax: _Softmax, grad: Tensor, grad_entropy: Tensor, buffers: _Buffers
) -> _Softmax:
    """c_v instead of p_v (see the module's text), for the chunk that is in `buffers`.

    others is then c (C, V) in the weight's dtype, rest its sum, total 1. H is computed from the
    logits in full precision, not from slopes that bf16 has rounded.
    """
    _, rest, total = softmax
    others, c = buffers.logits[: len(total)], buffers.second[: len(total)]
    torch.xlogy(others, others, out=c)
    target = total - rest
    entropy = total.log() - (c.sum(1) + torch.xlogy(target, target)) / total
    c.mul_(grad_entropy[:, None])
    c.addcmul_(others, (grad + grad_entropy * (entropy - total.log()))[:, None])
    c.div_(total[:, None])
    narrow = c if others.dtype == buffers.products.dtype else buffers.products[: len(c)].copy_(c)
    return _Softmax(narrow, c.sum(1), torch.ones_like(total))


def _add_grad_weight(
    grad_weight: Tensor, hidden: Tensor, targets: Tensor, grad: Tensor, softmax: _Softmax
) -> None:
    """Adds dL / dW to grad_weight (V, D), in the logits' precision: bf16 would round every partial
    sum. grad: dL / dlogp / temperature, (C,)."""
    others, rest, total = softmax
    scaled = hidden.to(total.dtype) * (grad / total)[:, None]
    if hidden.dtype == total.dtype:
        grad_weight.addmm_(others.T, scaled, alpha=-1)
    else:
        subtract_product(grad_weight, others.T, scaled.to(hidden.dtype))
    grad_weight.index_add_(0, targets, scaled * rest[:, None])


def chunk_tokens(vocabulary: int, device: str) -> int:
    """How many tokens a chunk has: as many as `MAX_LOGITS` allows, at least 64 and at most 1024.

    Each chunk reads the head twice and adds to its float32 gradient once. Products are so fast on a
    GPU that this would take a large part of the time: there chunks are three times as large.
    """
    most = MAX_LOGITS if device == "cpu" else MAX_LOGITS_GPU
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
    """Log-prob of each target and entropy of each distribution, nats.

    hidden: (C, D), at the positions that predict the targets. weight: (V, D). targets: (C,) int64.
    suppressed: int64 ids with probability 0, as in sampling. chunk: tokens, by default
    `chunk_tokens`; memory is a (chunk, V) buffer, and another one if the entropy has a gradient.

    Returns (C,) and (C,) in float32 (float64 for float64 inputs); gradients flow from both to
    hidden and weight. Without a gradient the entropy is None unless `entropies` is true, as it
    costs a product.
    """
    chunk = chunk or chunk_tokens(len(weight), weight.device.type)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogps.apply(
        hidden, weight, targets, temperature, suppressed, chunk, trained or entropies
    )


def token_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (part, logps, entropy) chunk by chunk; arguments and numbers as `token_logps`.

    part: which tokens these are; logps and entropy: (c,) nats. Call backward on each chunk's loss
    before asking for the next. hidden and weight get their gradients once, after the last chunk, so
    take all of them.
    """
    chunk = chunk or chunk_tokens(len(weight), weight.device.type)
    chunk = max(1, min(chunk, len(targets)))
    buffers = _Buffers(weight, chunk)
    trained = weight.requires_grad
    grad_weight = torch.zeros_like(weight, dtype=buffers.wide) if trained else None
    grad_hidden = []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        leaf = hidden[part].detach().requires_grad_()
        yield (
            part,
            *_ChunkLogps.apply(
                leaf, weight.detach(), targets[part], temperature, suppressed, buffers, grad_weight
            ),
        )
        assert leaf.grad is not None, "call backward on this chunk's loss first"
        grad_hidden.append(leaf.grad)
    buffers = None  # frees memory for the backward pass
    if trained:  # before hidden's: at the end of that pass a sharded model reduces its gradients
        rounded = grad_weight.to(weight.dtype)
        del grad_weight  # float32, as large as the head
        weight.backward(rounded)
        del rounded
    if hidden.requires_grad:  # adds to the head's gradient in place if the head is tied
        hidden.backward(torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden))
