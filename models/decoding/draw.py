"""How a token is drawn from logits: temperature, top-k, top-p, min-p, an inverted cumulative sum.

No beam search, no repetition penalty: a policy gradient needs samples of the policy itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding.stop import StopStrings, read_stop

NEVER = float("-inf")
BLOCK = 128  # entries of the vocabulary, which the published ones are multiples of


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: num_generations of each prompt, token by token.

    temperature 0 is greedy. top_p 1, top_k 0 and min_p 0 are off. stop_ids and the token that
    completes a string of `stop` end a completion and are part of it.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    stop: StopStrings | None = None
    num_generations: int = 1

    @classmethod
    def of(cls, config, processor) -> "Sampling":
        """By the flags of these names, for a processor's tokens. Raises UserError as
        `read_stop`."""
        names = ("max_completion_length", "temperature", "top_p", "top_k", "min_p")
        return cls(
            num_generations=config.num_generations,
            stop_ids=tuple(processor.stop_ids),
            stop=read_stop(processor, tuple(config.stop or ())),
            **{name: getattr(config, name) for name in names},
        )

    def greedy(self) -> "Sampling":
        """One completion, the likeliest token each time."""
        off = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return replace(self, num_generations=1, **off)

    def times(self, count: int) -> "Sampling":
        """`count` completions of each prompt."""
        return replace(self, num_generations=count)

    def ended(self, completion_ids: Sequence[int]) -> bool:
        """Whether a completion that was drawn so ended by itself, not at the length limit."""
        if completion_ids[-1] in self.stop_ids:
            return True
        return self.stop is not None and self.stop.are_in(completion_ids)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token from each distribution by inverting its cumulative sum.

    logits: (N, V) float32, -inf for a suppressed token, overwritten; uniform: (N,) float64 in
    [0, 1), not used when greedy. Returns tokens (N,) int64 and their log-probs (N,) float32 before
    top-k, top-p and min-p, which are the sampler's alone: training does not know them. Logits of
    NaN give some token and a NaN.
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
    if sampling.min_p > 0:
        weights.masked_fill_(weights < sampling.min_p, 0.0)  # the largest weight is 1
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
    # The factor keeps the target below the sum. A product that rounds up to it would point beyond
    # the last weight, at a token that does not exist.
    target = uniform[:, None] * (1 - 2**-52) * reached[:, -1:]
    block = torch.searchsorted(reached, target, right=True).clamp(max=sums.shape[1] - 1)
    before = reached.gather(1, block) - sums.gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block.squeeze(1)]
    inside = inside.double().cumsum(1)
    # strictly below the block's own total, which is rounded otherwise than its sum
    below = inside[:, -1:] * (1 - 2**-52)
    within = torch.searchsorted(inside, (target - before).clamp(min=0).minimum(below), right=True)
    token = (block * BLOCK + within).squeeze(1)
    return token.clamp(max=weights.shape[1] - missing - 1)  # beyond the end for NaN only
