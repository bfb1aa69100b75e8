"""Solutions as they lie on disks: what the scripts make of files with them.

Notations by themselves are in test_det_rewards.py, frames in test_frames.py.
"""

import contextlib
import io
import json

import datasets
import pytest
from PIL import Image

import train_cls
import train_det
from data.errors import UserError
from data.load import load
from rewards.boxes import corners_of
from rewards.notations import read_solution
from tests.runs import SHORT, read_lines, train


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said_of(folder, script, table, size=(64, 48), flags=()) -> str:
    """What a script says of rows in a file: its plan, or why it refuses them."""
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(table):
        Image.new("RGB", size, (9 * number, 90, 20)).save(folder / f"{number}.jpg")
        table[number] = {"image": f"{number}.jpg", **row}
    (folder / "train.json").write_text(json.dumps(table))
    argv = ["--model_name_or_path", str(script.DEMO.parent / "checkpoint"), "--dry_run"]
    argv += ["--dataset_name", str(folder), "--output_dir", str(folder / "run"), *flags]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            assert script.main(argv) == 0
        except UserError as error:
            return str(error)
    return out.getvalue()


def asked(*solutions, problem="Find the cup") -> list[dict]:
    return [{"problem": problem, "solution": solution} for solution in solutions]


def answered(answer, columns=("conversations", "from", "value")) -> list[dict]:
    turns, by, text = columns
    names = ("human", "gpt") if by == "from" else ("user", "assistant")
    said = ("<image>Find the cup", answer)
    return [{turns: [{by: name, text: t} for name, t in zip(names, said, strict=True)]}] * 4


TOKENS = "<|box_start|>(101,201),(350,666)<|box_end|>"
BOX = "<answer>[{'Position': [%s], 'Confidence': 1}]</answer>"
TWO = '[{"bbox_2d":[4,5,240,300],"label":"cup"},{"bbox_2d":[300,5,500,400],"label":"vase"}]'
TO_DET = "a grounding solution, and so do all 4 rows"
SMALL, VGA = (64, 48), (640, 480)
# the script, the rows, their images' size, what the script says
DISKS = {
    "tokens": (train_det, answered(TOKENS), SMALL, "read as corners x1, y1, x2, y2, "),
    "tokens, messages": (
        train_det,
        answered(
            f"<|object_ref_start|>cup<|object_ref_end|>{TOKENS}", ("messages", "role", "content")
        ),
        SMALL,
        "4 solutions, such as '<|object_ref_start|>cup<|object_ref_end|>",
    ),
    "tokens, cls": (train_cls, answered(TOKENS), SMALL, TO_DET),
    "four numbers": (train_det, asked(*["4,5,24,30"] * 4), SMALL, "are four numbers: read as"),
    "four numbers, cls": (train_cls, asked(*["0,5,24,30"] * 4), SMALL, TO_DET),
    "tag": (
        train_det,
        asked(*["<box>[[101,201,350,666]]</box>"] * 4),
        SMALL,
        "task      grounding",
    ),
    "nested text": (train_det, asked(*["[[4, 5, 24, 30]]"] * 4), SMALL, "task      grounding"),
    "nested list": (train_det, asked(*[[[4, 5, 24, 30]]] * 4), SMALL, "task      grounding"),
    "objects": (
        train_det,
        asked(*[[{"bbox_2d": [4, 5, 24, 30], "label": "cup"}]] * 4),
        SMALL,
        "task      boxes",
    ),
    "one object": (train_det, asked(*[{"bbox_2d": [4, 5, 24, 30]}] * 4), SMALL, "task      boxes"),
    "vlm-r1": (
        train_det,
        answered([4.5, 5, 24, 30]),
        SMALL,
        "pixels guessed by --data_frame auto: boxes of 4 of 4 rows fit it, and thousandths, too",
    ),
    "words": (
        train_det,
        asked(*[[0.0, 0.0, 640.0, 480.0]] * 4, problem="Give the box in pixels"),
        VGA,
        "solutions count pixels of the image; answers must count pixels",
    ),
    "columns": (
        train_det,
        [row | {"width": 640, "height": 480} for row in asked(*[[9, 9, 64, 48]] * 4)],
        VGA,
        "pixels by --data_frame auto: the columns width and height hold its size",
    ),
    "1001": (
        train_det,
        asked(*[BOX % "500, 500, 900, 900"] * 3, BOX % "500, 500, 1001, 900"),
        VGA,
        ": 1 bad row\n  row 3 (DATA/3.jpg): box 1 of 1, [500, 500, 1001, 900], is outside its "
        "frame, 1000 x 1000 (thousandths by --data_frame auto: as pixels, 3 of 4 rows reach out of",
    ),
    "swapped": (
        train_det,
        asked(*[BOX % "500, 100, 600, 200"] * 3, BOX % "600, 200, 500, 100"),
        VGA,
        ": 1 bad row\n  row 3 (DATA/3.jpg): box 1 of 1, [600, 200, 500, 100], has x1 >= x2",
    ),
    "labels": (
        train_det,
        asked(*[TWO] * 4, problem="Find cups and vases"),
        VGA,
        "labels are not read: boxes of 4 rows have several, such as row 0 with cup, vase",
    ),
    "unknown": (
        train_det,
        asked(*["<loc0123><loc0200><loc0500><loc0600> cup"] * 4),
        SMALL,
        "is not read: it is PaliGemma's <loc> tokens, which count 1024ths with y before x; one box "
        "is read as <answer>(101,201),(350,666)</answer>",
    ),
    "numbers": (train_cls, asked(0, 1, 2.0, True), SMALL, "4 rows to train on"),
    "no numbers": (
        train_cls,
        asked(0, 1, float("nan"), None),
        SMALL,
        ": 2 bad rows\n  row 2 (DATA/2.jpg): solution is 'nan'; give the row a solution as text, "
        "or remove it\n  row 3 (DATA/3.jpg): solution is empty",
    ),
}


@pytest.mark.parametrize("name", DISKS)
def test_solutions_are_read_or_named(tmp_path, name):
    script, table, size, expected = DISKS[name]
    found = said_of(tmp_path / "set", script, [dict(row) for row in table], size)
    assert expected.replace("DATA", str(tmp_path / "set")) in found, found


def test_numbers_are_their_text_in_every_table(tmp_path):
    solutions = [3, 2.5, 7.0, True, -1, 10**400]
    texts = ["3", "2.5", "7", "true", "-1", str(10**400)]
    image = {"image": "0.png", "problem": "How many?"}
    (tmp_path / "0.png").write_bytes(b"is looked for, and not opened")
    rows = [
        {**image, "solution": solution, "width": 10**400, "height": 1} for solution in solutions
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert [row.solution for row in load(str(tmp_path), "train")] == texts
    for name, values in (("ints", [3, -1]), ("floats", [2.5, 7.0]), ("bools", [True, True])):
        table = datasets.Dataset.from_list([{**image, "solution": value} for value in values])
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
        found = [row.solution for row in load(str(tmp_path / f"{name}.parquet"), "train")]
        assert found == [texts[solutions.index(value)] for value in values]
    boxes = (
        [{"bbox_2d": [4, 5, 24, 30], "label": "cup"}],
        [{"bbox_2d": [1, 2, 3, 4], "label": None}],
    )
    table = datasets.Dataset.from_list([{**image, "solution": list(each)} for each in boxes])
    table.to_parquet(str(tmp_path / "boxes.parquet"))
    found = [row.solution for row in load(str(tmp_path / "boxes.parquet"), "train")]
    assert [corners_of(read_solution(text).text) for text in found] == [
        [(4, 5, 24, 30)],
        [(1, 2, 3, 4)],
    ]
    talk = {
        "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": 7.0}]
    }
    (tmp_path / "talk.jsonl").write_text(json.dumps({"image": "0.png", **talk}))
    assert load(str(tmp_path / "talk.jsonl"), "train")[0].solution == "7"


def test_boxes_in_another_notation_train_in_our_form(tmp_path):
    """All that a run reads and writes is in one form: rewards, truth, report."""
    table = asked(*[f"<ref>cup</ref>{tag}" for tag in ["<box>[[1,2,300,400]]</box>"] * 4])
    argv = [*SHORT, "--max_steps", "1", "--beta", "0"]
    assert "note" not in said_of(tmp_path / "set", train_det, table, (112, 112))
    lines = train(
        tmp_path / "run", *argv, "--dataset_name", str(tmp_path / "set"),
        "--model_name_or_path", str(train_det.DEMO.parent / "checkpoint"), script=train_det,
    )  # fmt: skip
    assert "rewards/giou/mean" in lines[0]
    for line in read_lines(tmp_path / "run" / "completions.jsonl"):
        assert line["truth"] == "(1,2),(300,400)"
