"""Data that a script refuses before a weight is loaded."""

import json
from types import SimpleNamespace

import pytest

import grpo.engine.load
import train_cls
import train_det
from data.errors import RewardFault, UserError
from data.kinds import refuse_other_task
from rewards.parse import ideal_completion
from tests.runs import CHECKPOINT, SHORT, Checked, detection_set, train


def test_the_other_script_s_data_is_refused_before_a_weight_is_loaded(tmp_path, monkeypatch):
    """The report that the project exists for, both ways round, and a mixture."""
    flowers = tmp_path / "flowers"
    boxes = tmp_path / "boxes"
    for folder in (flowers, boxes):
        folder.mkdir()
        detection_set(folder)
    table = json.loads((boxes / "train.json").read_text())
    plain = [{**table[0], "solution": "<answer>garden phlox</answer>"}]
    (flowers / "train.json").write_text(json.dumps(plain))
    for script, other, folder in (
        (train_cls, "train_det.py", boxes),
        (train_det, "train_cls.py", flowers),
    ):
        monkeypatch.setattr(
            grpo.engine.load, "load_weights", lambda *a: pytest.fail("weights were loaded")
        )
        argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(folder)]
        with pytest.raises(ValueError) as caught:
            script.main([*argv, "--beta", "0.1"])
        message = str(caught.value)
        assert "row 0" in message and "a.png" in message
        assert f"torchrun {other} {' '.join(argv)} --beta 0.1" in message
        own = {train_cls: ["--answer_match=exact"], train_det: ["--iou_threshold", "0.6"]}[script]
        with pytest.raises(ValueError) as caught:
            script.main([*argv, *own, "--beta", "0.1"])
        message, flag = str(caught.value), own[0].split("=")[0]
        assert f"(without {flag}, which it does not know)" in message
        assert f"torchrun {other} {' '.join(argv)} --beta 0.1" in message


@pytest.mark.parametrize("script", [train_cls, train_det])
@pytest.mark.parametrize(
    "kinds", [("class", "boxes"), ("class", "grounding"), ("boxes", "grounding")], ids="-".join
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_mixture_names_the_first_row_of_each_kind(script, kinds, turned, tmp_path):
    detection_set(tmp_path)
    (row,) = json.loads((tmp_path / "train.json").read_text())[:1]
    solutions = {
        "class": "<answer>garden phlox</answer>",
        "boxes": row["solution"],
        "grounding": "<answer>(10,10),(200,300)</answer>",
    }
    one, two = reversed(kinds) if turned else kinds
    table = [{**row, "solution": solutions[kind]} for kind in (one, one, two)]
    (tmp_path / "train.json").write_text(json.dumps(table))
    with pytest.raises(ValueError) as caught:
        script.main(["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path)])
    message = str(caught.value)
    assert "2 kinds: row 0 (" in message and f", a {one} solution (2 rows); row 2 (" in message
    assert f", a {two} solution (1 rows)" in message and "torchrun" not in message


@pytest.mark.parametrize(
    "kinds, trains, messages",
    [
        (["count", "count"], ("count",), None),
        ([], ("count",), None),
        (
            ["class", "class"],
            ("count",),
            [
                "a class solution, and so do all 2 rows; this script trains count solutions",
                "Run instead (without --most, which it does not know):\n",
                "\n  torchrun train_cls.py --a b",
            ],
        ),
        (
            ["count", "count"],
            ("boxes", "grounding"),
            ["trains boxes or grounding solutions", "Train count solutions by a script of its own"],
        ),
        (
            ["count", "boxes"],
            ("count",),
            ["Make a data set of each kind: count for a script of its own, boxes for train_det.py"],
        ),
    ],
)
def test_a_third_task_is_told_apart_too(kinds, trains, messages):
    """Its kinds need not stand in the table of scripts."""
    row = SimpleNamespace(index=0, where="a.png", solution="<answer>3</answer>", found="")
    rows = Checked([row, row])
    argv = ["--most", "5", "--a", "b"]
    if messages is None:
        refuse_other_task(rows, kinds, trains, {"most"}, argv)
        return
    with pytest.raises(UserError) as caught:
        refuse_other_task(rows, kinds, trains, {"most"}, argv)
    for message in messages:
        assert message in str(caught.value)


def test_a_solution_that_earns_less_than_everything_is_named(tmp_path):
    solution = "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 0.5}]</answer>"
    detection_set(tmp_path, solution)
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path)]
    with pytest.raises(ValueError, match=r"row 0 .*earns confidence 0\.500 of 1"):
        train_det.main(argv)


def test_long_prompts_are_named_and_never_cut(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 .*84 tokens.*--max_prompt_length \(50\)"):
        train(tmp_path / "run", *SHORT, "--max_prompt_length", "50")


def test_a_reward_that_is_not_finite_is_named(tmp_path, monkeypatch):
    score = train_cls.score

    def broken(completion, example, *rest):
        nan = float("nan") if completion != ideal_completion(example.solution) else 1.0
        return {**score(completion, example, *rest), "format": nan}

    monkeypatch.setattr(train_cls, "score", broken)
    with pytest.raises(RewardFault, match=r"(?s)'format' is nan.*completion:\n.*<think>"):
        train(tmp_path / "run", *SHORT)
