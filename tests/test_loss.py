"""The loss against float64 double loops, its truth table, the KL estimators by enumeration."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from grpo.loss import (
    CLIPPED,
    KL_ESTIMATORS,
    LOSS_TYPES,
    clipped_gain,
    corrected_kl,
    group_advantages,
    per_token_kl,
    policy_loss,
    token_weights,
)
from grpo.reward import length_penalty, weighted_reward
from tests.tiny import loss_flags, loss_tokens

LENGTHS = [[3, 1, 5], [2, 7, 4]]  # two groups of three completions


def loop_loss(logps, old, ref, advantages, loss_type, low, high, beta, estimator, limit):
    """GRPO as the papers write it: sums over groups, completions and tokens, in Python floats."""
    count = sum(len(group) for group in logps)
    tokens = sum(len(completion) for group in logps for completion in group)
    total = 0.0
    for g, group in enumerate(logps):
        for i, completion in enumerate(group):
            part = 0.0
            for t, logp in enumerate(completion):
                ratio = math.exp(logp - old[g][i][t])
                clipped = min(max(ratio, 1 - low), 1 + high)
                a = advantages[g][i]
                d = ref[g][i][t] - logp
                kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[estimator]
                part += -min(ratio * a, clipped * a) + beta * kl
            if loss_type == "grpo":
                total += part / len(completion) / count
            elif loss_type == "dapo":
                total += part / tokens
            else:
                total += part / limit / count
    return total


def nested(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    return [
        [(-2 + spread * torch.randn(n, generator=generator).double()).tolist() for n in group]
        for group in LENGTHS
    ]


def flat(values):
    tokens = [v for group in values for completion in group for v in completion]
    return torch.tensor(tokens, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_value_and_gradient_equal_a_float64_loop(loss_type, estimator, beta):
    old, ref = nested(0, 0.5), nested(1, 0.5)
    noise = nested(2, 0.4)
    logps = [
        [[o + n + 2 for o, n in zip(a, b, strict=True)] for a, b in zip(x, y, strict=True)]
        for x, y in zip(old, noise, strict=True)
    ]
    advantages = [[0.7, -1.2, 0.5], [-0.4, 1.1, -0.7]]
    arguments = (old, ref, advantages, loss_type, 0.2, 0.3, beta, estimator, 9)
    expected = loop_loss(logps, *arguments)

    lengths = torch.tensor(LENGTHS)
    repeat = lengths.flatten()
    tokens = flat(logps).requires_grad_()
    weights = token_weights(lengths, loss_type, 9).flatten().repeat_interleave(repeat)
    spread = torch.tensor(advantages, dtype=torch.float64).flatten().repeat_interleave(repeat)
    given = loss_tokens(tokens, spread, weights, old_logps=flat(old), ref_logps=flat(ref))
    wanted = {"loss_type": loss_type, "beta": beta, "kl_estimator": estimator}
    loss, _ = policy_loss(given, loss_flags(epsilon=0.2, epsilon_high=0.3, **wanted))
    assert loss.item() == pytest.approx(expected, abs=1e-12)

    loss.backward()
    position = 0
    for g, group in enumerate(logps):
        for i, completion in enumerate(group):
            for t in range(len(completion)):
                step = 1e-6
                sides = []
                for sign in (1, -1):
                    moved = [[list(c) for c in group] for group in logps]
                    moved[g][i][t] += sign * step
                    sides.append(loop_loss(moved, *arguments))
                slope = (sides[0] - sides[1]) / (2 * step)
                assert tokens.grad[position].item() == pytest.approx(slope, abs=1e-8)
                position += 1


def test_without_old_logps_the_ratio_is_one_and_its_gradient_the_advantage():
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.5, -1.5, 0.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    loss, sums = policy_loss(loss_tokens(logps, advantages, weights), loss_flags())
    loss.backward()
    assert torch.equal(logps.grad, -advantages * weights)
    assert sums["clip_ratio/low_mean"] == sums["clip_ratio/high_mean"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, clipped",
    [
        (1.5, 1.0, "high"),  # already more likely than the clip allows: no further
        (1.5, -1.0, None),  # moved the wrong way: full gradient back
        (0.5, -1.0, "low"),
        (0.5, 1.0, None),
        (1.29, 1.0, None),  # inside the wider upper side
        (0.81, -1.0, None),
        (1.0, 1.0, None),
        (1.5, 0.0, None),
        (0.5, 0.0, None),
    ],
)
def test_clip_truth_table(ratio, advantage, clipped):
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    gain, sums = clipped_gain(rho, advantage * torch.ones_like(rho), 0.2, 0.3)
    gain.backward()
    assert rho.grad.item() == (0.0 if clipped else advantage)
    assert sums["clip_ratio/low_mean"].item() == (clipped == "low")
    assert sums["clip_ratio/high_mean"].item() == (clipped == "high")


def test_epsilon_high_defaults_to_epsilon():
    ratio = torch.tensor([1.25], requires_grad=True)
    clipped_gain(ratio, torch.ones(1), epsilon=0.2)[0].backward()
    assert ratio.grad.item() == 0.0


def exact_kl(p, q):
    return (p.exp() * (p - q)).sum()


def test_kl_estimators_by_enumeration():
    """Values and gradients in expectation over a whole small vocabulary (see per_token_kl)."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    sampled_with = logps.detach().exp()
    kl = exact_kl(logps, ref)
    reverse = exact_kl(ref, logps)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    values = {k: (sampled_with * per_token_kl(logps, ref, k)).sum() for k in KL_ESTIMATORS}
    assert values["k1"].item() == pytest.approx(kl.item(), abs=1e-12)
    assert values["k3"].item() == pytest.approx(kl.item(), abs=1e-12)
    assert abs(values["k2"].item() - kl.item()) > 1e-3
    torch.testing.assert_close(gradient(values["k1"]), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(gradient(values["k2"]), gradient(kl))
    torch.testing.assert_close(gradient(values["k3"]), gradient(reverse))
    assert (per_token_kl(logps, ref, "k3") >= 0).all()
    assert not per_token_kl(ref, ref, "k3").any()

    # tokens of another policy, and of this one: with the ratio both give the KL and its gradient
    another = torch.randn(7, dtype=torch.float64).log_softmax(0)
    for old in (another, logps.detach()):
        for name in ("k1", "k3"):
            corrected = corrected_kl(per_token_kl(logps, ref, name), logps, old)
            value = (old.exp() * corrected).sum()
            assert value.item() == pytest.approx(kl.item(), abs=1e-12)
            torch.testing.assert_close(gradient(value), gradient(kl))
    plain = (another.exp() * per_token_kl(logps, ref, "k3")).sum()
    assert abs(plain.item() - kl.item()) > 0.1, "a blunt test"


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_a_loop(scale):
    rewards = [[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.3, 0.9, 0.1, 0.2]]
    everything = [r for row in rewards for r in row]
    expected = []
    for row in rewards:
        mean = statistics.mean(row)
        std = {"group": statistics.stdev(row), "batch": statistics.stdev(everything)}.get(scale)
        expected.append([(r - mean) / (std + 1e-4) if std else r - mean for r in row])
    result = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e30, 1.1, 0.0, -2 / 3])
def test_equal_rewards_give_exactly_zero(scale, value):
    """0.1 summed three times and divided by three is not 0.1: a float mean would leave crumbs."""
    rewards = torch.tensor([[value] * 7, [0.0, 1.0] * 3 + [0.5]])
    assert not group_advantages(rewards, scale)[0].any()
    assert group_advantages(rewards, scale)[1].any()


def test_bad_rewards_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[0.0, float("inf")]]))
    with pytest.raises(ValueError, match="group, batch, none"):
        group_advantages(torch.zeros(1, 2), "std")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1", [1.0]])
def test_a_reward_that_is_no_number_names_itself(bad):
    weights = {"accuracy": 1.0, "format": 1.0}
    with pytest.raises(ValueError, match=r"'format' is .*, not a finite float or int"):
        weighted_reward({"accuracy": 1.0, "format": bad}, weights)
    for wrong, said in (
        (None, "None, not a dict"),
        ([1.0], "not a dict"),
        ({"accuracy": 1}, r"returned \['accuracy'\], where \['accuracy', 'format'\]"),
        ({"accuracy": 1, "fmt": 1}, r"returned \['accuracy', 'fmt'\]"),
        ({"accuracy": 1.7e308, "format": 1.7e308}, "sum of .* is inf"),
    ):
        with pytest.raises(ValueError, match=said):
            weighted_reward(wrong, weights)


def test_rewards_find_their_weights_by_name():
    weights = {"accuracy": 2.0, "format": 0.5}
    assert weighted_reward({"accuracy": 1.0, "format": 0.5}, weights) == 2.25
    assert weighted_reward({"format": 0.5, "accuracy": 1.0}, weights) == 2.25


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="grpo, dapo, dr_grpo"):
        token_weights(torch.tensor([1]), "ppo", 1)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        per_token_kl(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_weights_of_a_step_sum_to_one(loss_type):
    lengths = torch.tensor(LENGTHS)
    assert (token_weights(lengths, loss_type, 99) * lengths).sum().item() == pytest.approx(1)


def limits(overlong_buffer: int) -> SimpleNamespace:
    return SimpleNamespace(max_completion_length=100, overlong_buffer=overlong_buffer)


@pytest.mark.parametrize(
    "tokens, penalty", [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (120, -1)]
)
def test_the_soft_overlong_punishment(tokens, penalty):
    """DAPO, eq. 13, with a limit of 100 and a buffer of 20."""
    assert length_penalty(tokens, limits(20)) == pytest.approx(penalty)
    assert length_penalty(tokens, limits(0)) == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_completions_of_length_0_are_left_out(loss_type):
    weights = token_weights(torch.tensor([[3, 0], [0, 5]]), loss_type, 9)
    assert weights[0, 1] == weights[1, 0] == 0 and (weights[[0, 1], [0, 1]] > 0).all()
    assert not token_weights(torch.zeros(2, 2, dtype=torch.int64), loss_type, 9).any()
