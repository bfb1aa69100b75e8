"""Prompts dealt to ranks, and what comes back: grpo/rollout.py."""

import random
from types import SimpleNamespace

import pytest
import torch

from grpo.engine.ranks import Ranks
from grpo.pack import assign
from grpo.reward import Record
from grpo.rollout import Group, Rollout, dealing_order


def shares(lengths: list[int], world: int) -> list[list[int]]:
    order = dealing_order(lengths, world)
    return [order[rank::world] for rank in range(world)]


def imbalance(lengths: list[int], shares: list[list[int]]) -> float:
    loads = [sum(lengths[index] for index in share) for share in shares]
    return max(loads) * len(loads) / sum(loads)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_every_prompt_is_dealt_once_and_ranks_get_as_many_as_before(world, count):
    lengths = [random.Random(i).randrange(1, 2000) for i in range(count)]
    dealt = shares(lengths, world)
    assert sorted(index for share in dealt for index in share) == list(range(count))
    assert [len(share) for share in dealt] == [len(range(r, count, world)) for r in range(world)]


@pytest.mark.parametrize("lengths", [[74] * 11, [70, 81, 66, 90, 77]])
def test_prompts_of_about_one_length_stay_in_order(lengths):
    assert dealing_order(lengths, 2) == list(range(len(lengths)))


def test_the_load_of_mixed_lengths_is_more_even():
    """Mean over 200 draws: max / mean of the ranks' tokens, dealt one by one and by length."""
    chance, one_by_one, by_length = random.Random(0), 0.0, 0.0
    for _ in range(200):
        lengths = [chance.choice([100, 200, 300, 500, 900]) + 800 for _ in range(16)]
        one_by_one += imbalance(lengths, [list(range(rank, 16, 8)) for rank in range(8)]) / 200
        by_length += imbalance(lengths, shares(lengths, 8)) / 200
    assert by_length - 1 < 0.6 * (one_by_one - 1)


def record(row: int, reward: float) -> Record:
    return Record(row, "", None, "", {"accuracy": reward}, {}, reward, row + 1, False)


class Two(Ranks):
    """One of two ranks whose `gather` is given the other's share."""

    def gather(self, items):
        self.share = items
        return self.answer


@pytest.mark.parametrize("lengths", [[74] * 4, [900, 100, 120, 950], [100, 900, 100]])
def test_groups_and_records_meet_again_after_dealing(lengths):
    rows = [SimpleNamespace(index=10 + i, dataset="") for i in range(len(lengths))]
    config = SimpleNamespace(
        prompts_per_step=len(rows),
        dynamic_sampling=False,
        max_sampling_rounds=1,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        advantage_estimator="grpo",
    )
    rollouts = [Rollout(Two(rank, 2, torch.device("cpu")), config, {}) for rank in range(2)]
    dealt = [
        [
            Group(f"prompt {row.index}", [], row=row, number=number)
            for number, row in rollout.deal(rows, lengths)
        ]
        for rollout in rollouts
    ]
    answer = [None] * len(rows)
    for rank, groups in enumerate(dealt):
        for group in groups:
            group.records = [record(group.row.index, 0.0), record(group.row.index, 1.0)]
        answer[rank::2] = [group.records for group in groups]
    for rollout, groups in zip(rollouts, dealt, strict=True):
        assert [10 + group.number for group in groups] == [group.row.index for group in groups]
        rollout.ranks.answer = answer
        rollout.add(groups)
        assert not rollout.missing and [group.row for group in rollout.groups] == rows
        assert [group.records[0].row for group in rollout.groups] == [row.index for row in rows]
        table = torch.arange(len(rows) * 2).view(-1, 2)
        teaches = SimpleNamespace(beta=0.1)  # all of them
        mine = assign(rollout.groups, teaches, advantages=table, weights=10 * table)
        assert {id(group) for group in mine} == {id(group) for group in groups}
        for group in rollout.groups:
            assert (group.rank == rollout.ranks.rank) == (group.prompt is not None)
            assert group.advantages.tolist() == table[group.number].tolist()
            assert group.weights.tolist() == (10 * table[group.number]).tolist()
    numbers = [group.number for groups in dealt for group in groups]
    assert sorted(numbers) == list(range(len(rows)))


@pytest.mark.parametrize(
    "weights, kept", [((1.0, 1.0), [0, 1]), ((1.0, 0.0), [0, 2]), ((0.0, 1.0), [0, 1, 2])]
)
def test_decoupled_rewards_teach_if_any_that_counts_differs(weights, kept):
    """GDPO: equal sums may have advantages; parts that cancel and a weight of 0 have none."""
    config = SimpleNamespace(
        prompts_per_step=3,
        dynamic_sampling=True,
        max_sampling_rounds=2,
        multi_objective_aggregation="normalize_then_sum",
    )
    earned = [[(1, 0), (0, 1), (0, 0)], [(1, 0), (1, 1), (1, 1)], [(1, 0), (0, 1), (1, 0)]]
    judged = [
        [Record(i, "", None, "", dict(zip("ab", r, strict=True)), {}, sum(r), 1, False) for r in rs]
        for i, rs in enumerate(earned)
    ]
    named = dict(zip("ab", weights, strict=True))
    rollout = Rollout(Ranks(0, 1, torch.device("cpu")), config, named)
    rows = [SimpleNamespace(index=i, dataset="") for i in range(3)]
    dealt = rollout.deal(rows, [1, 1, 1])
    rollout.add(
        [
            Group("", [], row=row, number=number, records=records)
            for (number, row), records in zip(dealt, judged, strict=True)
        ]
    )
    assert [group.number for group in rollout.groups] == kept and rollout.missing == 3 - len(kept)
    expected = [[list(map(float, r)) for r in earned[i]] for i in kept]
    assert rollout.terms.tolist() == expected
