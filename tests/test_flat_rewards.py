"""A flat reward is explained while the run continues."""

import json
import re

import pytest

import train_det
from data.flowers import SPECIES, rows
from tests.runs import CHECKPOINT, SHORT, read_steps, train

pytestmark = pytest.mark.slow


def test_a_flat_reward_is_explained_while_the_run_goes_on(tmp_path, capsys):
    """The drawn scenes, which the flowers' model cannot answer: it says flowers, and why 0."""
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:scenes", *SHORT]
    argv += ["--max_steps", "3", "--diagnose_after", "2", "--output_dir", str(tmp_path / "run")]
    assert train_det.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("diagnosis: iou has been 0, its minimum") == 1
    lines = read_steps(tmp_path / "run")
    assert [line.get("diagnosis/iou/at_minimum") for line in lines] == [None, None, 1, None]
    text = (tmp_path / "run" / "diagnosis.txt").read_text()
    assert "not a list of boxes" in text and "most frequent wrong answers" in text


def test_latin_names_are_found_and_shown_beside_the_classes(tmp_path, capsys):
    """Flowers known by their Latin names, sampled so coldly that no other name is said."""
    table = []
    for number, row in enumerate(rows("train", 12)):
        if not any(name in row["solution"] for name in ("poppy", "sunfl", "butterc", "flax")):
            row["image"].save(tmp_path / f"{number}.png")
            table.append(row | {"image": f"{number}.png"})
    (tmp_path / "train.json").write_text(json.dumps(table))
    options = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    options += ["--temperature", "0.1", "--diagnose_after", "2", "--prompts_per_step", "8"]
    lines = train(tmp_path / "run", *options)
    assert [line["rewards/accuracy/mean"] for line in lines] == [0, 0]
    assert lines[1]["diagnosis/accuracy/at_minimum"] == 1
    said = capsys.readouterr().out
    assert "accuracy has been 0, its minimum, in every completion since step 1" in said
    assert "wrong class 100%" in said and "for `garden phlox`, " in said
    assert "if these are synonyms, pass --aliases" in said
    pairs = re.findall(r"^  `([^`]+)` for `([^`]+)`, \d+ times", said, flags=re.MULTILINE)
    assert len(pairs) >= 5 and set(pairs) <= {(s.latin, s.name) for s in SPECIES}


def test_a_resumed_run_says_its_diagnosis_once(tmp_path):
    """What was said after the checkpoint is said again, and stands in diagnosis.txt once."""
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:scenes", *SHORT]
    argv += ["--max_steps", "3", "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert train_det.main([*argv, "--diagnose_after", "2"]) == 0
    said = (tmp_path / "run" / "diagnosis.txt").read_text()
    resume = str(tmp_path / "run" / "checkpoint-1")
    output = ["--output_dir", str(tmp_path / "run")]
    assert train_det.main(["--resume_from_checkpoint", resume, *output]) == 0
    assert (tmp_path / "run" / "diagnosis.txt").read_text() == said
    assert said.count("iou has been 0, its minimum") == 1
