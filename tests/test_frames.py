"""What coordinates count: solutions from one frame to another, and runs that ask for another."""

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import train_det
from data.load import load
from data.rows import SplitRows
from data.scenes import rows as scenes
from models.processor import Processor
from rewards.boxes import read_boxes, read_grounding
from rewards.coco import average_precision
from rewards.frames import FRAMES, Frames, convert_solution
from rewards.guess import guess_frame
from tests.runs import CHECKPOINT, SHORT, Checked, data_of, read_lines, said, save_turned

MAX_PIXELS = 100 * 28 * 28
# By hand: an upright image's (width, height); at 100 tokens of 28 x 28 at most the model sees it at
# (width, height); one box, in each frame.
WORKED = {
    (640, 480): (
        (308, 224),
        {
            "thousandths": (250, 125, 750, 1000),
            "pixels": (160, 60, 480, 480),
            "resized": (77, 28, 231, 224),
        },
    ),
    (300, 900): (
        (140, 476),
        {
            "thousandths": (100, 500, 550, 750),
            "pixels": (30, 450, 165, 675),
            "resized": (14, 238, 77, 357),
        },
    ),
    (1600, 200): (
        (784, 84),
        {
            "thousandths": (375, 250, 1000, 500),
            "pixels": (600, 50, 1600, 100),
            "resized": (294, 21, 784, 42),
        },
    ),
    (84, 112): (  # is not resized
        (84, 112),
        {
            "thousandths": (250, 625, 750, 875),
            "pixels": (21, 70, 63, 98),
            "resized": (21, 70, 63, 98),
        },
    ),
}


def boxes(*corners) -> str:
    each = [f"{{'Position': {list(c)}, 'Confidence': 1.0}}" for c in corners]
    return f"<answer>[{', '.join(each)}]</answer>"


def grounding(x1, y1, x2, y2) -> str:
    return f"<answer>({x1},{y1}),({x2},{y2})</answer>"


@pytest.fixture(scope="module")
def processor():
    return Processor(CHECKPOINT, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", WORKED)
def test_a_box_in_each_frame_by_hand(tmp_path, processor, size, orientation):
    """Of an image as a camera stores it, turned: frames are those of the upright image."""
    resized, worked = WORKED[size]
    save_turned(Image.new("RGB", size, "gray"), orientation, tmp_path / "0.png")
    table = [{"image": "0.png", "problem": "Find it.", "solution": boxes(worked["pixels"])}]
    (tmp_path / "train.json").write_text(json.dumps(table))
    (row,) = load(str(tmp_path), "train")
    assert processor.resized(*row.size) == resized
    frames = Frames("pixels", "pixels", "thousandths", processor.resized).of(row)
    for source, target in permutations(FRAMES, 2):
        ends = frames[source], frames[target]
        (box,) = read_boxes(convert_solution(boxes(worked[source]), *ends), frames[target])
        found = (box.x1, box.y1, box.x2, box.y2)
        assert found == pytest.approx(worked[target], abs=1e-9)
        box = read_grounding(convert_solution(grounding(*worked[source]), *ends), frames[target])
        assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx(worked[target], abs=1e-9)


def test_what_is_kept_and_what_is_refused_in_converting():
    frames = (1000.0, 1000.0), (333.0, 777.0)
    for same in ("<answer>No Objects</answer>", "[]"):
        assert convert_solution(same, *frames) == same
    odd = boxes((1, 2, 999.5, 3)).replace("1.0}", "0.5}")
    assert convert_solution(odd, frames[0], frames[0]) is odd
    (box,) = read_boxes(convert_solution(odd, *frames), frames[1])
    assert box.confidence == 0.5
    there = convert_solution(boxes((7, 0, 1000, 1000)), *frames)
    assert read_boxes(there, frames[1])[0].x2 == 333  # the edge stays inside
    (back,) = read_boxes(convert_solution(there, *reversed(frames)), frames[0])
    assert (back.x1, back.y1, back.x2, back.y2) == pytest.approx((7, 0, 1000, 1000), abs=1e-8)
    with pytest.raises(ValueError, match="outside its frame, 1000 x 1000"):
        convert_solution(boxes((0, 0, 1001, 4)), *frames)
    with pytest.raises(ValueError, match="not a list of boxes"):
        convert_solution("<answer>[{'Position': [1, 2, 3]}]</answer>", *frames)


def rows_of(solutions, size=(640, 480), problem="Find it", **columns) -> SplitRows:
    table = [{"problem": problem, "solution": solution, **columns} for solution in solutions]
    rows = SplitRows(table, Path())
    rows.sizes = [[size]] * len(rows)
    return rows


def half(w: int, h: int) -> tuple[int, int]:
    return w // 2, h // 2


def double(w: int, h: int) -> tuple[int, int]:
    return 2 * w, 2 * h


IN_640 = ["[10, 20, 100, 200]", "[5, 300, 600, 400]", "[300, 5, 400, 470]", "[50, 60, 70, 80]"]
IN_1000 = ["[100, 200, 900, 900]", "[300, 400, 990, 700]", "[1, 2, 3, 4]"]
LARGE = {"size": (2000, 1500)}
SIZES = {"width": 640, "height": 480}
# the rows, what they count, whether that is sure, what it says
GUESSED = {
    "all over 1000": (IN_1000, {}, "thousandths", True, "as pixels, 2 of 3 rows reach out of 640"),
    "all over the image": (IN_640, {}, "pixels", False, "fit it, and thousandths, too"),
    "at its right edge": ([*IN_640, "[1, 2, 640, 50]"], {}, "pixels", True, "1 rows, first row 4"),
    "at its lower edge": ([*IN_640, "[1, 2, 64, 479.5]"], {}, "pixels", True, "end at the edge"),
    "columns": (IN_640, SIZES, "pixels", True, "columns width and height"),
    "columns of another size": (IN_640, {"width": 64, "height": 48}, "pixels", False, "fit it"),
    "dead pixels": (IN_1000, {"problem": "Find dead pixels"}, "thousandths", True, "as pixels, 2"),
    "columns beside thousandths": (IN_1000, SIZES, "thousandths", True, "as pixels, 2 of 3"),
    "words": (IN_640, {"problem": "Box (0-1000)?"}, "thousandths", True, "the problems say so"),
    "words for pixels": (IN_640, {"problem": "pixel coordinates"}, "pixels", True, "say so"),
    "words for two": (IN_1000, {"problem": "640x480 pixels; thousandths"}, "thousandths", True, ""),
    "words against boxes": (IN_1000, {"problem": "in pixels"}, "pixels", False, "as thousandths"),
    "above 1000": (["[9, 9, 1500, 900]"] * 3, LARGE, "pixels", True, "first row 0 with [9, 9, 15"),
    "one typo, numbers": (
        [*["[500, 500, 900, 900]"] * 3, "[500, 500, 1001, 900]"],
        LARGE, "pixels", False, "1 of 4 rows reach out of 1000 x 1000, first row 3 with [500, 500",
    ),
    "one typo, Position": (
        [*[boxes((500, 500, 900, 900))] * 3, boxes((500, 500, 1001, 900))],
        LARGE, "thousandths", False, "boxes of 3 of 4 rows fit it",
    ),
    "one typo, small": (
        [*[boxes((500, 500, 900, 900))] * 3, boxes((500, 500, 1001, 900))],
        {}, "thousandths", True, "as pixels, 3 of 4 rows reach out of 640 x 480",
    ),
    "a slip beside pixels": ([*IN_640 * 3, "[1, 2, 650, 50]"], {}, "pixels", False, "12 of 13"),
    "photographs": (IN_1000 * 2, LARGE, "thousandths", False, "fit it, and pixels, too"),
    "nothing tells": (["[9, 9, 99, 99]"], {"size": (960, 960)}, "thousandths", False, "too"),
    "fits nothing": (["[9, 9, 1500, 99]"], {}, "thousandths", False, "no row's boxes fit it, nor"),
    "no boxes": (["No Objects"], {}, "thousandths", False, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSED)
def test_what_solutions_count_is_guessed(name):
    solutions, about, frame, sure, reason = GUESSED[name]
    guess = guess_frame(rows_of(solutions, **about), resized=half)
    assert (guess.frame, guess.sure) == (frame, sure), guess
    assert reason in str(guess) and ("guessed" in str(guess)) == (bool(reason) and not sure)


def test_columns_of_images_that_were_shrunk_are_refused():
    rows = rows_of(IN_640, size=(320, 240), **SIZES)
    with pytest.raises(ValueError, match="row 0 .* says 640 x 480, and the image has 320 x 240"):
        guess_frame(rows, resized=half)


def test_pixels_of_the_resized_image_are_guessed_if_nothing_else_is_likely():
    beyond = ["[10, 20, 700, 900]", "[5, 300, 1200, 400]", "[1, 2, 3, 4]"]
    guess = guess_frame(rows_of(beyond), resized=double)
    assert (guess.frame, guess.sure) == ("resized", True)
    assert "of 1000 x 1000, first row 1 with [5, 300, 1200, 400]" in str(guess)
    inside = [f"[{i}, {i}, {250 + 6 * i}, {150 + 7 * i}]" for i in range(12)]
    assert guess_frame(rows_of(inside), resized=double).frame == "pixels"
    assert guess_frame(rows_of(["[10, 20, 641, 80]"] * 3), lambda w, h: (w + 4, h - 4)).frame == (
        "thousandths"  # one pixel too far is no proof
    )
    said = rows_of(inside, problem="in pixels of the resized image")
    assert guess_frame(said, resized=double).frame == "resized"


def task_for(*splits, **flags) -> train_det.Task:
    processor = SimpleNamespace(answers_in="thousandths", resized=half)
    config = train_det.Config(dataset_name="d", **flags)
    return train_det.read_task(config, data_of(*splits, processor=processor), [])


def test_what_is_only_guessed_is_not_converted():
    with pytest.raises(
        ValueError, match="only guessed .*; say it: --data_frame thousandths or pix"
    ):
        task_for(rows_of(IN_640), box_frame="thousandths")
    for flags in ({"data_frame": "pixels"}, {}):
        solutions = [*IN_640, "[1, 2, 640, 50]"] if not flags else IN_640
        task = task_for(rows_of(solutions), box_frame="thousandths", **flags)
        assert (task.frames.solutions, task.frames.answers) == ("pixels", "thousandths")
    assert task_for(rows_of(IN_640), box_frame="pixels").frames.answers == "pixels"


def test_few_held_out_rows_count_what_the_others_do():
    few = rows_of(["[10, 20, 100, 200]"], size=(112, 224))
    assert guess_frame(few, half).frame == "pixels"
    assert task_for(rows_of(IN_1000), few).frames.solutions == "thousandths"
    with pytest.raises(
        ValueError, match="the splits differ: boxes in pixels of the image to train"
    ):
        task_for(rows_of(IN_640), rows_of(IN_1000))
    with pytest.raises(ValueError, match="the splits differ: boxes to train on, grounding held"):
        task_for(rows_of([boxes((1, 2, 3, 4))]), rows_of(["(1,2),(3,4)"]))


def test_a_box_outside_says_what_it_was_taken_for():
    rows = rows_of([*[boxes((5, 5, 9, 9), (500, 500, 900, 900))] * 3, boxes((1, 2, 1001, 9))])
    task = task_for(rows)
    first, last = rows[0], rows[3]
    first.__dict__["size"] = last.__dict__["size"] = (640, 480)  # as of an image
    assert task.solution(first) == first.solution
    with pytest.raises(ValueError) as caught:
        task.solution(last)
    assert str(caught.value) == (
        "box 1 of 1, [1, 2, 1001, 9], is outside its frame, 1000 x 1000 (thousandths by "
        "--data_frame auto: as pixels, 3 of 4 rows reach out of 640 x 480, first row 0 with "
        "[500, 500, 900, 900]; they are in a form that counts thousandths by origin)"
    )


def task_of(row, processor, **flags) -> train_det.Task:
    config = train_det.Config(dataset_name="d", **flags)
    return train_det.read_task(config, data_of(Checked([row]), processor=processor), [])


@pytest.mark.parametrize("data_frame", FRAMES)
@pytest.mark.parametrize("box_frame", FRAMES)
def test_rewards_ap_and_diagnosis_meet_in_the_frame_that_is_asked_for(
    tmp_path, processor, data_frame, box_frame
):
    size = (640, 480)
    _, worked = WORKED[size]
    Image.new("RGB", size, "gray").save(tmp_path / "0.png")
    table = [{"image": "0.png", "problem": "Find it.", "solution": boxes(worked[data_frame])}]
    (tmp_path / "train.json").write_text(json.dumps(table))
    rows = load(str(tmp_path), "train")
    (row,) = rows
    task = task_of(row, processor, data_frame=data_frame, box_frame=box_frame)
    assert f"solutions count {FRAMES[data_frame]}" in str(task)
    assert ("converted" in str(task)) == (data_frame != box_frame)
    for frame in FRAMES:
        text = f"<think>a</think>{boxes(worked[frame])}"
        earned = train_det.score(text, row, task)["iou"]
        assert (earned > 0.999) == (frame == box_frame), frame
        found = train_det.hints(said([row], [text]), task)
        if frame != box_frame:
            assert found[0].startswith(f"read as {FRAMES[frame]}, ")
            assert "would have earned an IoU reward of 1.00 instead of 0.0" in found[0]
    assert f"<answer>{train_det.truth(row, task)}</answer>" == task.solution(row)
    precision, results = average_precision([train_det.truth(row, task)], rows, task.frames)
    assert precision["eval/AP"] == pytest.approx(1)
    x1, y1, x2, y2 = worked["pixels"]
    assert results[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-9)


def test_a_run_that_asks_for_another_frame_than_the_model_answers_in(tmp_path, capsys):
    """The demo's model answers in thousandths; asked for pixels it earns nearly nothing, and the
    diagnosis says what the same boxes are worth."""
    table = [row for row in scenes("train", 20) if "Position" in row["solution"]]
    for number, row in enumerate(table):
        row["image"].save(tmp_path / f"{number}.png")
        table[number] = row | {"image": f"{number}.png"}
    (tmp_path / "train.json").write_text(json.dumps(table))
    argv = [*SHORT, "--dataset_name", str(tmp_path), "--max_completion_length", "96"]
    argv += ["--model_name_or_path", str(train_det.DEMO.parent / "checkpoint")]
    argv += ["--box_frame", "pixels", "--diagnose_after", "2", "--iou_threshold", "0.2"]
    assert train_det.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "frames    solutions count thousandths of the image, converted; answers must count pixels "
        "of the image (this model was taught thousandths of the image)"
    ) in out
    assert "read as thousandths of the image, the " in out
    for line in read_lines(tmp_path / "run" / "completions.jsonl"):
        for box in read_boxes(line["truth"], (112.0, 112.0)):
            assert box.x2 <= 112


def test_splits_that_count_differently_are_refused(tmp_path, capsys):
    for split, corner in (("train", 900), ("test", 1100)):
        Image.new("RGB", (1200, 1200), "gray").save(tmp_path / "0.png")
        solution = boxes((0, 0, corner, 800))
        table = [{"image": "0.png", "problem": "Find it.", "solution": solution}]
        (tmp_path / f"{split}.json").write_text(json.dumps(table))
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    argv += ["--dry_run", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="boxes in thousandths of the image to train"):
        train_det.main(argv)
    assert train_det.main([*argv, "--data_frame", "pixels"]) == 0
    assert (
        "solutions count pixels of the image; answers must count pixels" in capsys.readouterr().out
    )
