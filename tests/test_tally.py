"""What a step's tokens add up to: grpo/tally.py."""

from types import SimpleNamespace

import pytest
import torch

from grpo.logps import Tokens
from grpo.pack import filler
from grpo.ranks import Ranks
from grpo.tally import Tally

CONFIG = SimpleNamespace(beta=0.1, kl_estimator="k1")
ALONE = Ranks(0, 1, torch.device("cpu"))


def tokens(entropy) -> Tokens:
    logps = torch.tensor([-1.0, -2.0, -3.0])
    return Tokens(0, logps, entropy, logps - 0.25, None, logps - 0.5, torch.ones(3), torch.ones(3))


def stats() -> dict:
    return {"clip_low": torch.tensor(0), "clip_high": torch.tensor(3), "kl": torch.tensor(1.5)}


def test_means_are_over_tokens():
    tally = Tally(CONFIG)
    for _ in range(2):
        tally.add(filler(), tokens(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(0.5), stats())
    tally.updates = 1
    metrics = tally.metrics(ALONE, [])
    assert metrics["loss"] == 1.0 and metrics["entropy"] == 2.0
    assert metrics["kl"] == 0.5 and metrics["clip_ratio/high_mean"] == 1.0
    assert tally.drift == pytest.approx(0.25) and tally.is_finite()


def test_a_loss_over_all_log_probs_at_once_has_no_entropy_and_may_meet_a_filler():
    """`pack_logps` returns no entropy, and nothing at all for a pack without completions."""
    tally, none = Tally(CONFIG), torch.zeros(0)
    tally.add(filler(), tokens(None), torch.tensor(0.5), stats())
    empty = Tokens(0, none, None, none, None, none, none, none)
    tally.add(filler(), empty, torch.tensor(0.0), {name: torch.tensor(0) for name in stats()})
    tally.updates = 1
    metrics = tally.metrics(ALONE, [])
    assert "entropy" not in metrics and metrics["kl"] == 0.5 and metrics["loss"] == 0.5
