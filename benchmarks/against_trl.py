"""Each loss here and TRL's `GRPOTrainer._compute_loss` on the same tensors: value and gradient.

    pip install -e ".[bench]"
    python benchmarks/against_trl.py

TRL's method runs as it is, on a stand-in for the trainer that gives it log-probs and entropies, one
micro-batch, one process. It averages over that micro-batch; here a batch is a whole update, so the
two agree. What TRL computes otherwise is printed beside each line:

* entropy bonus: TRL takes the mean over tokens for every loss type; here it has the loss's own
  weights, as the KL term has (the same for dapo and cispo).
* top entropy: TRL counts all tokens of the batch for its threshold, here those with an advantage.
* dr_grpo, grpo, sapo and truncated completions: both count a completion that is left out in N.
* KL with the ratio: TRL takes the ratio of --importance_sampling_level, here it is the token's own,
  which is what the paper's equation has. So with `sequence` the two differ; the line is marked, and
  not part of what must agree.
"""

import importlib.metadata
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import stand_in_for_torchvision
from grpo.flags.config import TrainingConfig
from grpo.loss import Tokens, entropy_threshold, policy_loss, token_weights

LENGTHS, LIMIT = (3, 1, 5, 9, 2, 7, 4, 6), 9
CASES = {  # flags, all under TRL's names
    "grpo": "loss_type=grpo",
    "dapo": "loss_type=dapo epsilon_high=0.28",
    "dr_grpo": "loss_type=dr_grpo beta=0.04",
    "two-sided": "loss_type=grpo delta=2.5 beta=0.001",
    "GSPO": "loss_type=grpo importance_sampling_level=sequence epsilon=0.0003 epsilon_high=0.0004",
    "GSPO, wide": "loss_type=dapo importance_sampling_level=sequence beta=0.04",
    "cispo": "loss_type=cispo epsilon_high=1.5 beta=0.04",
    "cispo, sequence": "loss_type=cispo epsilon_high=1.2 importance_sampling_level=sequence",
    "sapo": "loss_type=sapo",
    "sapo, sequence": "loss_type=sapo importance_sampling_level=sequence beta=0.04",
    "entropy bonus, dapo": "loss_type=dapo entropy_coef=0.1",
    "entropy bonus, cispo": "loss_type=cispo epsilon_high=5.0 entropy_coef=0.1",
    "top entropy": "loss_type=dapo top_entropy_quantile=0.2 beta=0.04",
    "top entropy, cispo": "loss_type=cispo epsilon_high=5.0 top_entropy_quantile=0.3",
    "KL with ratio": "loss_type=dapo beta=0.04 use_bias_correction_kl=1",
    "KL with ratio, grpo": "loss_type=grpo beta=0.04 use_bias_correction_kl=1",
    "KL with ratio, two-sided": "loss_type=grpo delta=1.5 beta=0.04 use_bias_correction_kl=1",
    "KL with ratio, cispo": "loss_type=cispo epsilon_high=1.5 beta=0.04 use_bias_correction_kl=1",
    "KL with ratio, sapo": "loss_type=sapo beta=0.04 use_bias_correction_kl=1",
    "KL with ratio, GSPO": "loss_type=grpo importance_sampling_level=sequence beta=0.04 "
    "use_bias_correction_kl=1",
}
DIFFERENT = ("KL with ratio, GSPO",)


def values(text: str) -> dict:
    pairs = dict(word.split("=") for word in text.split())
    kinds = TrainingConfig.__dataclass_fields__
    return {k: v if kinds[k].type is str else float(v) for k, v in pairs.items()}


def tensors(masked: bool) -> dict[str, torch.Tensor]:
    """(N, L) numbers in float64, and the mask of completion tokens; ratios from 0.3 to 4."""
    torch.manual_seed(0)
    n, longest = len(LENGTHS), max(LENGTHS)
    lengths = torch.tensor(LENGTHS)
    old = -2 + 0.5 * torch.randn(n, longest, dtype=torch.float64)
    advantages = torch.randn(n, dtype=torch.float64)
    advantages[2] = 0.0
    mask = (torch.arange(longest) < lengths[:, None]).long()
    if masked:
        mask[3] = 0
    return {
        "old": old,
        "logps": old + 0.5 * torch.randn(n, longest, dtype=torch.float64),
        "ref": old + 0.5 * torch.randn(n, longest, dtype=torch.float64),
        "entropy": torch.rand(n, longest, dtype=torch.float64),
        "advantages": advantages,
        "mask": mask,
        "tokens": (torch.arange(longest) < lengths[:, None]),
    }


def theirs(flags: TrainingConfig, data: dict) -> tuple[float, torch.Tensor, torch.Tensor]:
    from trl import GRPOTrainer

    logps, entropy = (data[name].clone().requires_grad_() for name in ("logps", "entropy"))
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    high = flags.epsilon if flags.epsilon_high is None else flags.epsilon_high
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=flags.top_entropy_quantile,
        off_policy_mask_threshold=None,
        importance_sampling_level=flags.importance_sampling_level,
        beta=flags.beta,
        args=SimpleNamespace(
            use_bias_correction_kl=flags.use_bias_correction_kl,
            delta=flags.delta,
            sapo_temperature_pos=flags.sapo_temperature_pos,
            sapo_temperature_neg=flags.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        loss_type=flags.loss_type,
        epsilon_low=flags.epsilon,
        epsilon_high=high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        accelerator=accelerator,
        _entropy_bonus_enabled=flags.entropy_coef != 0,
        entropy_coef=flags.entropy_coef,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
    )
    trainer.accelerator.sync_gradients = True
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    mask, ids = data["mask"], torch.zeros_like(data["mask"])
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    tokens = data["tokens"]
    gradient = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return loss.item(), logps.grad[tokens], gradient[tokens]


def ours(flags: TrainingConfig, data: dict) -> tuple[float, torch.Tensor, torch.Tensor]:
    tokens, lengths = data["tokens"], torch.tensor(LENGTHS)
    counted = lengths * data["mask"].any(1)
    weights = token_weights(counted, flags.loss_type, LIMIT).repeat_interleave(lengths)
    logps, entropy = (data[name][tokens].requires_grad_() for name in ("logps", "entropy"))
    advantages = data["advantages"].repeat_interleave(lengths)
    kept = None
    if flags.top_entropy_quantile < 1:
        some = entropy.detach()[weights > 0]  # all of them, as TRL counts
        kept = (entropy.detach() >= entropy_threshold(some, flags.top_entropy_quantile)).double()
    old, ref = data["old"][tokens], data["ref"][tokens]
    loss, _ = policy_loss(
        Tokens(0, logps, entropy, old, old, ref, advantages, weights, kept, list(LENGTHS)), flags
    )
    loss.backward()
    gradient = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return loss.item(), logps.grad, gradient


def main() -> int:
    stand_in_for_torchvision()
    print(f"TRL {importlib.metadata.version('trl')}; float64; largest differences")
    print(f"{'':36}{'loss':>10}{'value':>10}{'gradient':>10}{'of entropy':>12}")
    worst = 0.0
    for masked in (False, True):
        data = tensors(masked)
        for name, text in CASES.items():
            flags = TrainingConfig(**({"beta": 0.0} | values(text)))
            (a, ga, ea), (b, gb, eb) = ours(flags, data), theirs(flags, data)
            apart = abs(a - b), (ga - gb).abs().max().item(), (ea - eb).abs().max().item()
            differ = name in DIFFERENT
            assert not differ or apart[0] > 1e-6, f"{name} agrees: it is to be compared"
            worst = worst if differ else max(worst, *apart)
            name += ", truncated" * masked
            line = f"{name:36}{b:10.5f}" + "".join(f"{number:10.1e}" for number in apart)
            print(line + "  another ratio" * differ)
    assert worst < 1e-6, worst  # TRL's SAPO has its temperatures in float32
    return 0


if __name__ == "__main__":
    sys.exit(main())
