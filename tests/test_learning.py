"""The demos learn, and learn from the rewards."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

import train_cls
from data.flowers import SPECIES
from data.load import load
from rewards.cls import accuracy_reward
from rewards.det import iou_reward
from tests.runs import read_lines, read_steps, train

pytestmark = pytest.mark.slow

# a tenth of the demo's steps, at two and a half times its rate
BRIEFLY = ["--max_steps", "10", "--learning_rate", "5e-4", "--eval_samples", "96"]


def held_out_accuracy(folder: Path, step: int) -> float:
    answers = read_lines(folder / f"eval-{step}.jsonl")
    return sum(accuracy_reward(a["completion"], a["truth"]) for a in answers) / len(answers)


def test_the_demo_learns(tmp_path):
    """README quotes the whole."""
    lines = train(tmp_path / "run", *BRIEFLY)
    before, after = lines[0]["eval/accuracy"], lines[-1]["eval/accuracy"]
    assert before == held_out_accuracy(tmp_path / "run", 0) <= 0.45
    assert after == held_out_accuracy(tmp_path / "run", 10) > before + 0.2
    assert lines[-1]["eval/format"] >= 0.95
    known = {s.look for s in SPECIES}
    answers = read_lines(tmp_path / "run" / "eval-10.jsonl")
    readable = [a for a in answers if any(look in a["completion"] for look in known)]
    assert len(readable) >= 0.95 * len(answers), "the reasoning is no longer readable"


def test_the_detection_demo_learns(boxes):
    """A tenth of the demo's steps; README quotes the whole."""
    before, after = (read_steps(boxes)[i] for i in (0, -1))
    for step, line in ((0, before), (12, after)):
        answers = read_lines(boxes / f"eval-{step}.jsonl")
        scenes = load("demo:scenes", "test")
        rewards = [iou_reward(a["completion"], scenes[a["row"]].solution) for a in answers]
        assert line["eval/iou"] == pytest.approx(sum(rewards) / len(rewards))
    assert after["eval/iou"] > 1.5 * before["eval/iou"] > 0.3
    assert after["eval/AP50"] > before["eval/AP50"] + 0.2
    assert after["eval/format"] >= 0.95


def test_shuffled_rewards_teach_nothing(tmp_path, monkeypatch):
    """The same steps, each completion paid what some completion so far has earned, by chance.

    Adam's steps are as long as ever, so the policy drifts; true rewards give 0.4 more. For
    detection, whose drift is larger, see benchmarks/shuffled.py.
    """
    true_judge, pool, chance = train_cls.judge, [], random.Random(1)

    def shuffled(*arguments):
        groups, *_ = arguments
        true_judge(*arguments)
        pool.extend(record.reward for group in groups for record in group.records)
        for group in groups:
            group.records = [replace(r, reward=chance.choice(pool)) for r in group.records]

    monkeypatch.setattr(train_cls, "judge", shuffled)
    lines = train(tmp_path / "run", *BRIEFLY)
    assert abs(lines[-1]["eval/accuracy"] - lines[0]["eval/accuracy"]) <= 0.1
