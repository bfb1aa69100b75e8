"""Sampling completions: prefill once per prompt, then one token per live sample and step.

No beam search, no repetition penalty: a policy gradient needs samples of the policy itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache import KVCache
from models.decode import DecodeStep
from models.processor import Prompt
from models.qwen_vl import QwenVL, image_features

NEVER = float("-inf")
BLOCK = 128  # entries of the vocabulary, which the published ones are multiples of


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature 0 is greedy. top_p 1 and top_k 0 are off. stop_ids end a completion and are part of
    it; suppressed_ids have probability 0, at sampling and in training alike.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    suppressed_ids: tuple[int, ...] = ()


@torch.no_grad()
def with_image_features(model: QwenVL, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with their images encoded, for a vision tower that does not change."""
    features = image_features(model, prompts)
    if features is None:  # no rows, so that these prompts and others can stand in one pack
        features = torch.zeros(0, model.config.hidden_size, dtype=model.dtype, device=model.device)
    image = model.config.image_token_id
    counts = [int((prompt.input_ids == image).sum()) for prompt in prompts]
    parts = features.split(counts)
    return [replace(p, image_features=part) for p, part in zip(prompts, parts, strict=True)]


@torch.no_grad()
def generate(
    model: QwenVL, prompts: Sequence[Prompt], group: int, sampling: Sampling, uniforms: Tensor
) -> tuple[list[list[int]], list[Tensor]]:
    """`group` completions of each prompt.

    uniforms: (B * group, max_completion_length) float64 in [0, 1): sample b * group + g uses up its
    row, one number a token, so that a completion depends on its own numbers and nothing else.
    Returns for each sample, prompt-major, its token ids (a stop token included) and the float32
    log-probs (nats, at the sampling temperature, over all tokens that are not suppressed) under
    which they were drawn. Raises FloatingPointError where the model's logits are NaN.
    """
    device = model.device
    count, limit = len(prompts) * group, sampling.max_completion_length
    cache = KVCache(model.config.num_hidden_layers, group, limit)
    last = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).to(device) - 1
    hidden = model.hidden_states(
        torch.cat([prompt.input_ids for prompt in prompts]).to(device),
        torch.cat([prompt.position_ids for prompt in prompts], dim=1).to(device),
        model.bounds([(len(prompt),) for prompt in prompts]),
        prompts,
        cache,
        last,
    )
    hidden = hidden.repeat_interleave(group, 0).T  # columns, as a decode step gives them
    decode = DecodeStep(model)

    position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    position = position.repeat_interleave(group)
    uniforms = uniforms.to(device)
    stop = torch.tensor(sampling.stop_ids, device=device, dtype=torch.int64)
    suppressed = torch.tensor(sampling.suppressed_ids, device=device, dtype=torch.int64)
    live = torch.arange(count, device=device)
    tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
    logps = torch.zeros(count, limit, device=device)
    lengths = torch.full((count,), limit, device=device)
    for step in range(limit):
        logits = torch.mm(model.head_weight, hidden).T.float().contiguous()
        logits.index_fill_(1, suppressed, NEVER)
        token, logp = sample(logits, sampling, uniforms[live, step])
        tokens[live, step], logps[live, step] = token, logp
        ended = torch.isin(token, stop)
        if ended.any():
            lengths[live[ended]] = step + 1
            going = (~ended).nonzero().squeeze(1)
            live, token = live[going], token[going]
            cache.keep(going)
        if step + 1 == limit or not len(live):
            break
        hidden = decode(token, (position[live] + step).expand(3, -1), cache)
    if logps.isnan().any():  # looked for once, not in every step: it would wait for the device
        raise FloatingPointError("the model's logits are not numbers: it has diverged")
    tokens, lengths = tokens.tolist(), lengths.tolist()
    return (
        [row[:length] for row, length in zip(tokens, lengths, strict=True)],
        [row[:length] for row, length in zip(logps.cpu(), lengths, strict=True)],
    )


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    logits: (N, V) float32, -inf where a token is suppressed, overwritten; uniform: (N,) float64 in
    [0, 1), not used when greedy. Returns tokens (N,) int64 and their log-probs (N,) float32 before
    top-k and top-p, which are the sampler's alone: training does not know them. Rows of NaN give
    some token and a NaN.
    """
    if sampling.temperature == 0:
        token = logits.argmax(1)
        return token, logits.log_softmax(1).gather(1, token[:, None]).squeeze(1)
    if sampling.temperature != 1.0:
        logits /= sampling.temperature
    logits -= logits.amax(1, keepdim=True)
    shifted, weights = logits, logits.exp()
    normalizer = weights.sum(1, keepdim=True).log()
    if 0 < sampling.top_k < logits.shape[1]:
        kth = shifted.topk(sampling.top_k, dim=1).values[:, -1:]
        weights.masked_fill_(shifted < kth, 0.0)
    if sampling.top_p < 1:
        ordered, order = weights.double().sort(dim=1, descending=True)
        total = ordered.sum(1, keepdim=True)
        # keep a token while those before it hold less than top_p: the first is always kept
        before = ordered.cumsum(1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * total, 0.0)
        weights = torch.zeros_like(weights).scatter_(1, order, ordered.float())
    token = _draw(weights, uniform)[:, None]
    return token.squeeze(1), (shifted.gather(1, token) - normalizer).squeeze(1)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the cumulative sum of each row passes uniform * its total, (N,) int64.

    weights: (N, V) float32, not negative. Summed by blocks first, then within one, cumulatively in
    float64: in float32 the sum could round to the target, and a token of weight 0 be reached.
    """
    if missing := -weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, missing))
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(2).double()
    reached = sums.cumsum(1)
    # the factor: a product that rounds to the whole sum would point beyond the last weight
    target = uniform[:, None] * (1 - 2**-52) * reached[:, -1:]
    block = torch.searchsorted(reached, target, right=True).clamp(max=sums.shape[1] - 1)
    before = reached.gather(1, block) - sums.gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block.squeeze(1)]
    inside = inside.double().cumsum(1)
    # strictly below the block's own total, which is rounded otherwise than its sum
    below = inside[:, -1:] * (1 - 2**-52)
    place = torch.searchsorted(inside, (target - before).clamp(min=0).minimum(below), right=True)
    token = (block * BLOCK + place).squeeze(1)
    return token.clamp(max=weights.shape[1] - missing - 1)  # beyond the end for NaN only
