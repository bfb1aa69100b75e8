"""Each loss against a double loop in Python floats, written from its paper alone.

`x` is what the policy gives now and `held` the same numbers where a paper stops the gradient, so a
central difference in `x` is the gradient that the paper means.
"""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from grpo.loss import (
    Tokens,
    entropy_threshold,
    gdpo_advantages,
    group_advantages,
    importance_ratio,
    policy_loss,
    token_weights,
)
from tests.tiny import loss_flags

LENGTHS = [[3, 1, 5, 6], [2, 7, 4, 3], [2, 2, 1, 4]]
ADVANTAGES = [[0.7, -1.2, 0.9, -0.4], [-0.4, 1.1, -0.7, 0.0], [0.0] * 4]  # the last group is dead
TRUNCATED = [(0, 3), (2, 0)]  # left out of the loss
LIMIT = 9


def flags(**changes) -> SimpleNamespace:
    return loss_flags(**({"epsilon_high": 0.3} | changes))


def nested(seed: int, mean: float, spread: float) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        [(mean + spread * torch.randn(n, generator=generator).double()).tolist() for n in group]
        for group in LENGTHS
    ]


def flat(values: list) -> torch.Tensor:
    return torch.tensor([v for group in values for c in group for v in c], dtype=torch.float64)


OLD, REF = nested(0, -2.0, 0.5), nested(1, -2.0, 0.5)
ENTROPY = nested(3, 1.0, 0.2)
NOW = [  # ratios from 0.3 to 5
    [[o + n for o, n in zip(a, b, strict=True)] for a, b in zip(x, y, strict=True)]
    for x, y in zip(OLD, nested(2, 0.0, 0.6), strict=True)
]
for (g, i), shift in {(1, 1): 0.7, (1, 2): -0.7, (0, 0): -0.3}.items():  # whole completions move
    NOW[g][i] = [x + shift for x in NOW[g][i]]
NOW[0][1][0] = OLD[0][1][0] + 1.7  # a ratio of 5.5 where the advantage is negative: for delta
KEPT = [[[float((g + i + t) % 3 > 0) for t in range(n)] for i, n in enumerate(group)]
        for g, group in enumerate(LENGTHS)]  # fmt: skip


# ---- the papers ---------------------------------------------------------------------------------


def clip(value, low, high):
    return min(max(value, low), high)


def ppo(r, a, f):
    """PPO and GRPO: the smaller of the plain and the clipped surrogate."""
    return min(r * a, clip(r, 1 - f.epsilon, 1 + f.epsilon_high) * a)


def two_sided(r, a, f):
    """INTELLECT-2: the plain ratio at most delta."""
    return min(min(r, f.delta) * a, clip(r, 1 - f.epsilon, 1 + f.epsilon_high) * a)


def sapo(r, a, f):
    tau = f.sapo_temperature_pos if a > 0 else f.sapo_temperature_neg
    return 4 / tau / (1 + math.exp(-tau * (r - 1))) * a


def tokens_of(x):
    """(group, completion, token) of every token."""
    return [(g, i, t) for g, c in enumerate(x) for i, o in enumerate(c) for t in range(len(o))]


def sequence_ratio(x, g, i):
    """GSPO: the likelihoods' ratio to the power of 1 / length."""
    product = 1.0
    for now, old in zip(x[g][i], OLD[g][i], strict=True):
        product *= math.exp(now) / math.exp(old)
    return product ** (1 / len(x[g][i]))


def ratio(x, held, g, i, t, f):
    if f.importance_sampling_level == "token":
        return math.exp(x[g][i][t] - OLD[g][i][t])
    if f.importance_sampling_level == "sequence":
        return sequence_ratio(x, g, i)
    return sequence_ratio(held, g, i) * math.exp(x[g][i][t]) / math.exp(held[g][i][t])


def gain(x, held, g, i, t, f, kept):
    a = ADVANTAGES[g][i] * (KEPT[g][i][t] if kept else 1.0)
    r = ratio(x, held, g, i, t, f)
    if f.loss_type == "cispo":  # the weight is a constant
        return min(ratio(held, held, g, i, t, f), f.epsilon_high) * a * x[g][i][t]
    if f.loss_type == "sapo":
        return sapo(r, a, f)
    return two_sided(r, a, f) if f.delta is not None else ppo(r, a, f)


def paper(x, held, f, masked, kept):
    """The loss of the whole step: sums over groups, completions and tokens, each as it is averaged
    in the paper."""
    left_out = TRUNCATED if masked else []
    completions = [(g, i) for g, group in enumerate(LENGTHS) for i in range(len(group))]
    counted = [place for place in completions if place not in left_out]
    total_tokens = sum(LENGTHS[g][i] for g, i in counted)
    total = 0.0
    for g, i in counted:
        part = 0.0
        for t in range(LENGTHS[g][i]):
            d = REF[g][i][t] - x[g][i][t]
            kl = math.exp(d) - d - 1
            if f.use_bias_correction_kl:  # DeepSeek-V3.2: the ratio is the token's, with a gradient
                kl *= math.exp(x[g][i][t] - OLD[g][i][t])
            part += f.beta * kl - gain(x, held, g, i, t, f, kept)
            part -= f.entropy_coef * ENTROPY[g][i][t]
        if f.loss_type in ("grpo", "sapo"):
            total += part / LENGTHS[g][i] / len(completions)
        elif f.loss_type in ("dapo", "cispo"):
            total += part / total_tokens
        else:
            total += part / LIMIT / len(completions)
    return total


def ours(x, f, masked, kept):
    """(loss, gradient of the log-probs, of the entropies, sums) of `policy_loss` on flat tokens."""
    lengths = torch.tensor(LENGTHS)
    counted = lengths.clone()
    for place in TRUNCATED if masked else []:
        counted[place] = 0
    weights = token_weights(counted, f.loss_type, LIMIT)
    repeat = lengths.flatten()
    logps, entropy = flat(x).requires_grad_(), flat(ENTROPY).requires_grad_()
    tokens = Tokens(
        start=0,
        logps=logps,
        entropy=entropy,
        sampling_logps=flat(OLD),
        old_logps=flat(OLD),
        ref_logps=flat(REF),
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64)
        .flatten()
        .repeat_interleave(repeat),
        weights=weights.flatten().repeat_interleave(repeat),
        kept=flat(KEPT) if kept else None,
        lengths=repeat.tolist(),
    )
    loss, sums = policy_loss(tokens, f)
    loss.backward()
    return loss.item(), logps.grad, entropy.grad, sums


CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "two-sided": {"loss_type": "grpo", "delta": 4.0, "beta": 0.001},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.05},
    "GSPO, two-sided": {"importance_sampling_level": "sequence", "delta": 2.0},
    "GSPO-token": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5, "beta": 0.1},
    "cispo, sequence": {"loss_type": "cispo", "epsilon_high": 1.2, "level": "sequence"},
    "sapo": {"loss_type": "sapo"},
    "sapo, hot": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    "sapo, sequence": {"loss_type": "sapo", "level": "sequence", "beta": 0.1},
    "corrected KL": {"beta": 0.3, "use_bias_correction_kl": True},
    "corrected KL, GSPO": {"level": "sequence", "beta": 0.3, "use_bias_correction_kl": True},
    "corrected KL, two-sided": {"delta": 2.0, "beta": 0.3, "use_bias_correction_kl": True},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.3},
}
for case in CASES.values():
    if "level" in case:
        case["importance_sampling_level"] = case.pop("level")


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_are_the_papers(case, masked):
    f = flags(**CASES[case])
    compare(f, masked, kept=False)


@pytest.mark.parametrize("case", ["dapo", "GSPO-token", "cispo", "sapo"])
def test_tokens_of_low_entropy_have_no_gain_but_their_kl(case):
    """2506.01939: the indicator stands before the min; all tokens stay in the denominator."""
    compare(flags(**CASES[case] | {"beta": 0.1}), masked=True, kept=True)


def compare(f, masked: bool, kept: bool) -> None:
    value, gradient, entropy_gradient, _ = ours(NOW, f, masked, kept)
    assert value == pytest.approx(paper(NOW, NOW, f, masked, kept), abs=1e-12)
    step, largest = 1e-6, 0.0
    for place, (g, i, t) in enumerate(tokens_of(NOW)):
        sides = []
        for sign in (1, -1):
            moved = [[list(c) for c in group] for group in NOW]
            moved[g][i][t] += sign * step
            sides.append(paper(moved, NOW, f, masked, kept))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert gradient[place].item() == pytest.approx(slope, abs=1e-8), (g, i, t)
        largest = max(largest, abs(slope))
        silent = (masked and (g, i) in TRUNCATED) or (g == 2 and not f.beta)
        assert not silent or gradient[place] == 0, "left out, or of a dead group"
    assert largest > 1e-3, "a blunt test"
    if f.entropy_coef:
        weights = token_weights(torch.tensor(LENGTHS), f.loss_type, LIMIT)
        assert masked or entropy_gradient[0].item() == pytest.approx(
            -f.entropy_coef * weights[0, 0].item()
        )
    else:
        assert entropy_gradient is None


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_compared_is_clipped_on_both_sides_and_not(level):
    """Else the cases above would prove little."""
    f = flags(importance_sampling_level=level)
    seen = set()
    for g, i, t in tokens_of(NOW):
        r, a = ratio(NOW, NOW, g, i, t, f), ADVANTAGES[g][i]
        place = "low" if r < 1 - f.epsilon else "high" if r > 1 + f.epsilon_high else "inside"
        seen.add((place, (a > 0) - (a < 0)))
    assert {(p, s) for p in ("low", "high", "inside") for s in (-1, 1)} <= seen, seen
    *_, sums = ours(NOW, flags(delta=4.0), False, False)
    assert sums["clip_ratio/delta_mean"] == 1
    *_, sums = ours(NOW, flags(loss_type="cispo", epsilon_high=1.5), False, False)
    over = [ratio(NOW, NOW, g, i, t, flags()) > 1.5 and ADVANTAGES[g][i] > 0
            for g, i, t in tokens_of(NOW)]  # fmt: skip
    assert sums == {"cispo_clip_ratio": sum(over)} and sum(over)


def test_gspo_and_its_token_variant_have_the_same_gradient_under_one_advantage():
    """GSPO, 2507.18071, section 4.3."""
    both = [flags(importance_sampling_level=level) for level in ("sequence", "sequence_token")]
    (a, grad_a, *_), (b, grad_b, *_) = (ours(NOW, f, True, False) for f in both)
    assert a == pytest.approx(b, abs=1e-14)
    torch.testing.assert_close(grad_a, grad_b, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("loss_type, like", [("cispo", "dapo"), ("sapo", "grpo"), ("grpo", "grpo")])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_where_the_policy_has_not_moved_all_losses_have_one_gradient(loss_type, like, level):
    """What the plan says of the flags about a ratio with --num_iterations 1."""
    gradients = []
    for f in (
        flags(loss_type=loss_type, importance_sampling_level=level, epsilon_high=5.0),
        flags(loss_type=like),
    ):
        gradients.append(ours(OLD, f, True, False)[1])
    torch.testing.assert_close(*gradients, atol=1e-15, rtol=1e-12)


def test_a_completion_that_is_cut_is_refused():
    x = torch.zeros(5)
    for lengths in (None, [2, 2]):
        with pytest.raises(AssertionError, match="whole completions"):
            importance_ratio(x, x, "sequence", lengths)
    with pytest.raises(ValueError, match="token, sequence, sequence_token"):
        importance_ratio(x, x, "word")
    assert importance_ratio(x[:0], x[:0], "sequence", []).shape == (0,)  # a filler pack's


def test_the_sequence_ratio_in_float32_is_exact_for_long_completions():
    """4,000 tokens whose log-ratios nearly cancel: the mean of their sum, to a part in 1e6."""
    torch.manual_seed(0)
    x = torch.randn(4000)
    found = importance_ratio(x, torch.zeros(4000), "sequence", [4000])[0]
    assert found.item() == pytest.approx(x.double().mean().exp().item(), rel=1e-6)


# ---- advantages ---------------------------------------------------------------------------------


def test_leave_one_out_equals_a_loop():
    """RLOO, 2402.14740: the baseline of a completion is the mean of the others."""
    rewards = [[1.0, 0.0, 2.0, 1.0], [0.3, 0.9, 0.1, 0.2], [0.1, 0.1, 0.1, 0.1]]
    expected = [
        [r - sum(row[:i] + row[i + 1 :]) / (len(row) - 1) for i, r in enumerate(row)]
        for row in rewards
    ]
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), "none", "rloo")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not found[2].any()
    with pytest.raises(ValueError, match="grpo, rloo"):
        group_advantages(torch.zeros(1, 2), "none", "reinforce")


def test_decoupled_normalization_equals_a_loop():
    """GDPO, 2601.05242: each reward by its group, weighted and summed, then by the step."""
    torch.manual_seed(0)
    terms = torch.randint(0, 3, (4, 5, 3)).double()
    terms[1, :, 0] = 0.1  # a reward that is the same for all of a group
    terms[2] = 0.1  # a group whose rewards are all equal
    weights = [1.0, 0.5, 2.0]
    summed = numpy.zeros((4, 5))
    for b in range(4):
        for k, weight in enumerate(weights):
            column = terms[b, :, k].numpy()
            if column.max() > column.min():
                scale = column.std(ddof=1) + 1e-4
                summed[b] += weight * (column - column.mean()) / scale
    expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    found = gdpo_advantages(terms, weights)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-12, rtol=1e-12)
    assert not found[2].any(), "exactly 0, so --beta 0 drops the group"
    # two sums are equal and GRPO cannot tell them apart; GDPO can, for the spreads differ
    pair = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]])
    grpo, gdpo = group_advantages(pair.sum(2)), gdpo_advantages(pair, [1.0, 1.0])
    assert grpo[0, 0] == grpo[0, 1] and gdpo[0, 1] - gdpo[0, 0] > 0.1
    # but where all sums of a group are equal, the parts cancel: exactly 0 and not rounding
    assert not gdpo_advantages(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]), [1, 1]).any()
    assert not gdpo_advantages(torch.ones(2, 3, 2), [1.0, 1.0]).any()


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.37, 1.0])
def test_the_entropy_threshold_is_numpys_quantile(rho):
    torch.manual_seed(0)
    entropies = torch.rand(101)
    expected = numpy.quantile(entropies.double().numpy(), 1 - rho)
    threshold = entropy_threshold(entropies, rho).item()
    assert threshold == pytest.approx(expected)
    assert (entropies >= threshold).sum().item() == pytest.approx(max(1, 101 * rho), abs=1)
