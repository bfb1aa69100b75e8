"""What a step's tokens add up to: grpo/tally.py."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from grpo.engine.ranks import Ranks
from grpo.loss import Tokens
from grpo.pack import filler
from grpo.rollout import Group
from grpo.tally import Tally


def flags(**changes) -> SimpleNamespace:
    return SimpleNamespace(num_iterations=1, num_minibatches=1, **changes)


CONFIG = flags(beta=0.1, kl_estimator="k1")
ALONE = Ranks(0, 1, torch.device("cpu"))


def tokens(entropy) -> Tokens:
    logps = torch.tensor([-1.0, -2.0, -3.0])
    return Tokens(0, logps, entropy, logps - 0.25, None, logps - 0.5, torch.ones(3), torch.ones(3))


def stats() -> dict:
    counts = {"clip_ratio/low_mean": torch.tensor(0), "clip_ratio/high_mean": torch.tensor(3)}
    return counts | {"kl": torch.tensor(1.5)}


def test_means_are_over_tokens():
    tally = Tally(CONFIG)
    for _ in range(2):
        tally.add(filler(), tokens(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(0.5), stats())
    tally.grad_norms = [0.5]
    metrics = tally.metrics(ALONE)
    assert metrics["loss"] == 1.0 and metrics["entropy"] == 2.0
    assert metrics["kl"] == 0.5 and metrics["clip_ratio/high_mean"] == 1.0
    assert tally.drift == pytest.approx(0.25) and tally.is_finite()
    tally.grad_norms.append(0.5)
    assert tally.metrics(ALONE)["loss"] == 0.5, "the mean over the updates"


def test_a_pack_without_completions_counts_nothing():
    tally, none = Tally(CONFIG), torch.zeros(0)
    tally.add(filler(), tokens(torch.ones(3)), torch.tensor(0.5), stats())
    empty = Tokens(0, none, none, none, None, none, none, none)
    tally.add(filler(), empty, torch.tensor(0.0), {name: torch.tensor(0) for name in stats()})
    tally.grad_norms = [0.5]
    metrics = tally.metrics(ALONE)
    assert metrics["entropy"] == 1.0 and metrics["kl"] == 0.5 and metrics["loss"] == 0.5


def test_what_a_loss_counts_is_what_is_logged():
    """CISPO's own count, SAPO's none; and nothing to count where nothing was trained on."""
    for counts in ({"cispo_clip_ratio": torch.tensor(1)}, {}):
        tally = Tally(flags(beta=0.0, kl_estimator="k3"))
        tally.add(filler(), tokens(torch.ones(3, requires_grad=True)), torch.tensor(0.5), counts)
        tally.grad_norms = [0.5]
        assert not tally.sums["entropy"].requires_grad, "it would keep the pass's memory"
        metrics = tally.metrics(ALONE)
        assert metrics.keys() - {
            "loss",
            "grad_norm",
            "entropy",
            "sampling/logp_difference_max",
        } == {*counts}
        assert all(metrics[name] == pytest.approx(1 / 3) for name in counts)
    tally = Tally(flags(beta=0.0, kl_estimator="k3"))
    tally.grad_norms = [0.5]
    assert tally.metrics(ALONE).keys() == {"loss", "grad_norm", "sampling/logp_difference_max"}


def test_the_largest_kl_is_of_the_first_pass_and_the_drift_of_the_first_update():
    """With mini-batches the first pass is several updates, each of other tokens."""
    tally = Tally(flags(beta=0.1, kl_estimator="k1"))
    records = [SimpleNamespace(completion=f"text {n}") for n in range(3)]
    processor = SimpleNamespace(decode=lambda ids: f"token {int(ids)}")
    group = Group(None, [], records=records)
    # two updates a pass, though --num_minibatches would make more of more groups; in the second
    # pass others meet
    for members, apart in (([0, 2], 0.5), ([1], 3.0), ([2, 1], 9.0)):
        n = members[0]
        pack = filler()
        pack.targets, pack.lengths = torch.tensor([n]), [1] + [0] * (len(members) - 1)
        pack.completions = [(group, member) for member in members]
        logps = torch.tensor([-1.0])
        one = Tokens(0, logps, logps, logps - apart, None, logps - apart, logps, logps)
        tally.add(pack, one, torch.tensor(0.0), {"kl": torch.tensor(apart)})
        tally.grad_norms.append(1.0)
    assert tally.largest_kl(ALONE, processor) == (3.0, "token 1", "text 1")
    assert tally.drift == 0.5


def test_ranks_that_work_in_turn_are_not_even():
    """In each of two updates one of two ranks waits for the other."""

    class Two(Ranks):
        def gather(self, items: list) -> list:
            (mine,) = items
            return [mine, Counter({1: mine[0]}) if isinstance(mine, Counter) else mine]

    for groups, uneven in ((1, 2), (2, 1)):
        tally, none = Tally(flags(beta=0.0, kl_estimator="k3")), torch.zeros(0)
        pack = filler()
        pack.lengths = [0]
        for update in range(2):
            if update < groups:
                tally.add(pack, Tokens(0, *[none] * 7), torch.tensor(0.0), {})
            tally.grad_norms.append(1.0)
        ranks = Two(0, 2, torch.device("cpu"))
        if groups == 2:
            ranks.gather = lambda items: items * 2
        assert tally.metrics(ranks)["ranks/load_imbalance"] == uneven
