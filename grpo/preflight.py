"""What is shown before the first update: gradients reach all that is trained and nothing else, and
sampling and training agree on what the policy is. And with each checkpoint: the reference has not
moved."""

import math

import torch

from grpo.dist import Optimizer, Ranks, checksum, shard
from grpo.logps import pack_chunks
from grpo.rollout import Group, make_packs
from models.processor import Prompt
from models.qwen_vl import QwenVL

# Largest difference (nats) of a sampled token's log-prob between sampling and training.
AGREE = {torch.float32: 0.02, torch.bfloat16: 1.0}

REFERENCE = "the reference model"  # the name of its checksum among a run's facts


def check_gradients(
    policy: QwenVL, optimizer: Optimizer, prompt: Prompt, answer: list[int], scoring, ranks: Ranks
) -> None:
    """Makes a backward pass of the answer's log-prob and looks at every parameter's gradient.

    answer: token ids. scoring: temperature and suppressed ids. Every rank passes the same row.
    Raises ValueError naming trainable parameters without a finite gradient other than 0, and
    frozen ones with one. The vision tower is looked at where the prompt has an image.
    """
    group = Group(prompt, [answer], [torch.zeros(len(answer))], [False])
    (pack,) = make_packs([group], 2**62)
    for _, logps, _ in pack_chunks(policy, pack, *scoring):
        (-logps.sum() / len(answer) / ranks.world).backward()
    names, sizes = [], []
    for name, gradient in optimizer.gradients().items():
        names.append(name)
        sizes.append(shard(gradient)[0].abs().sum().double())
    sizes = ranks.gather([torch.stack(sizes).tolist()])
    totals = [sum(of_ranks) for of_ranks in zip(*sizes, strict=True)]
    seen = bool(prompt.image_keys)
    dead = [
        f"{name} is trainable and its gradient is {total}"
        for name, total in zip(names, totals, strict=True)
        if not (total > 0 and math.isfinite(total)) and (seen or not name.startswith("visual."))
    ]
    frozen = [(n, p) for n, p in policy.named_parameters() if not p.requires_grad]
    dead += [f"{name} is frozen and has a gradient" for name, p in frozen if p.grad is not None]
    optimizer.discard()
    if dead:
        raise ValueError(
            f"before the first step, the gradients of {len(dead)} parameters are wrong:\n  "
            + "\n  ".join(dead[:10])
        )


def check_first_ratio(drift: float, dtype: torch.dtype, temperature: float) -> None:
    """Raises ValueError where the first update's importance ratios are not 1 up to rounding.

    drift: the largest |log-prob in training - log-prob at sampling| of a sampled token, nats. A
    temperature below 1 magnifies rounding.
    """
    rounding = AGREE[dtype] / min(1.0, temperature)
    if drift > rounding:
        raise ValueError(
            f"before the first update a sampled token's log-prob differs by {drift:.3g} nats "
            f"between sampling and training, where {rounding:.3g} is rounding: they do not compute "
            f"the same policy, and its gradient would be wrong"
        )


def check_reference(reference: QwenVL | None, facts: dict[str, str], ranks: Ranks) -> None:
    """Raises ValueError where the reference's weights are not those that the run began with."""
    if reference is not None and checksum(reference, ranks) != facts[REFERENCE]:
        raise ValueError("the reference model's weights have changed during the run: a bug")
