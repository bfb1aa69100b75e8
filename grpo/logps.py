"""Log-probs and entropy of completion tokens, without ever holding (tokens, vocabulary) logits.

One pass of the model scores a whole pack: each prompt once, then its completions (see
grpo/rollout.py for how packs are made). The head then works on a chunk of tokens at a time, in one
of two ways with the same numbers:

`pack_chunks` hands out chunk after chunk, and the gradient of each is formed from the
probabilities that are still there: three products with the head's weight. It serves every loss that
is a sum over tokens. `pack_logps` returns the log-probs of all tokens at once, for any other loss,
or for none (the reference); its backward pass forms each chunk's logits again, a fourth product.

With p = softmax(W h / temperature), target t and g = dL / dlogp of one token:

    slope         = (1 - p_t) W_t - sum of p_v W_v over v != t
    dL / dh       = g slope / temperature
    entropy       = -logp + h . slope / temperature
    dL / dW_t    += g (1 - p_t) h / temperature
    dL / dW_v    -= g p_v h / temperature, v != t

1 - p_t is a sum over the other tokens, exact where p_t is nearly 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.rollout import Pack
from models.qwen_vl import QwenVL

MOST_LOGITS = 2**25  # that exist at once: 128 MB


class _TokenLogps(torch.autograd.Function):
    """All tokens, chunk by chunk; the backward pass forms the probabilities again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk, trained):
        buffer = _buffer(weight, min(chunk, len(hidden)))
        logps, slopes = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp, *softmax = _softmax(h, weight, t, temperature, suppressed, buffer)
            logps.append(logp)
            if trained:
                slopes.append(_slope(weight, t, *softmax))
        logps = torch.cat(logps)
        if not trained:
            return logps, None
        slope = torch.cat(slopes)
        entropy = _entropy(hidden, logps, slope, temperature)
        ctx.save_for_backward(hidden, weight, targets, slope)
        ctx.settings = temperature, suppressed, chunk
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, slope = ctx.saved_tensors
        temperature, suppressed, chunk = ctx.settings
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (slope * (grad / temperature)[:, None]).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            buffer = _buffer(weight, min(chunk, len(hidden)))
            grad_weight = torch.zeros_like(weight, dtype=buffer.dtype)
            for h, t, g in zip(*(x.split(chunk) for x in (hidden, targets, grad)), strict=True):
                _, *softmax = _softmax(h, weight, t, temperature, suppressed, buffer)
                _add_grad_weight(grad_weight, h, t, g / temperature, *softmax)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 5


class _ChunkLogps(torch.autograd.Function):
    """One chunk; its probabilities stay in `buffer` until its backward pass, which adds the
    weight's gradient to `grad_weight` (None where the weight is frozen)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, buffer, grad_weight):
        logps, *softmax = _softmax(hidden, weight, targets, temperature, suppressed, buffer)
        slope = _slope(weight, targets, *softmax)
        entropy = _entropy(hidden, logps, slope, temperature)
        # saved, so that a backward pass after the next chunk overwrote them is an error
        ctx.save_for_backward(hidden, targets, slope, *softmax)
        ctx.settings = temperature, grad_weight
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, targets, slope, *softmax = ctx.saved_tensors
        temperature, grad_weight = ctx.settings
        ctx.settings = temperature, None  # whoever keeps the loss must not keep the gradient
        grad = grad / temperature
        if grad_weight is not None:
            _add_grad_weight(grad_weight, hidden, targets, grad, *softmax)
        return (slope * grad[:, None]).to(hidden.dtype), *[None] * 6


def _buffer(weight: Tensor, chunk: int) -> Tensor:
    """(chunk, V) in float32 at least, used for every chunk: fresh memory would cost as much again
    as what is computed in it."""
    return weight.new_empty(
        chunk, len(weight), dtype=torch.promote_types(weight.dtype, torch.float32)
    )


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    suppressed: Tensor | None,
    buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps (C,); exp(logit - largest) of all but the targets (C, V), written over `buffer`; the
    same of the targets (C,); and the sum of both (C,)."""
    logits = buffer[: len(hidden)]
    if weight.dtype == buffer.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    if temperature != 1.0:
        logits /= temperature
    if suppressed is not None:
        logits.index_fill_(1, suppressed, float("-inf"))
    logits -= logits.amax(1, keepdim=True)
    shifted = logits.gather(1, targets[:, None])
    others = logits.exp_().scatter_(1, targets[:, None], 0.0)
    shifted = shifted.squeeze(1)
    target = shifted.exp()
    total = others.sum(1) + target
    return shifted - total.log(), others, target, total


def _slope(
    weight: Tensor, targets: Tensor, others: Tensor, target: Tensor, total: Tensor
) -> Tensor:
    """(C, D), see the module's text."""
    expected = (others.to(weight.dtype) @ weight).to(others.dtype)
    return torch.addcmul(-expected, (total - target)[:, None], weight[targets]) / total[:, None]


def _entropy(hidden: Tensor, logps: Tensor, slope: Tensor, temperature: float) -> Tensor:
    return torch.linalg.vecdot(hidden.to(slope.dtype), slope) / temperature - logps


def _add_grad_weight(
    grad_weight: Tensor,
    hidden: Tensor,
    targets: Tensor,
    grad: Tensor,
    others: Tensor,
    target: Tensor,
    total: Tensor,
) -> None:
    """Adds dL / dW to grad_weight (V, D), in the logits' precision: bf16 would round every partial
    sum. grad: dL / dlogp / temperature, (C,)."""
    scaled = hidden.to(others.dtype) * (grad / total)[:, None]
    if hidden.dtype == others.dtype:
        grad_weight.addmm_(others.T, scaled, alpha=-1)
    else:
        grad_weight -= others.to(hidden.dtype).T @ scaled.to(hidden.dtype)
    grad_weight.index_add_(0, targets, scaled * (total - target)[:, None])


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits exist at once: `MOST_LOGITS` numbers, but 64 tokens at least."""
    return min(1024, max(64, MOST_LOGITS // vocabulary))


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob (nats) of each target and entropy (nats) of each distribution.

    hidden: (C, D), at the positions that predict the targets. weight: (V, D). targets: (C,) int64.
    suppressed: int64 ids with probability 0, as in sampling. Returns (C,), (C,) in float32 (float64
    for float64 inputs); gradients flow through the log-probs to hidden and weight, none through the
    entropy, which is reported and not optimized, and which is None where no gradient is wanted: it
    would cost a product. Memory: a (chunk, V) buffer, by default of `chunk_tokens(V)` tokens.
    """
    chunk = chunk or chunk_tokens(len(weight))
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _TokenLogps.apply(hidden, weight, targets, temperature, suppressed, chunk, trained)


def pack_logps(
    model: QwenVL,
    pack: Pack,
    temperature: float,
    suppressed: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(logps, entropy) of the pack's completion tokens, in the pack's order, each (C,).

    Gradients flow back through the shared prompt and its images, unless torch.no_grad is on; the
    entropy is None then.
    """
    hidden, targets = _hidden(model, pack), pack.targets.to(model.device)
    return token_logps(hidden, model.head_weight, targets, temperature, suppressed, chunk)


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
    chunk = max(1, min(chunk or chunk_tokens(len(weight)), len(targets)))
    buffer = _buffer(weight, chunk)
    trained = weight.requires_grad
    grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if trained else None
    inputs, grad_hidden = None, []
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        leaf = hidden[part].detach().requires_grad_()
        inputs = leaf, weight.detach(), targets[part], temperature, suppressed, buffer
        yield part, *_ChunkLogps.apply(*inputs, grad_weight)
        assert leaf.grad is not None, "call backward on this chunk's loss first"
        grad_hidden.append(leaf.grad)
    inputs = buffer = None  # memory for the backward pass
    if trained:  # first: a sharded model's gradients leave with the end of the other pass
        weight.backward(grad_weight.to(weight.dtype))
        del grad_weight
    if hidden.requires_grad:  # adds to the head's gradient in place where the head is tied
        hidden.backward(torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden))


def pack_chunks(
    model: QwenVL,
    pack: Pack,
    temperature: float,
    suppressed: Tensor | None,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`token_chunks` of the pack's completion tokens; the backward pass through the decoder and the
    images follows once, after the last chunk."""
    hidden, targets = _hidden(model, pack), pack.targets.to(model.device)
    yield from token_chunks(hidden, model.head_weight, targets, temperature, suppressed, chunk)


def _hidden(model: QwenVL, pack: Pack) -> Tensor:
    """Hidden states (C, D) at the positions that predict the pack's completion tokens."""
    return model.hidden_states(
        pack.input_ids.to(model.device),
        pack.position_ids.to(model.device),
        model.bounds(pack.rows),
        pack.prompts,
        read=pack.predicts.to(model.device),
    )
