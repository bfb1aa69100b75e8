"""What a step's tokens add up to: grpo/tally.py."""

from types import SimpleNamespace

import pytest
import torch

from grpo.engine.ranks import Ranks
from grpo.loss import Tokens
from grpo.pack import filler
from grpo.tally import Tally

CONFIG = SimpleNamespace(beta=0.1, kl_estimator="k1")
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
    tally.updates = 1
    metrics = tally.metrics(ALONE)
    assert metrics["loss"] == 1.0 and metrics["entropy"] == 2.0
    assert metrics["kl"] == 0.5 and metrics["clip_ratio/high_mean"] == 1.0
    assert tally.drift == pytest.approx(0.25) and tally.is_finite()


def test_a_pack_without_completions_counts_nothing():
    tally, none = Tally(CONFIG), torch.zeros(0)
    tally.add(filler(), tokens(torch.ones(3)), torch.tensor(0.5), stats())
    empty = Tokens(0, none, none, none, None, none, none, none)
    tally.add(filler(), empty, torch.tensor(0.0), {name: torch.tensor(0) for name in stats()})
    tally.updates = 1
    metrics = tally.metrics(ALONE)
    assert metrics["entropy"] == 1.0 and metrics["kl"] == 0.5 and metrics["loss"] == 0.5


def test_what_a_loss_counts_is_what_is_logged():
    """CISPO's own count, SAPO's none; and nothing to count where nothing was trained on."""
    for counts in ({"cispo_clip_ratio": torch.tensor(1)}, {}):
        tally = Tally(SimpleNamespace(beta=0.0, kl_estimator="k3"))
        tally.add(filler(), tokens(torch.ones(3, requires_grad=True)), torch.tensor(0.5), counts)
        tally.updates = 1
        assert not tally.sums["entropy"].requires_grad, "it would keep the pass's memory"
        metrics = tally.metrics(ALONE)
        assert metrics.keys() - {
            "loss",
            "grad_norm",
            "entropy",
            "sampling/logp_difference_max",
        } == {*counts}
        assert all(metrics[name] == pytest.approx(1 / 3) for name in counts)
    tally = Tally(SimpleNamespace(beta=0.0, kl_estimator="k3"))
    tally.updates = 1
    assert tally.metrics(ALONE).keys() == {"loss", "grad_norm", "sampling/logp_difference_max"}
