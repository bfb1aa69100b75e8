"""The updates of a run, and the same updates made again in float64, one completion at a time.

`record` trains by the script's own main() and keeps what each rank saw; `Replay` makes the same
updates from the checkpoint that the run began with: a copy of the prompt and its image for each
completion, dense logits, PyTorch's AdamW. Of the run it takes what was sampled and which groups
shared an update, nothing else.
"""

import os
from pathlib import Path

import torch

import train_cls
from grpo.engine.optimizer import Optimizer
from models.load import load_model
from models.processor import Processor
from models.qwen_vl import image_features
from tests.runs import CHECKPOINT


def record(folder: str, *argv: str) -> None:
    """Trains, and writes rank-N.pt to `folder`: this rank's groups by (step, number), and of each
    update its step, the numbers of its groups on all ranks, its rate, its gradient's norm and, on
    one rank, the weights after it."""
    groups, updates = {}, []
    minibatches, step_of = train_cls.minibatches, Optimizer.step

    def noted(all_groups, config, step):
        for group in all_groups:
            if group.prompt is not None:
                groups[step, group.number] = {
                    "row": group.row,
                    "ids": group.completion_ids,
                    "rewards": [record.reward for record in group.records],
                    "truncated": group.truncated,
                }
        for part in minibatches(all_groups, config, step):
            updates.append({"step": step, "groups": [group.number for group in part]})
            updates[-1]["ranks"] = [group.rank for group in part]
            yield part

    def stepped(optimizer, rates, *arguments):
        norm = step_of(optimizer, rates, *arguments)
        update = next(update for update in updates if "norm" not in update)
        update |= {"rate": rates["learning_rate"], "norm": norm}
        if not torch.distributed.is_initialized():
            masters = optimizer.masters.items()
            update["weights"] = {n: m.detach().clone() for n, m in masters}
        return norm

    train_cls.minibatches, Optimizer.step = noted, stepped
    try:
        assert train_cls.main(["--output_dir", f"{folder}/run", *argv]) == 0
    finally:
        train_cls.minibatches, Optimizer.step = minibatches, step_of
    rank = os.environ.get("RANK", "0")
    torch.save({"groups": groups, "updates": updates}, f"{folder}/rank-{rank}.pt")


def recorded(folder: Path) -> tuple[dict, list[dict]]:
    """The groups of all ranks, and the updates, which must be the same on all."""
    found = [torch.load(path, weights_only=False) for path in sorted(folder.glob("rank-*.pt"))]
    groups = {key: group for of_rank in found for key, group in of_rank["groups"].items()}
    assert len(groups) == sum(len(of_rank["groups"]) for of_rank in found)
    for other in found[1:]:
        assert other["updates"] == found[0]["updates"]
    return groups, found[0]["updates"]


class Replay:
    """The policy, its reference and AdamW in float64; flags by name."""

    def __init__(self, beta=0.04, level="token", corrected=False, masked=False):
        self.beta, self.level, self.corrected, self.masked = beta, level, corrected, masked
        self.policy, self.reference = (
            load_model(CHECKPOINT, torch.float64, "cpu") for _ in range(2)
        )
        self.processor, self.prompts = Processor(CHECKPOINT), {}
        self.never = self.processor.suppressed_ids
        self.adamw = torch.optim.AdamW(self.policy.parameters(), weight_decay=0.0)

    def logps(self, model, row, ids: list[int]) -> torch.Tensor:
        """Of one completion, (C,) nats."""
        if row.index not in self.prompts:
            self.prompts[row.index] = row.prompt(self.processor)
        prompt = self.prompts[row.index]
        steps = torch.arange(len(ids)) + prompt.next_position
        positions = torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1)
        tokens = torch.cat([prompt.input_ids, torch.tensor(ids)])
        features = image_features(model, [prompt])
        hidden = model(tokens, positions, model.bounds([(len(tokens),)]), features)
        logits = hidden[len(prompt) - 1 : -1] @ model.head_weight.T
        logits[:, self.never] = float("-inf")
        return logits.log_softmax(1)[torch.arange(len(ids)), torch.tensor(ids)]

    def begin(self, groups: list[dict]) -> None:
        """Before a step's first update: advantages, old and reference log-probs of all groups."""
        for group in groups:
            rewards = torch.tensor(group["rewards"], dtype=torch.float64)
            group["advantages"] = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            for name, model in (("old", self.policy), ("ref", self.reference)):
                with torch.no_grad():
                    group[name] = [self.logps(model, group["row"], ids) for ids in group["ids"]]

    def update(self, groups: list[dict], rate: float) -> float:
        """One update of DAPO's loss over these groups; returns the gradient's norm."""
        self.adamw.zero_grad()
        left_out = [[self.masked and cut for cut in group["truncated"]] for group in groups]
        count = sum(
            len(ids)
            for group, out in zip(groups, left_out, strict=True)
            for ids, skip in zip(group["ids"], out, strict=True)
            if not skip
        )
        for group, out in zip(groups, left_out, strict=True):
            for i, ids in enumerate(group["ids"]):
                if out[i]:
                    continue
                logps, advantage = (
                    self.logps(self.policy, group["row"], ids),
                    group["advantages"][i],
                )
                own = (logps - group["old"][i]).exp()
                ratio = own
                if self.level == "sequence":
                    ratio = (logps - group["old"][i]).mean().exp().expand(len(ids))
                d = group["ref"][i] - logps
                kl = (d.exp() - d - 1) * (own if self.corrected else 1)
                gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                ((self.beta * kl - gain).sum() / count).backward()
        for parameter in self.policy.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        return norm.item()
