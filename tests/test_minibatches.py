"""Several updates a rollout: which groups share one, and that each is exactly what it should be."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_cls
from grpo.engine.optimizer import Optimizer
from grpo.pack import assign, completion_lengths, minibatches
from grpo.rollout import Group
from grpo.tally import Tally
from tests import forked
from tests.ranks import in_turn
from tests.replay import Replay, record, recorded
from tests.runs import SHORT, assert_resumes, read_lines, read_steps, train


def flags(**changes) -> SimpleNamespace:
    known = {"num_minibatches": 1, "num_iterations": 1, "seed": 0, "beta": 0.0}
    return SimpleNamespace(**(known | {"entropy_coef": 0.0} | changes))


def groups_of(ranks: int, count: int, dead: set[int] = frozenset()) -> list[Group]:
    """Of `count` prompts, dealt to the ranks one by one; those in `dead` have no advantages."""
    groups = []
    for number in range(count):
        advantages = torch.zeros(4) if number in dead else torch.tensor([1.0, -1.0, 0.0, 0.0])
        group = Group("" if number % ranks == 0 else None, [], number=number, rank=number % ranks)
        group.advantages = advantages
        groups.append(group)
    return groups


def even(counts: list[int]) -> bool:
    return max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_even_in_groups_in_those_that_teach_and_in_those_of_each_rank(seed):
    chance = random.Random(seed)
    ranks, count = chance.choice([1, 2, 3, 8]), chance.randint(1, 40)
    dead = {n for n in range(count) if chance.random() < chance.choice([0.0, 0.5])}
    parts, passes = chance.randint(1, count), chance.choice([1, 2])
    beta = chance.choice([0.0, 0.1])  # with a KL term every group has a gradient
    config = flags(num_minibatches=parts, num_iterations=passes, seed=seed, beta=beta)
    found = list(minibatches(groups_of(ranks, count, dead), config, 7))
    numbers = [[group.number for group in part] for part in found]
    assert all(part == sorted(part) for part in numbers), "as they came"
    used = max(1, min(parts, count - len(dead)))  # a part without a gradient makes no update
    used = parts if beta else used
    assert len(found) == passes * used
    for start in range(0, len(found), used):
        drawn = numbers[start : start + used]
        together = Counter(number for part in drawn for number in part)
        assert set(together.values()) <= {1} and set(range(count)) - dead <= set(together)
        assert used < parts or set(together) == set(range(count))
        teaching = [[n for n in part if n not in dead] for part in drawn]
        assert even([len(part) for part in drawn]) and even([len(part) for part in teaching])
        for rank in range(ranks):
            assert even([sum(n % ranks == rank for n in part) for part in teaching])
    again = list(minibatches(groups_of(ranks, count, dead), config, 7))
    assert [[group.number for group in part] for part in again] == numbers


def test_the_order_is_another_in_each_pass_step_and_run():
    def parts(step=1, **changes):
        config = flags(num_minibatches=4, num_iterations=2, **changes)
        found = minibatches(groups_of(2, 16), config, step)
        return [[group.number for group in part] for part in found]

    first = parts()
    kinds = [first[:4], first[4:], parts(step=2)[:4], parts(seed=1)[:4]]
    assert len({str(kind) for kind in kinds}) == 4
    assert all(sorted(sum(kind, [])) == list(range(16)) for kind in kinds)


def test_one_part_is_the_rollout_as_it_came_dead_or_not():
    """Also where no group has a gradient: AdamW's moments move the weights all the same."""
    for dead in (set(), {0, 3}, {0, 1, 2, 3}):
        groups = groups_of(1, 4, dead)
        assert list(minibatches(groups, flags(), 1)) == [groups]
    cut = list(minibatches(groups_of(1, 4, {0, 1, 2, 3}), flags(num_minibatches=2), 1))
    assert len(cut) == 1
    with_kl = list(minibatches(groups_of(1, 4, {0, 1}), flags(num_minibatches=4, beta=0.1), 1))
    assert [len(part) for part in with_kl] == [1, 1, 1, 1], "the KL term is a gradient"


def test_a_rank_trains_on_its_own_groups_that_have_a_gradient():
    groups = groups_of(2, 6, {2})
    table = torch.arange(24.0).view(6, 4)
    mine = assign(groups, flags(), weights=table)
    assert [group.number for group in mine] == [0, 4]
    assert all(group.weights.tolist() == table[group.number].tolist() for group in groups)
    everything = assign(groups, flags(beta=0.1), weights=table)
    assert [group.number for group in everything] == [0, 2, 4]


def test_masked_completions_have_no_length():
    records = [SimpleNamespace(tokens=n, truncated=n == 9) for n in (3, 9)]
    groups = [Group(None, [], records=records), Group(None, [], records=records[::-1])]
    config = SimpleNamespace(mask_truncated_completions=False)
    assert completion_lengths(groups, config).tolist() == [[3, 9], [9, 3]]
    config.mask_truncated_completions = True
    assert completion_lengths(groups, config).tolist() == [[3, 0], [0, 3]]


def test_the_norm_that_is_logged_is_the_mean_over_the_last_pass():
    config = SimpleNamespace(num_iterations=2, num_minibatches=2, beta=0.0, kl_estimator="k3")
    tally = Tally(config)
    tally.grad_norms += [8.0, 9.0, 1.0, 3.0]
    assert tally.updates == 4 and tally.grad_norm == 2
    tally.grad_norms[3] = float("inf")
    assert not tally.grad_norm < float("inf")


MORE = ["--num_generations", "4", "--max_completion_length", "40", "--eval_samples", "2"]
MORE += ["--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--warmup_ratio", "0"]
MORE += ["--seed", "1"]
CUT = ["--prompts_per_step", "4", "--num_minibatches", "3"]
RUNS = {  # steps, flags, and the reference's
    "two passes, corrected KL, masked": (
        2,
        ["--num_iterations", "2", "--tokens_per_pack", "120", "--use_bias_correction_kl"]
        + ["--mask_truncated_completions", "--max_completion_length", "27", "--beta", "0.5"],
        {"corrected": True, "masked": True, "beta": 0.5},
    ),
    "no reference": (1, ["--beta", "0"], {"beta": 0.0}),
    "GSPO": (1, ["--importance_sampling_level", "sequence"], {"level": "sequence"}),
}


def check(groups: dict, updates: list[dict], least: int, **reference) -> Replay:
    """Makes the updates again: the norm of each gradient, and the weights where they were kept."""
    replay, step = Replay(**reference), 0
    for update in updates:
        if update["step"] != step:
            step = update["step"]
            replay.begin([group for (of, _), group in groups.items() if of == step])
        start = {n: p.detach().clone() for n, p in replay.policy.named_parameters()}
        part = [groups[step, number] for number in update["groups"]]
        norm = replay.update(part, update["rate"])
        assert update["norm"] == pytest.approx(norm, rel=2e-3, abs=1e-5), update
        if "weights" in update:
            check_weights(replay, start, update["weights"])
    assert len(updates) == least and max(update["norm"] for update in updates) > 0.1
    return replay


def check_weights(replay: Replay, start: dict, weights: dict) -> None:
    """What an update moved is what it moved there: of Adam's first steps the signs of the smallest
    gradients are rounding, so they are compared as one vector."""
    apart = way = 0.0
    for name, parameter in replay.policy.named_parameters():
        apart += (weights[name] - parameter).square().sum().item()
        way += (parameter - start[name]).square().sum().item()
    assert apart <= 1e-3 * way, f"{apart} apart after a way of {way}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_each_update_is_that_of_a_float64_reference(tmp_path, name):
    """4 prompts in 3 parts, on one rank: each gradient and the weights after each update."""
    count, argv, reference = RUNS[name]
    record(str(tmp_path), *MORE, *CUT, "--max_steps", str(count), *argv)
    groups, updates = recorded(tmp_path)
    steps = read_steps(tmp_path / "run")
    passes = 2 if "--num_iterations" in argv else 1
    check(groups, updates, steps[-1]["num_updates"], **reference)
    per_step = [update for update in updates if update["step"] == 1]
    assert passes < len(per_step) <= 3 * passes
    norms = [update["norm"] for update in per_step][-(len(per_step) // passes) :]
    assert steps[1]["grad_norm"] == pytest.approx(sum(norms) / len(norms))


@pytest.mark.slow
def test_two_ranks_make_the_updates_of_the_reference(tmp_path):
    """5 prompts in 2 parts: each rank has groups of each part, one more a pass than the other."""
    argv = [*MORE, "--max_steps", "1", "--prompts_per_step", "5", "--num_minibatches", "2"]
    argv += ["--num_iterations", "2", "--tokens_per_pack", "150", "--save_steps", "1"]
    out = forked.ranks(2, tmp_path, in_turn, [["record", [str(tmp_path), *argv]]])
    assert out.codes == [0, 0], out.stderr[-4000:]
    groups, updates = recorded(tmp_path)
    assert len(updates) == 4
    assert all(set(update["ranks"]) == {0, 1} for update in updates)
    start = dict(Replay().policy.named_parameters())
    replay = check(groups, updates, 4)
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    check_weights(replay, start, {name: tensor.double() for name, tensor in saved.items()})


@pytest.mark.slow
def test_a_part_that_fails_ends_the_step_and_is_counted(tmp_path, monkeypatch):
    """The second update's gradient is not finite: the first is kept, the others are not made."""
    calls, step_of = [], Optimizer.step

    def broken(optimizer, *arguments):
        calls.append(optimizer.updates)
        if len(calls) == 2:
            next(iter(optimizer.masters.values())).grad.fill_(float("nan"))
        return step_of(optimizer, *arguments)

    monkeypatch.setattr(Optimizer, "step", broken)
    options = [*SHORT, "--prompts_per_step", "6", "--num_minibatches", "3"]
    lines = train(tmp_path / "run", *options)
    assert calls == [0, 1, 1, 2, 3]
    assert lines[1]["grad_norm"] is None and lines[1]["skipped_steps"] == 1
    assert [line["num_updates"] for line in lines[1:]] == [1, 4]
    # of the last update that was tried: the second of six, and the last
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([2e-4, 4e-5])
    assert read_lines(next((tmp_path / "run").glob("bad-step-1*")))


@pytest.mark.slow
def test_a_run_of_several_updates_that_is_resumed_is_the_run_that_was_never_stopped(tmp_path):
    options = [*SHORT, "--prompts_per_step", "5", "--num_minibatches", "2", "--max_steps", "4"]
    options += ["--warmup_ratio", "0", "--learning_rate", "8e-4", "--dynamic_sampling"]
    lines = train(tmp_path / "run", *options, "--save_steps", "2")
    rates = [line["learning_rate"] for line in lines if "loss" in line]  # of 8 mini-batches
    assert rates == pytest.approx([7e-4, 5e-4, 3e-4, 1e-4]), "those of each step's last update"
    assert_resumes(tmp_path / "run", tmp_path / "again", "checkpoint-4", "final")


def test_more_parts_than_prompts_are_refused():
    with pytest.raises(ValueError, match="--num_minibatches 9 is above --prompts_per_step 8"):
        train_cls.main(["--num_minibatches", "9", "--dry_run"])
