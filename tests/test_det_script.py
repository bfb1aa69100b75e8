"""train_det.py: boxes, their frames, average precision."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import train_det
from data.flowers import rows
from data.load import load
from models.processor import Processor
from rewards.boxes import read_boxes
from rewards.coco import average_precision
from rewards.det import iou_reward
from rewards.frames import Frames
from rewards.parse import ideal_completion
from tests.runs import (
    CHECKPOINT,
    SHARED,
    SHORT,
    Checked,
    data_of,
    read_steps,
    said,
    save_turned,
)


def test_the_true_boxes_of_real_photographs_have_an_ap_of_1():
    if not SHARED.exists():
        pytest.skip("the shared photographs are not here")
    examples = load(str(SHARED / "cards"), "test")
    perfect_records(examples, "thousandths", ("ace playing card", "nine playing card"))


PROCESSOR = Processor(CHECKPOINT, max_pixels=100 * 28 * 28)


def task(frame: str) -> train_det.Task:
    frames = Frames(frame, frame, PROCESSOR.answers_in, PROCESSOR.resized)
    return train_det.Task("boxes", frames, 0.5, "calibrated")


def perfect_records(rows, frame: str, some_names) -> list[dict]:
    """Checks that the true solutions as predictions have AP 1 for every category."""
    answers = [train_det.truth(row, task(frame)) for row in rows]
    metrics, results = average_precision(answers, rows, task(frame).frames)
    assert metrics["eval/AP"] == metrics["eval/AP50"] == pytest.approx(1)
    assert {f"eval/AP50/{name}" for name in some_names} <= metrics.keys()
    half = [None if i % 2 else answer for i, answer in enumerate(answers)]
    worse, _ = average_precision(half, rows, task(frame).frames)
    assert worse["eval/AP50"] < 0.9
    return results


def test_average_precision_in_pixels_and_thousandths(tmp_path):
    """A box survives resizing and EXIF rotation: it counts the upright image's own pixels."""
    table, size = [], (300, 200)
    for number, orientation in enumerate((1, 6, 3, 8)):
        upright = Image.new("RGB", size, (40 * number, 90, 20))
        save_turned(upright, orientation, tmp_path / f"{number}.png")
        box = [30, 20, 240, 190]
        row = {"image": f"{number}.png", "problem": "Detect category 'ace'."}
        row["solution"] = f"<answer>[{{'Position': {box}, 'Confidence': 1.0}}]</answer>"
        table.append(row)
    (tmp_path / "train.json").write_text(json.dumps(table))
    examples = load(str(tmp_path), "train")
    results = perfect_records(examples, "pixels", ["ace"])
    assert [result["bbox"] for result in results] == [[30, 20, 210, 170]] * 4
    results = perfect_records(examples, "thousandths", ["ace"])
    assert results[0]["bbox"] == pytest.approx([9, 4, 63, 34])
    config = train_det.Config(dataset_name="d")
    task = train_det.read_task(config, data_of(examples, processor=PROCESSOR), [])
    assert task.frames.answers == "pixels" and "guessed" in task.frames.why
    far = replace(examples[0], solution=examples[0].solution.replace("240", "940"))
    task = train_det.read_task(config, data_of(Checked([far]), processor=PROCESSOR), [])
    assert task.frames.answers == "thousandths"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1600, 200), (90, 110)])
def test_the_model_sees_an_object_where_its_box_says(size, orientation, tmp_path):
    """What the patches show after EXIF rotation and resizing, against the box in each frame."""
    width, height = size
    box = [width * 0.3, height * 0.25, width * 0.8, height * 0.6]
    upright = Image.new("RGB", size, "black")
    upright.paste("white", tuple(round(edge) for edge in box))
    save_turned(upright, orientation, tmp_path / "0.png")
    row = {"image": "0.png", "problem": "Detect category 'ace'."}
    row["solution"] = f"<answer>[{{'Position': {box}, 'Confidence': 1.0}}]</answer>"
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (example,) = load(str(tmp_path), "train")

    prompt = example.prompt(PROCESSOR)
    _, rows, columns = prompt.image_grid_thw[0].tolist()
    patches = prompt.pixel_values.view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, 0, :, :]
    seen = patches.permute(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14) > 0.3
    down, across = seen.nonzero().T
    for frame in ("pixels", "thousandths", "resized"):
        wide, high = task(frame).frames.answer(example)
        found = (across.min(), down.min(), across.max() + 1, down.max() + 1)
        scale = (wide / (columns * 14), high / (rows * 14)) * 2
        found = [float(edge) * factor for edge, factor in zip(found, scale, strict=True)]
        expected = [
            n * side for n, side in zip((0.3, 0.25, 0.8, 0.6), (wide, high) * 2, strict=True)
        ]
        for edge, wanted, factor in zip(found, expected, scale, strict=True):
            assert edge == pytest.approx(wanted, abs=1.5 * factor + wide / width)
        text = boxes_text(found)
        truth = boxes_text(expected)
        assert iou_reward(text, truth, frame=(wide, high)) > 0.93


def boxes_text(box) -> str:
    position = [round(float(edge), 2) for edge in box]
    return f"<think>a</think><answer>[{{'Position': {position}, 'Confidence': 1.0}}]</answer>"


def test_grounding_data_trains_with_its_own_reward(tmp_path):
    rows("train", 1)[0]["image"].save(tmp_path / "a.png")
    row = {
        "image": "a.png",
        "problem": "Where is it?",
        "solution": "<answer>(1,2),(30,40)</answer>",
    }
    (tmp_path / "train.json").write_text(json.dumps([row]))
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    assert (
        train_det.main([*argv, "--output_dir", str(tmp_path / "run"), "--learning_rate", "0"]) == 0
    )
    lines = read_steps(tmp_path / "run")
    assert "rewards/giou/mean" in lines[-1] and "rewards/iou/mean" not in lines[-1]


@pytest.mark.slow
def test_boxes_in_another_frame_are_found_with_what_they_would_have_earned():
    """A detector that answers in pixels of its image: the hint names the reading and its IoU."""
    train = load("demo:scenes", "train")
    chosen = [row for row in train if "Position" in row.solution][:4]
    texts = []
    for row in chosen:
        shrunk = [
            {
                "Position": [v * 112 / 1000 for v in (b.x1, b.y1, b.x2, b.y2)],
                "Confidence": 0.5,
            }
            for b in read_boxes(row.solution)
        ]
        text = f"<think>a</think><answer>{shrunk}</answer>"
        texts.append(text)
    first, second, *_ = train_det.hints(said(chosen, texts), task("thousandths"))
    assert first == (
        "read as pixels of the image, the 4 answers with boxes of this step would have earned an "
        "IoU reward of 1.00 instead of 0.00"
    )
    assert second == first.replace("the image,", "the resized image,")  # which has the same size
    true = [ideal_completion(row.solution) for row in chosen]
    assert train_det.hints(said(chosen, true), task("thousandths")) == []
