"""Log-probs and entropy of completion tokens, without ever holding (tokens, vocabulary) logits.

The head is applied a chunk of tokens at a time, forward and backward; the backward pass forms each
chunk's logits again. One pass of the model scores a whole pack: each prompt once, then its
completions (see grpo/rollout.py for how packs are made).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.rollout import Pack
from models.generate import image_features
from models.qwen_vl import QwenVL

CHUNK = 1024  # tokens whose logits exist at once


class _TokenLogps(torch.autograd.Function):
    """log softmax(W h / temperature)[target] and the entropy, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk):
        logps, entropy, normalizers = [], [], []
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _logits(h, weight, temperature, suppressed)
            normalizer = logits.logsumexp(1)
            logps.append(logits.gather(1, target[:, None]).squeeze(1) - normalizer)
            probs = (logits - normalizer[:, None]).exp_()
            entropy.append(normalizer - (probs * logits).sum(1))
            normalizers.append(normalizer)
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
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # summed over chunks in the logits' precision, so that bf16 does not round every partial sum
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature, suppressed)
            # d logp / d logits = onehot(target) - probs; suppressed tokens have probs exactly 0
            slope = (logits - normalizers[part, None]).exp_().neg_()
            slope[torch.arange(len(slope), device=slope.device), targets[part]] += 1
            slope *= (grad[part] / temperature)[:, None]
            slope = slope.to(weight.dtype)
            if need_hidden:
                grad_hidden[part] = slope @ weight
            if need_weight:
                grad_weight += slope.T @ hidden[part]
        grad_weight = grad_weight.to(weight.dtype) if need_weight else None
        return grad_hidden, grad_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, suppressed: Tensor | None):
    """(C, V) logits in float32 at least; so low for suppressed tokens that exp makes them 0."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if suppressed is not None:
        # finite, because the entropy multiplies it by a probability of 0
        logits.index_fill_(1, suppressed, torch.finfo(logits.dtype).min / 2)
    return logits


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Log-prob (nats) of each target and entropy (nats) of each distribution.

    hidden: (C, D), at the positions that predict the targets. weight: (V, D). targets: (C,) int64.
    suppressed: int64 ids with probability 0, as in sampling. Returns (C,), (C,) in float32 (float64
    for float64 inputs); gradients flow through the log-probs to hidden and weight, none through the
    entropy, which is reported and not optimized. Memory: one (chunk, V) buffer and its like.
    """
    return _TokenLogps.apply(hidden, weight, targets, temperature, suppressed, chunk)


def pack_logps(
    model: QwenVL, pack: Pack, temperature: float, suppressed: Tensor | None, chunk: int = CHUNK
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
