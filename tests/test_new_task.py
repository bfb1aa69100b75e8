"""docs/new-task.md: the diff makes a third script, which trains and learns to count."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import train_det
from tests.runs import ROOT, module_of, read_lines, train

PAGE = (ROOT / "docs" / "new-task.md").read_text()
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """train_count.py, as the page makes it."""
    folder = tmp_path_factory.mktemp("task")
    shutil.copy(ROOT / "train_cls.py", folder)
    subprocess.run(["git", "apply", "-"], input=DIFF, cwd=folder, text=True, check=True)
    script = module_of(folder / "train_count.py")
    script.DEMO = train_det.DEMO
    return script


def test_the_loop_is_train_cls_s_to_the_letter(script):
    source = (ROOT / "train_cls.py").read_text()
    assert Path(script.__file__).read_text().endswith(source[source.index("def judge(") :])


@pytest.mark.parametrize(
    "completion, found",
    [
        ("<think>a</think><answer>2</answer>", 2),
        ("<think>a</think><answer>No Objects</answer>", 0),
        ("<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>", 1),
        ("<answer>two</answer>", None),
        ("<answer>-1</answer>", None),
        (f"<answer>{'9' * 5000}</answer>", None),
        ("2", None),
    ],
)
def test_what_counts_as_a_number(script, completion, found):
    assert script.number(completion) == found


def test_it_learns_to_count(script, tmp_path):
    """With the flags of the page, half as many prompts and steps. At this temperature half of the
    answers are broken or wrong at first."""
    command = re.search(r"torchrun train_count\.py (.*) --output_dir", PAGE)[1].split()
    flags = [*command, "--prompts_per_step", "4", "--max_steps", "20", "--eval_samples", "12"]
    steps = train(tmp_path / "run", *flags, script=script)
    earned = [step["reward"] for step in steps[1:]]
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.15
    assert "eval/count" in steps[0]
    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    for line in completions:
        assert line["truth"] in ("0", "1", "2")
        assert (line["rewards"]["count"] == 1) == ("count" not in line["reasons"])
    assert "wrong number" in {line["reasons"].get("count") for line in completions}
