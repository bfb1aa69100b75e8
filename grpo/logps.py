"""Log-probs and entropy of completion tokens, without ever holding (tokens, vocabulary) logits.

The head is applied a chunk of tokens at a time, forward and backward; the backward pass forms each
chunk's logits again. One pass of the model scores a whole pack: each prompt once, then its
completions (see grpo/rollout.py for how packs are made).
"""

import torch
from torch import Tensor

from grpo.rollout import Pack
from models.generate import image_features
from models.qwen_vl import QwenVL

MOST_LOGITS = 2**25  # that exist at once: 128 MB


class _TokenLogps(torch.autograd.Function):
    """log softmax(W h / temperature)[target] and the entropy, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk):
        buffer, exponentials = _buffer(hidden, weight, chunk), _buffer(hidden, weight, chunk)
        logps, entropy, normalizers = [], [], []
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _logits(h, weight, temperature, suppressed, buffer)
            largest = logits.amax(1)
            shifted = logits.sub_(largest[:, None])
            exps = torch.exp(shifted, out=exponentials[: len(h)])
            total = exps.sum(1)
            logps.append(shifted.gather(1, target[:, None]).squeeze(1) - total.log())
            entropy.append(total.log() - torch.linalg.vecdot(exps, shifted) / total)
            normalizers.append(largest + total.log())
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers))
        ctx.settings = temperature, suppressed, chunk
        logps, entropy = torch.cat(logps), torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        temperature, suppressed, chunk = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        buffer = _buffer(hidden, weight, chunk)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # summed over chunks in the logits' precision, so that bf16 does not round every partial sum
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if need_weight else None
        grad = (grad / temperature)[:, None].to(buffer.dtype)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature, suppressed, buffer)
            # d logp / d logits = onehot(target) - probs; suppressed tokens have probs exactly 0
            slope = logits.sub_(normalizers[part, None]).exp_().mul_(-grad[part])
            slope.scatter_add_(1, targets[part, None], grad[part])
            slope = slope.to(weight.dtype)
            if need_hidden:
                torch.mm(slope, weight, out=grad_hidden[part])
            if need_weight and weight.dtype == buffer.dtype:
                grad_weight.addmm_(slope.T, hidden[part])
            elif need_weight:
                grad_weight += slope.T @ hidden[part]
        grad_weight = grad_weight.to(weight.dtype) if need_weight else None
        return grad_hidden, grad_weight, None, None, None, None


def _buffer(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """(chunk, V) in float32 at least, used for every chunk: fresh memory would cost as much again
    as what is computed in it."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=dtype)


def _logits(
    hidden: Tensor, weight: Tensor, temperature: float, suppressed: Tensor | None, buffer: Tensor
) -> Tensor:
    """(C, V) logits, written over `buffer`; so low for suppressed tokens that exp makes them 0."""
    logits = buffer[: len(hidden)]
    if weight.dtype == buffer.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    if temperature != 1.0:
        logits /= temperature
    if suppressed is not None:
        # finite, because the entropy multiplies it by a probability of 0
        logits.index_fill_(1, suppressed, torch.finfo(logits.dtype).min / 2)
    return logits


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
) -> tuple[Tensor, Tensor]:
    """Log-prob (nats) of each target and entropy (nats) of each distribution.

    hidden: (C, D), at the positions that predict the targets. weight: (V, D). targets: (C,) int64.
    suppressed: int64 ids with probability 0, as in sampling. Returns (C,), (C,) in float32 (float64
    for float64 inputs); gradients flow through the log-probs to hidden and weight, none through the
    entropy, which is reported and not optimized. Memory: two (chunk, V) buffers,
    by default of `chunk_tokens(V)` tokens.
    """
    chunk = chunk or chunk_tokens(len(weight))
    return _TokenLogps.apply(hidden, weight, targets, temperature, suppressed, chunk)


def pack_logps(
    model: QwenVL,
    pack: Pack,
    temperature: float,
    suppressed: Tensor | None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of the pack's completion tokens, in the pack's order, each (C,).

    Gradients flow back through the shared prompt and its images, unless torch.no_grad is on.
    """
    hidden = model(
        pack.input_ids.to(model.device),
        pack.position_ids.to(model.device),
        model.bounds(pack.rows),
        image_features(model, pack.prompts),
    )
    hidden = hidden[pack.predicts.to(model.device)]
    targets = pack.targets.to(model.device)
    return token_logps(hidden, model.head_weight, targets, temperature, suppressed, chunk)
