"""Group-relative advantages, the clipped policy loss and the KL term.

Papers: GRPO (DeepSeekMath, Shao et al. 2024), DAPO (Yu et al. 2025), Dr. GRPO (Liu et al. 2025),
PPO's clipping (Schulman et al. 2017), KL estimators (Schulman 2020, "Approximating KL divergence").

All tensors here are flat: one entry per completion token, whichever group or pack it came from.
What ties tokens together is the weight that each one carries, and weights come from counts over the
whole optimizer step. A step's loss is therefore a plain sum, and how it is cut into packs,
accumulated or spread over ranks cannot change its gradient. Nothing here forms logits.
"""

import math
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
KL_ESTIMATORS = ("k1", "k2", "k3")
SCALE_REWARDS = ("group", "batch", "none")


def weighted_reward(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """sum of weights[name] x terms[name], the reward of one completion.

    Raises ValueError where terms are no mapping from the names of the weights to finite numbers, or
    their sum is not finite.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(f"score() returned {terms!r:.200}, not a dict of rewards")
    for name, value in terms.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"the reward {name!r} is {value!r:.200}, not a finite float or int")
    if terms.keys() != weights.keys():
        raise ValueError(f"score() returned {list(terms)}, where {list(weights)} are the rewards")
    total = sum(weight * terms[name] for name, weight in weights.items())
    if not math.isfinite(total):
        raise ValueError(f"the weighted sum of {dict(terms)} is {total}")
    return total


def reward_fault(error: Exception, row: int, completion: str) -> dict[str, str]:
    """The record of a completion that cannot be rewarded: what went wrong, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return {
        "fault": f"{type(error).__name__}: {error} ({place}), for row {row} and the completion:\n"
        f"{completion}"
    }


def find_fault(records: Iterable[Mapping]) -> str | None:
    """The first fault among records."""
    return next((record["fault"] for record in records if "fault" in record), None)


def length_penalty(tokens: int, longest: int, buffer: int) -> float:
    """The soft overlong punishment, 0 to -1, of a completion of `tokens` tokens (DAPO, eq. 13).

    It falls linearly over the last `buffer` tokens before `longest`; buffer 0 is off.
    """
    return -min(1.0, max(0, tokens - (longest - buffer)) / buffer) if buffer else 0.0


def group_advantages(rewards: Tensor, scale_rewards: str = "group", eps: float = 1e-4) -> Tensor:
    """Each completion's reward against its own group's: (B, G) -> (B, G) float64.

    A = (r - mean of the group) / (std + eps)                    (DeepSeekMath, section 4.1.2)

    scale_rewards: "group" divides by the group's sample standard deviation, "batch" by that of all
    B x G rewards, "none" (Dr. GRPO, section 3.2) does not divide. A group of equal rewards gets
    exactly 0; max and min decide, for a floating-point std of equal numbers need not be 0.

    Raises ValueError for groups of one, rewards that are not finite, or an unknown name.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group of one completion has no advantage: use at least 2 generations")
    if not rewards.isfinite().all():
        raise ValueError("rewards must be finite")
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    elif scale_rewards == "batch":
        centred = centred / (rewards.std() + eps)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards {scale_rewards!r} is none of {', '.join(SCALE_REWARDS)}")
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return centred.masked_fill(flat, 0.0)


def token_weights(lengths: Tensor, loss_type: str, max_completion_length: int) -> Tensor:
    """What each token of a completion counts in the step's loss: one weight per completion.

    lengths: completion lengths in tokens, int64 of any shape: all N of the whole step, over all
    groups, packs and ranks; 0 for a completion that is left out of the loss.

    grpo     1 / (N |o_i|)   mean over tokens, then over completions    (DeepSeekMath, eq. 3)
    dapo     1 / sum |o_i|   mean over all tokens                       (DAPO, eq. 8)
    dr_grpo  1 / (N L)       L = max_completion_length, a constant      (Dr. GRPO, section 3.2)

    Returns float64 of lengths' shape. Raises ValueError for an unknown name.
    """
    counted = (lengths > 0).double()
    if loss_type == "grpo":
        return counted / (lengths.numel() * lengths.clamp(min=1))
    if loss_type == "dapo":
        return counted / lengths.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return counted / (lengths.numel() * max_completion_length)
    raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(LOSS_TYPES)}")


def per_token_kl(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """Estimates KL(policy || reference) at each sampled token, (T,) nats -> (T,) nats.

    With d = ref_logps - logps:
    k1  -d             unbiased value; as a loss its expected gradient is 0
    k2  d^2 / 2        biased value; as a loss its expected gradient is that of KL(policy || ref)
    k3  exp(d) - d - 1 unbiased value, never negative (DeepSeekMath, eq. 4); as a loss its expected
                       gradient is that of KL(ref || policy)

    Raises ValueError for an unknown name.
    """
    d = ref_logps - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return d.exp() - d - 1
    raise ValueError(f"kl_estimator {estimator!r} is none of {', '.join(KL_ESTIMATORS)}")


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate plus beta times the KL estimate, summed under the tokens' weights.

    loss = sum_t w_t ( -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t) + beta KL_t )
    rho_t = exp(logps_t - old_logps_t)                        (DeepSeekMath, eq. 3; DAPO, eq. 8)

    logps, old_logps, ref_logps: (T,) float32, nats; old_logps None means that the policy is the one
    that sampled (rho = 1, with gradient). advantages, weights: (T,). epsilon_high None takes
    epsilon. ref_logps is needed only where beta > 0.

    Returns the scalar loss and, without gradient, sums over tokens: "kl", "clip_low", "clip_high".
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    ratio = (logps - old_logps).exp()
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    low = 1 - epsilon
    advantages = advantages.to(logps.dtype)
    per_token = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    sums = {
        "clip_low": ((ratio < low) & (advantages < 0)).sum(),
        "clip_high": ((ratio > high) & (advantages > 0)).sum(),
    }
    if beta > 0:
        kl = per_token_kl(logps, ref_logps, kl_estimator)
        per_token = per_token + beta * kl
        sums["kl"] = kl.detach().sum()
    return (per_token * weights).sum(), sums
