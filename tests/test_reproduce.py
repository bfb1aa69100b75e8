"""Visual-RFT's table: its rule beside ours in one evaluation, and docs/reproduce.md."""

import re

import pytest

import train_cls
from grpo.rollout import Group
from models.processor import Processor
from rewards.cls import visual_rft_accuracy
from tests.runs import read_lines

# ---- both rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, counts",
    [
        ("<think>a</think><answer>rose</answer>", 1.0),
        ("<answer>not a daisy, a rose</answer>", 1.0),
        ("<answer>rose garden</answer>", 1.0),
        ("<answer>R_O se</answer>", 1.0),
        ("<answer>o</answer>", 1.0),
        ("<answer></answer>", 1.0),
        ("<answer> _ </answer>", 1.0),
        ("<think>it is never closed <answer>rose</answer>", 1.0),
        ("<think><answer>rose</answer></think><answer>daisy</answer>", 1.0),
        ("<answer>rose</answer><answer>daisy</answer>", 1.0),
        ("<answer>\nrose</answer><answer>rose</answer>", 1.0),
        ("<answer>daisy</answer><answer>rose</answer>", 0.0),
        ("<answer>\nrose\n</answer>", 0.0),
        ("<answer>daisy</answer>", 0.0),
        ("<answer>r\tose</answer>", 0.0),
        ("<answer>rose", 0.0),
        ("</answer>rose<answer>", 0.0),
        ("rose", 0.0),
        ("", 0.0),
    ],
)
def test_what_the_published_evaluation_counts(completion, counts):
    assert visual_rft_accuracy(completion, "<answer>rose</answer>") == counts
    assert visual_rft_accuracy(completion.replace("rose", "Red_Rose"), "red rose") == counts
    # as its script does it: a search in the text, and an error where nothing is found
    found = re.search(r"<answer>(.*?)</answer>", completion)
    answer = found and found.group(1).replace(" ", "").replace("_", "").lower()
    assert counts == (answer is not None and ("rose" in answer or answer in "rose"))


ANSWERS = {  # what is answered where {} is right -> whether it counts: exactly, and as published
    "<think>a</think><answer>{}</answer>": (1, 1),
    "<think>a</think><answer>not a daisy, a {}</answer>": (0, 1),
    "<think>a</think><answer>{} garden</answer>": (0, 1),
    "<think>a</think><answer></answer>": (0, 1),
    "<think>a <answer>{}</answer>": (0, 1),
    "<think>a</think><answer>no flower</answer>": (0, 0),
    "{}": (0, 0),
}


def evaluated(monkeypatch, folder, *flags) -> tuple[dict, list[dict]]:
    """The metrics and answers of an evaluation of the demo whose model answers ANSWERS."""
    texts = list(ANSWERS)
    said = {}

    def sample(model, draws, *_):
        groups = []
        for draw in draws:
            number = len(said)
            said[number] = texts[number].format(train_cls.truth(draw.row, None))
            groups.append(Group(None, [[number]], truncated=[False], row=draw.row))
        return groups

    monkeypatch.setattr(train_cls, "sample_groups", sample)
    monkeypatch.setattr(Processor, "completion_text", lambda self, ids: said[ids[0]])
    few = ["--eval_only", "--eval_samples", str(len(texts)), *flags]
    assert train_cls.main([*few, "--output_dir", str(folder)]) == 0
    (line,) = read_lines(folder / "metrics.jsonl")
    return line, read_lines(folder / "eval-0.jsonl")


def test_one_evaluation_counts_both_rules(monkeypatch, tmp_path, capsys):
    line, answers = evaluated(monkeypatch, tmp_path / "run")
    assert line["eval/accuracy"] == pytest.approx(1 / 7)
    assert line["eval/accuracy_visual_rft"] == pytest.approx(5 / 7)
    assert "eval/accuracy_exact" not in line, "it is what is paid for"
    for answer, counts in zip(answers, ANSWERS.values(), strict=True):
        assert (answer["rewards"]["accuracy"], *answer["measured"].values()) == counts
    out = capsys.readouterr().out
    assert re.search(r"held out: accuracy 0\.143 .* accuracy_visual_rft 0\.714", out)


def test_where_the_published_rule_is_paid_for_the_exact_one_is_measured(monkeypatch, tmp_path):
    """The reward mends the published rule: what is empty, or in a thought, earns nothing."""
    line, answers = evaluated(monkeypatch, tmp_path / "run", "--answer_match", "visual_rft")
    assert line["eval/accuracy"] == pytest.approx(3 / 7)
    assert line["eval/accuracy_exact"] == pytest.approx(1 / 7)
    assert line["eval/accuracy_visual_rft"] == pytest.approx(5 / 7)
    assert answers[1]["measured"] == {"accuracy_visual_rft": 1.0, "accuracy_exact": 0.0}
