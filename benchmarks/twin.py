"""Our side of the peer's run in benchmarks/learn.py: the data, the script's evaluate() on the
peer's weights, and checks that its inputs, sampled tokens and numbers are those of this trainer."""

import importlib
import itertools
from dataclasses import replace

import torch

from grpo.engine.optimizer import Optimizer, learning_rate
from grpo.engine.ranks import start
from grpo.flags.parser import parse_config
from grpo.logps import pack_chunks, pack_logps
from grpo.loss import group_advantages, policy_loss, token_weights
from grpo.pack import make_packs
from grpo.rollout import Group
from grpo.run.checks import named_weights
from grpo.run.data import load_data
from grpo.run.metrics import held_out_metrics
from grpo.tally import Tally
from models.load import load_model
from models.names import parameter_name


class Twin:
    """What a script's train() has before its first step, and a model for the peer's weights.

    script: the module's name. argv: its flags. latest: the peer's latest step, as its reward
    functions and its model got it: `fed` (the model's inputs), `texts`, `ids`, `rows` (numbers of
    data rows).
    """

    step = 0

    def __init__(self, script: str, argv: list[str]):
        self.script = importlib.import_module(script)
        self.config, _ = parse_config(self.script.Config, argv, self.script.DEMO)
        self.ranks = start(self.config.timeout)
        self.data = load_data(self.config, self.ranks)
        self.folder, self.rows = self.data.folder, self.data.rows
        self.processor, task = (
            self.data.processor,
            self.script.read_task(self.config, self.data, argv),
        )
        weights = named_weights(self.script.score, self.rows[0], task, self.config)
        self.task = replace(task, reward_weights=weights)
        self.model, self.reference = (load_model(self.folder, torch.float32, "cpu") for _ in "12")
        self.model.frozen_vision = self.reference.frozen_vision = False
        self.optimizer = Optimizer(self.model, self.config.weight_decay)
        self.latest: dict = {}

    def score(self, text: str, number: int) -> dict[str, float]:
        return self.script.score(text, self.rows[number], self.task)

    # What evaluate() asks of a run, besides config, ranks and step.

    def phase(self, name: str) -> None:
        pass

    def report_evaluation(self, records, drawn, more=None, files=None) -> None:
        self.found = held_out_metrics(records) | (more or {})

    # What the peer's run asks.

    def take(self, peer) -> None:
        """Copies the weights of transformers' model."""
        missing = dict(self.model.named_parameters())
        for key, tensor in peer.state_dict().items():
            if (name := parameter_name(key)) in missing:
                missing.pop(name).data.copy_(tensor)
        assert not missing, f"the peer lacks {', '.join(missing)}"

    def measure(self, peer) -> dict:
        """The held-out metrics of the peer's model."""
        self.take(peer)
        self.model.suppressed_ids = torch.tensor(self.processor.suppressed_ids)
        self.script.evaluate(self, self.task, self.model, self.data)
        return self.found

    def check_inputs(self) -> None:
        """Asserts that the peer's model got our token ids and pixels."""
        fed = self.latest["fed"]
        prompts = [self.rows[number].prompt(self.processor) for number in self.latest["rows"]]
        for ids, mask, prompt in zip(fed["input_ids"], fed["attention_mask"], prompts, strict=True):
            assert ids[mask.bool()].tolist() == prompt.input_ids.tolist(), "other token ids"
        for name in ("pixel_values", "image_grid_thw"):
            expected = torch.cat([getattr(prompt, name) for prompt in prompts])
            torch.testing.assert_close(fed[name], expected, atol=1e-5, rtol=0)

    def check_weights(self, peer) -> None:
        """Asserts that the steps repeated here have led to the peer's weights."""
        own, start = (dict(m.named_parameters()) for m in (self.model, self.reference))
        own = {name: weight.detach().clone() for name, weight in own.items()}
        self.take(peer)
        there = dict(self.model.named_parameters())
        apart, way = (
            sum((there[name] - weight).square().sum().item() for name, weight in other.items())
            for other in (own, start)
        )
        assert apart <= 1e-6 * way, f"squared distances: {apart} between them, {way} of the way"

    def check_texts(self) -> None:
        """Asserts that the peer's texts are ours, and that it sampled none of the tokens that are
        never sampled here."""
        ids = self.latest["ids"]
        assert self.latest["texts"] == [self.processor.completion_text(one) for one in ids]
        assert not {*self.processor.suppressed_ids} & {*itertools.chain(*ids)}

    def take_rollout(self) -> None:
        """Makes the groups of the peer's latest rollout, with all that its updates need.

        Weights are TRL's: the whole rollout's, times its updates. With --loss_type dapo or cispo an
        update's loss is therefore divided by the rollout's mean number of tokens an update, here by
        its own. No token is suppressed, as the peer's log-probs include all of them."""
        config, ids, rows = self.config, self.latest["ids"], self.latest["rows"]
        weights = self.task.reward_weights
        pairs = zip(self.latest["texts"], rows, strict=True)
        earned = [[weights[k] * v for k, v in self.score(*pair).items()] for pair in pairs]
        size, self.groups, self.model.suppressed_ids = config.num_generations, [], None
        for first in range(0, len(ids), size):
            prompt, some = self.rows[rows[first]].prompt(self.processor), ids[first : first + size]
            self.groups.append(Group(prompt, some, [torch.zeros(len(one)) for one in some]))
        rewards = torch.tensor(earned, dtype=torch.float64).sum(1).view(-1, size)
        advantages = group_advantages(rewards, config.scale_rewards)
        lengths = torch.tensor([len(one) for one in ids]).view(-1, size)
        weights = token_weights(lengths, config.loss_type, config.max_completion_length)
        for group, earned, weight in zip(self.groups, advantages, weights, strict=True):
            group.advantages, group.weights = earned, config.num_minibatches * weight
        with torch.no_grad():
            for pack in make_packs(self.groups, config.tokens_per_pack):
                pack.store("ref_logps", pack_logps(self.reference, pack, config.temperature))
                if config.updates_per_step > 1:
                    pack.store("old_logps", pack_logps(self.model, pack, config.temperature))

    def repeat(self, step: int, update: int, numbers: list[int]) -> dict:
        """Repeats an update of the peer. Returns loss, KL, entropy and gradient norm.

        step: from 1; update: of the step, from 0. numbers: of the completions, in the rollout; the
        peer deals them singly, not by groups."""
        config, size = self.config, self.config.num_generations
        members = [[n % size for n in numbers if n // size == i] for i in range(len(self.groups))]
        groups = [part(*pair) for pair in zip(self.groups, members, strict=True) if pair[1]]
        self.model.suppressed_ids, tally = None, Tally(config)
        for pack in make_packs(groups, config.tokens_per_pack):
            for tokens in pack_chunks(self.model, pack, config.temperature):
                loss, stats = policy_loss(tokens, config)
                loss.backward()
                tally.add(pack, tokens, loss, stats)
        rate = learning_rate(config, step, config.max_steps, update)
        tally.grad_norms.append(self.optimizer.step(rate, config.max_grad_norm))
        found = tally.metrics(self.ranks)
        return {name: found[name] for name in ("loss", "kl", "entropy", "grad_norm")}


def part(group: Group, members: list[int]) -> Group:
    """A group of these completions of `group` alone."""
    kept = {"advantages": group.advantages[members], "weights": group.weights[members]}
    for name in ("completion_ids", "sampling_logps", "ref_logps", "old_logps"):
        if (values := getattr(group, name)) is not None:
            kept[name] = [values[member] for member in members]
    return replace(group, **kept)
