"""Data sets as people have them: class folders, COCO files, conversations, label columns."""

import base64
import contextlib
import io
import json
import random
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import grpo.engine.load
import train_cls
import train_det
from data.check import check_rows, load_splits, refuse
from data.flowers import SPECIES, draw
from data.images import open_image
from data.load import hold_out, load, splits
from data.rows import Fault
from data.wording import Wording, check_names
from grpo.report.page import run_page
from grpo.report.read import read_run
from models.processor import Processor
from rewards.cls import normalize
from rewards.coco import average_precision
from tests.forms import chats, class_folders, coco_file
from tests.runs import CHECKPOINT, SHARED, SHORT, Checked, data_of, read_lines, train

DETECTION = CHECKPOINT.parent.parent / "demo_det" / "checkpoint"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """24 drawings of four classes in the ViRFT schema."""
    folder = tmp_path_factory.mktemp("drawings")
    table = []
    for i in range(24):
        draw(SPECIES[i % 4], f"test/{i}").save(folder / f"{i}.png")
        solution = f"<answer>{SPECIES[i % 4].name}</answer>"
        table.append({"image": f"{i}.png", "problem": f"What is {i}?", "solution": solution})
    (folder / "train.json").write_text(json.dumps(table))
    return folder


def contents(examples):
    return [(e.problem, e.solution, [open_image(i).tobytes() for i in e.images]) for e in examples]


def splits_of(name, script=train_cls, **flags):
    """What `load_splits` makes of a data set for the demo's model."""
    config = script.Config(dataset_name=str(name), **flags)
    return load_splits(config, Processor(CHECKPOINT), lambda items, *_: items)


# ---- conversations ------------------------------------------------------------------------------


def test_every_trainer_s_conversations_give_the_same_rows(drawings, tmp_path):
    expected = load(str(drawings), "train")
    for name, rows in chats(expected).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = load(str(tmp_path / f"{name}.jsonl"), "train")
        assert contents(found) == contents(expected), name
        assert not check_rows(found)
    rows = chats(expected)["llama-factory"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    assert contents(load(str(tmp_path / "chat.parquet"), "train")) == contents(expected)


def test_what_a_conversation_must_be():
    from data.chat import convert

    ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    good = convert({"messages": [{"role": "system", "content": "Be kind."}, ask, answer]})
    assert (good["problem"], good["solution"]) == ("Be kind.\n\nQ", "A")
    between = {"from": "human", "value": "<image>Compare <image>."}
    row = {
        "conversations": [between, {"from": "gpt", "value": [1, 2, 30, 40]}],
        "image": ["a", "b"],
    }
    assert convert(row)["problem"] == "<image>Compare <image>."
    assert convert(row)["solution"] == "[1, 2, 30, 40]"
    for turns, fault in (
        ([ask, answer, ask, answer], "2 questions"),
        ([ask], "ends without an answer"),
        ([answer], "0 questions"),
        ([{"role": "tool", "content": "x"}], "a message is by 'tool'"),
        ("no JSON", "no list of messages"),
        ([{"role": "user", "content": [{"type": "audio"}]}, answer], "a part of type 'audio'"),
    ):
        assert fault in convert({"messages": turns})["fault"]
    assert "videos" in convert({"messages": [ask, answer], "videos": ["v.mp4"]})["fault"]


def test_images_stand_where_the_placeholders_do():
    processor = Processor(CHECKPOINT)
    text = processor.chat_text("Compare <image> with <image>.", 2)
    image = processor.chat_text("", 1).split("user\n")[1].split("<|im_end|>")[0]
    assert f"Compare {image} with {image}." in text
    assert processor.chat_text("<image>What?", 1) == processor.chat_text("What?", 1)
    assert processor.chat_text("Is <image> a tag?", 2).count(image) == 2
    row = SimpleNamespace(
        index=3, problem="<image><image>Q", solution="s", images=(b"",), fault="", where="w"
    )
    assert "2 <image> in the problem, and 1 images" in check_rows([row])[0].found


# ---- class folders ------------------------------------------------------------------------------


def test_class_folders_are_rows_with_the_classes_in_the_prompt(drawings, tmp_path):
    expected = load(str(drawings), "train")
    rows = load(str(class_folders(expected, tmp_path / "photos")), "train")
    names = sorted({s.name for s in SPECIES[:4]})
    assert len(rows) == 24 and {row.solution for row in rows} == set(names)
    assert all(row.problem.count(", ".join(names)) == 1 for row in rows)
    pairs = {
        (e.solution.removeprefix("<answer>").removesuffix("</answer>"), e.image_keys)
        for e in expected
    }
    assert {(row.solution, row.image_keys) for row in rows} == pairs
    assert rows.notes[0].startswith("4 classes, 24 photographs: ")
    wording = Wording(template="One of {classes}!")
    assert (
        load(str(tmp_path / "photos"), "train", wording)[0].problem == f"One of {', '.join(names)}!"
    )
    many = Wording().class_problem([f"c{i}" for i in range(51)])
    assert "c7" not in many and "Choose" not in many

    class_folders(expected.pick(range(16)), tmp_path / "parts" / "train")
    class_folders(expected.pick(range(16, 18)), tmp_path / "parts" / "val")
    assert splits(str(tmp_path / "parts")) == ["train", "validation"]
    trained, held_out = splits_of(tmp_path / "parts")
    assert (len(trained), len(held_out)) == (16, 2)
    assert held_out[0].problem == trained[0].problem == rows[0].problem, "the classes of both"


def test_what_class_folders_must_be(drawings, tmp_path):
    expected = load(str(drawings), "train")
    photos = class_folders(expected, tmp_path / "photos")
    (photos / "notes.txt").write_text("mine")
    folder = sorted(p for p in photos.iterdir() if p.is_dir())[0]
    (folder / "Thumbs.db").write_text("x")
    (folder / ".DS_Store").write_text("x")
    assert load(str(photos), "train").notes[1] == (
        "left out as they are no photographs: Thumbs.db (1 in all)"
    )
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is empty: put its photographs there, or remove it"):
        load(str(photos), "train")
    (photos / "empty").rmdir()
    draw(SPECIES[0], "test/0").save(photos / "loose.png")
    with pytest.raises(ValueError, match="loose.png lies beside the class folders"):
        load(str(photos), "train")
    (photos / "loose.png").unlink()
    folder.rename(photos / "Tall_Flower")
    class_folders(expected.pick([0]), tmp_path / "other")
    with pytest.raises(ValueError, match="one folder, .*nothing to tell apart"):
        load(str(tmp_path / "other"), "train")
    assert "Tall Flower" in load(str(photos), "train").notes[0]
    (photos / "tall flower").mkdir()
    draw(SPECIES[0], "test/0").save(photos / "tall flower" / "a.png")
    with pytest.raises(ValueError, match="'Tall Flower' and 'tall flower' count as one name"):
        load(str(photos), "train")
    with pytest.raises(ValueError, match="--prompt_template has no effect here"):
        load(str(drawings), "train", Wording(template="x"))


def test_what_is_held_out_depends_on_the_photographs_alone(drawings, tmp_path):
    expected = load(str(drawings), "train")
    photos = class_folders(expected, tmp_path / "photos")
    trained, held_out = splits_of(photos)
    assert len(held_out) == 4 and len({row.solution for row in held_out}) == 4
    assert not {k for r in trained for k in r.image_keys} & {
        k for r in held_out for k in r.image_keys
    }
    chosen = {row.image_keys for row in held_out}
    for file in sorted(photos.rglob("*.png")):  # other names, and every photograph twice
        file.with_name(f"copy of {file.name}").write_bytes(file.read_bytes())
        file.rename(file.with_name(f"z{file.name}"))
    again, held_again = splits_of(photos)
    assert {row.image_keys for row in held_again} == chosen and len(held_again) == 8
    assert len(again) == 40
    assert len(splits_of(photos, test_share=0.5)[1]) == 24
    assert len(splits_of(photos, test_share=0.0)[1]) == 0
    assert len(splits_of(drawings)[1]) == 0 and len(splits_of(drawings, test_share=0.25)[1]) == 6


def test_a_row_is_held_out_with_all_its_images():
    """Rows that share an image stay together, however long the chain."""
    from data.rows import SplitRows

    table = [{"images": [bytes([i]), bytes([i + 1])], "problem": "p"} for i in range(6)]
    rows = SplitRows([{**row, "solution": "s"} for row in table], None)
    one, other = hold_out(rows, 0.2)
    assert (len(one), len(other)) == (6, 0), "one group, which stays to train on"


def test_splits_and_classes_are_not_taken_for_each_other(drawings, tmp_path):
    """As unpacked archives have them: an unlabelled test folder, two names for one split, links."""
    expected = load(str(drawings), "train")
    photos = tmp_path / "photos"
    class_folders(expected, photos / "train")
    (photos / "test").mkdir()
    draw(SPECIES[0], "test/0").save(photos / "test" / "a.png")
    with pytest.raises(ValueError, match="train is a split with class folders, and test is none"):
        load(str(photos), "train")
    (photos / "test" / "a.png").unlink()
    (photos / "cat_to_name.json").write_text('{"1": "rose"}')
    assert len(load(str(photos), "train")) == 24, "a JSON that holds no rows is no data set"
    class_folders(expected, photos / "val")
    class_folders(expected, photos / "validation")
    with pytest.raises(ValueError, match="val and validation are one split"):
        load(str(photos), "train")

    linked = class_folders(expected, tmp_path / "linked")
    first, second, *_ = sorted(linked.iterdir())
    (tmp_path / "elsewhere").mkdir()
    draw(SPECIES[5], "test/5").save(tmp_path / "elsewhere" / "b.PNG")
    (first / "more").symlink_to(tmp_path / "elsewhere")
    (first / "round").symlink_to(first)
    (first / ".ipynb_checkpoints").mkdir()
    draw(SPECIES[5], "test/6").save(first / ".ipynb_checkpoints" / "c.png")
    rows = load(str(linked), "train")
    assert len(rows) == 25 and sum(row.solution == first.name for row in rows) == 7
    (second / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    rows, _ = splits_of(linked, test_share=0.0)
    assert [f.found for f in rows.faults] == ["missing: a link to a file that is not there"]
    (second / "gone.jpg").unlink()
    (second / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(20))
    rows, _ = splits_of(linked, test_share=0.0)
    assert [fault.found for fault in rows.faults] == ["a HEIC photograph: convert it to JPEG"]


def test_two_forms_in_a_folder_are_named(drawings, tmp_path):
    annotated(tmp_path / "annotations")
    (tmp_path / "train.json").write_text((drawings / "train.json").read_text())
    with pytest.raises(ValueError, match="COCO annotations and rows in other files.*instances_val"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize(
    "one, other",
    [
        ("Red_Rose", "red-rose"),
        ("a  b", "A b"),
        ("L\u00f6we", "Lo\u0308we"),
        ("rose", "'rose'."),
        ("a", "b"),
    ],
)
def test_names_that_count_as_one_are_those_of_the_reward(one, other):
    same = normalize(one) == normalize(other)
    with pytest.raises(ValueError, match="count as one name") if same else contextlib.nullcontext():
        check_names([one, other], "here")


def test_a_template_must_be_one_that_can_be_filled(drawings, tmp_path):
    photos = str(class_folders(load(str(drawings), "train"), tmp_path / "photos"))
    with pytest.raises(ValueError, match="{class} is not filled; for this data set {classes} are"):
        load(photos, "train", Wording(template="Is it {class}?"))
    with pytest.raises(ValueError, match="--prompt_template is empty"):
        load(photos, "train", Wording(template=" "))
    flags = train_det.Config(dataset_name=str(drawings), absent_share=0.3)
    flags.given = frozenset({"absent_share"})
    with pytest.raises(ValueError, match="--absent_share has no effect here"):
        load_splits(flags, Processor(DETECTION), lambda items, *_: items)


def test_equal_images_in_both_splits_are_said(drawings, tmp_path):
    expected = load(str(drawings), "train")
    class_folders(expected, tmp_path / "photos" / "train")
    class_folders(expected.pick([0, 1, 2]), tmp_path / "photos" / "test")
    rows, _ = splits_of(tmp_path / "photos")
    assert rows.notes[-1] == "3 images are in both splits: what is held out is not new"


# ---- COCO ---------------------------------------------------------------------------------------


def annotated(folder, crowd=True):
    """Three images of 400 x 300, two categories with boxes, one without; as instances_val.json."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for i in range(3):
        Image.new("RGB", (400, 300), (60 * i, 90, 20)).save(folder / f"{i}.jpg")
        images.append({"id": 50 + i, "file_name": f"{i}.jpg", "width": 400, "height": 300})
    boxes = [(50, 5, [40, 30, 100, 60], 0), (50, 5, [200, 150, 100, 100], 0)]
    boxes += [(51, 9, [0, 0, 200, 150], 0), (52, 5, [10, 10, 380, 280], 0)]
    boxes += [(51, 5, [100, 100, 200, 100], int(crowd))]
    content = {
        "images": images,
        "categories": [{"id": n, "name": name} for n, name in ((5, "cat"), (9, "dog"), (1, "eel"))],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": w}
            for n, (i, c, b, w) in enumerate(boxes, 1)
        ],
    }
    (folder / "instances_val.json").write_text(json.dumps(content))
    return content


def test_an_annotation_file_is_a_row_for_each_category_in_an_image(tmp_path):
    annotated(tmp_path)
    rows = load(str(tmp_path / "instances_val.json"), "train", Wording(absent_share=0.4))
    shown = [row for row in rows if "No Objects" not in row.solution]
    assert [(row.coco["image_id"], row.coco["category"]) for row in shown] == [
        (50, "cat"),
        (51, "dog"),
        (52, "cat"),
    ]
    assert shown[0].solution == (
        "<answer>[{'Position': [40, 30, 140, 90], 'Confidence': 1.0}, "
        "{'Position': [200, 150, 300, 250], 'Confidence': 1.0}]</answer>"
    )
    absent = {(row.coco["image_id"], row.coco["category"]) for row in rows} - {
        (row.coco["image_id"], row.coco["category"]) for row in shown
    }
    assert absent == {(50, "dog"), (52, "dog")}, "cat is a crowd in 51, and nothing is an eel"
    assert [line for line in rows.notes if "crowd" in line or "eel" in line] == [
        "1 crowd boxes are left out",
        "never asked for, as no box is of them: eel",
    ]
    assert len(load(str(tmp_path), "train", Wording())) == 3
    few = load(str(tmp_path / "instances_val.json"), "train", Wording(absent_share=0.25))
    assert sum("No Objects" in row.solution for row in few) == 1, "a quarter of 4"
    again = load(str(tmp_path / "instances_val.json"), "train", Wording(absent_share=0.4))
    assert [row.coco for row in again] == [row.coco for row in rows]


@pytest.mark.parametrize("frame, form", [("thousandths", "Position"), ("resized", "bbox_2d")])
def test_boxes_are_asked_for_as_the_family_was_taught(tmp_path, frame, form):
    annotated(tmp_path)
    rows = load(str(tmp_path), "train", Wording(frame=frame, form=form))
    assert (
        rows.asked_frame == frame
        and form in rows[0].problem
        and "category 'cat'" in rows[0].problem
    )
    assert ("thousandths" in rows[0].problem) == (frame == "thousandths")
    with pytest.raises(ValueError, match="without {category} it does not say what to find"):
        load(str(tmp_path), "train", Wording(template="Find it"))
    asked = load(str(tmp_path), "train", Wording(template="Find {category} in {coordinates}"))
    assert asked[0].problem.startswith("Find cat in thousandths of the image")


def test_bad_annotations_are_named(tmp_path):
    content = annotated(tmp_path)
    content["annotations"][0]["bbox"] = [40, 30, 0, 60]
    content["annotations"][2]["bbox"] = [-6, 0, 206, 150]
    content["annotations"][3]["bbox"] = [1, 2, 3]
    content["images"][1]["width"] = 300
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    flags = {"test_share": 0.0}
    with pytest.raises(ValueError) as error:
        splits_of(tmp_path, train_det, **flags, absent_share=0.0)
    rows = load(str(tmp_path), "train")
    assert "3 bad rows" in str(error.value)
    for found in (
        "row 0 (0.jpg): annotation 1, bbox [40, 30, 0, 60]: no area inside the image",
        "the image is 400 x 300 pixels, its annotations count 300 x 300",
        "annotation 4 has the bbox [1, 2, 3]",
    ):
        assert found in str(error.value)
    assert "1 boxes reach out of their image and are clipped to it" in rows.notes
    assert "'Position': [0, 0, 200, 150]" in rows[1].solution
    content["annotations"][0]["image_id"] = 77
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 1 is of image 77, which the file does not"):
        load(str(tmp_path), "train")


def test_what_annotations_cannot_be(tmp_path):
    whole = annotated(tmp_path)
    file = tmp_path / "instances_val.json"

    def fails(found: str, **changes):
        file.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=found):
            load(str(file), "train")

    boxes = whole["annotations"]
    fails("no coordinate is above 1", annotations=[{**boxes[0], "bbox": [0.1, 0.2, 0.3, 0.4]}])
    fails("all boxes are crowds", annotations=[{**box, "iscrowd": 1} for box in boxes])
    fails("None' is no annotation|'None' is no", annotations=[None])
    fails("is of image \\[50\\], which", annotations=[{**boxes[0], "image_id": [50]}])
    twice = [{"id": n, "name": "cat"} for n in (5, 9)]
    fails("'cat' and 'cat' count as one name", categories=twice)
    fails("some ids are numbers and some are text", categories=[*twice, {"id": "x", "name": "y"}])
    odd = [{**boxes[0], "area": None, "iscrowd": None}, {**boxes[0], "id": 99}, *boxes[1:]]
    file.write_text(json.dumps(whole | {"annotations": odd}))
    rows = load(str(file), "train")
    assert rows[0].solution.count("Position") == 2
    assert "1 boxes are there twice, and are asked for once" in rows.notes
    data = data_of(Checked(rows), processor=Processor(DETECTION))
    task = train_det.read_task(train_det.Config(dataset_name="d"), data, [])
    answers = ["[{'Position': [100, 100, 350, 300], 'Confidence': 0.9}]"] * len(rows)
    assert average_precision(answers, rows, task.frames)[0]["eval/AP50"] >= 0


def answers_by_chance(rows, frames, seed=0) -> list[str]:
    """True boxes moved a little, some left out, some made up, as answers in the model's frame."""
    draw_of, answers = random.Random(seed), []
    for row in rows:
        (width, height), (across, down) = row.size, frames.answer(row)
        boxes = []
        for known in [*row.coco["annotations"], {"bbox": [5, 5, 50, 40]}]:
            if draw_of.random() < 0.25:
                continue
            x, y, w, h = known["bbox"]
            x += draw_of.uniform(-0.15, 0.15) * w
            corners = max(x, 0), y, min(x + w, width), y + h
            scale = (across / width, down / height) * 2
            numbers = [round(n * s, 3) for n, s in zip(corners, scale, strict=True)]
            boxes.append(f"{{'Position': {numbers}, 'Confidence': {draw_of.random():.3f}}}")
        answers.append(f"[{', '.join(boxes)}]")
    return answers


@pytest.mark.parametrize("held_out", [False, True])
def test_results_go_straight_into_anyone_s_cocoeval(tmp_path, held_out):
    """pycocotools on the file itself gives the AP that is reported, crowd boxes included."""
    random_of, content = random.Random(3), annotated(tmp_path)
    for i in range(3, 12):
        Image.new("RGB", (400, 300), (20 * i, 10, 200)).save(tmp_path / f"{i}.jpg")
        size = {"width": 400, "height": 300}
        content["images"].append({"id": 50 + i, "file_name": f"{i}.jpg", **size})
        for _ in range(3):
            box = [random_of.randrange(200), random_of.randrange(150), 90, 70]
            place = {"image_id": 50 + i, "category_id": random_of.choice((5, 9)), "iscrowd": 0}
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, **place, "bbox": box, "area": 6300})
    for image in (50, 52, 55, 58):  # a crowd beside boxes of its category, which is ignored
        crowd = {"image_id": image, "category_id": 5, "iscrowd": 1, "bbox": [0, 0, 60, 60]}
        number = len(content["annotations"]) + 1
        content["annotations"].append({"id": number, **crowd, "area": 3600})
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    flags = {"test_share": 0.4 if held_out else 0.0}
    parts = splits_of(tmp_path, train_det, **flags)
    rows = parts[held_out]
    config = train_det.Config(dataset_name=str(tmp_path), **flags)
    data = data_of(*parts, processor=Processor(DETECTION))
    task = train_det.read_task(config, data, [])
    assert (task.frames.solutions, task.frames.answers) == ("pixels", "thousandths")
    found, results = average_precision(answers_by_chance(rows, task.frames), rows, task.frames)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "instances_val.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        if held_out:
            evaluation.params.imgIds = sorted({row.coco["image_id"] for row in rows})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0 < found["eval/AP"] < 0.95
    assert found["eval/AP"] == pytest.approx(evaluation.stats[0], abs=1e-12)
    assert found["eval/AP50"] == pytest.approx(evaluation.stats[1], abs=1e-12)


# ---- columns of the hub --------------------------------------------------------------------------


def test_a_class_label_is_a_solution(drawings, tmp_path):
    expected = load(str(drawings), "train")
    names = sorted({row.solution[8:-9] for row in expected})
    columns = {"image": [str(row.images[0]) for row in expected]}
    columns["species"] = [names.index(row.solution[8:-9]) for row in expected]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    named = [name.replace(" ", "_") for name in names]
    table = table.cast_column("species", datasets.ClassLabel(names=named))
    table.save_to_disk(tmp_path / "labels")
    rows = load(str(tmp_path / "labels"), "train")
    assert [row.solution for row in rows] == [row.solution[8:-9] for row in expected]
    assert [open_image(row.images[0]).tobytes() for row in rows] == [
        c[2][0] for c in contents(expected)
    ]
    assert ", ".join(names) in rows[0].problem
    trained, held_out = splits_of(tmp_path / "labels")
    assert (len(trained), len(held_out)) == (20, 4)
    assert {row.image_keys for row in held_out} == {
        row.image_keys for row in splits_of(class_folders(expected, tmp_path / "photos"))[1]
    }


@pytest.mark.parametrize("corners", [False, True])
def test_objects_with_boxes_are_what_a_coco_file_would_be(tmp_path, corners):
    content = annotated(tmp_path / "coco", crowd=False)
    objects = []
    for entry in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        boxes = [a["bbox"] for a in own]
        if corners:
            boxes = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        labels = [{5: 0, 9: 1}[a["category_id"]] for a in own]
        objects.append({"bbox": boxes, "category": labels})
    kind = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": kind})
    files = [str(tmp_path / "coco" / entry["file_name"]) for entry in content["images"]]
    table = datasets.Dataset.from_dict({"image": files, "objects": objects}, features)
    table.save_to_disk(tmp_path / "hub")
    found = load(str(tmp_path / "hub"), "train")
    expected = load(str(tmp_path / "coco"), "train")
    assert contents(found) == contents(expected)
    form = "two corners" if corners else "x, y, width, height"
    assert found.notes[-1] == f"boxes are taken to be {form}, in pixels"


# ---- checks -------------------------------------------------------------------------------------


def test_small_differences_of_files_are_read(drawings, tmp_path):
    """A byte order mark, a thought before the answer, an image as data: URI."""
    image = (drawings / "0.png").read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    solution = "<think>Two\nlines.</think>\n<answer>a rose</answer>"
    table = [{"image": uri, "problem": "Q", "solution": solution}]
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8-sig")
    (row,) = load(str(tmp_path / "a.json"), "train")
    assert row.images == (image,) and row.solution == "<answer>a rose</answer>"
    (tmp_path / "b.jsonl").write_text(json.dumps(table[0]), encoding="utf-8-sig")
    assert contents(load(str(tmp_path / "b.jsonl"), "train")) == contents([row])
    table = [{"Image": uri, "Problem": "Q", "solution": "A"}]
    (tmp_path / "c.json").write_text(json.dumps(table))
    rows = load(str(tmp_path / "c.json"), "train")
    assert (rows[0].images, rows[0].problem, rows[0].solution) == ((image,), "Q", "A")
    assert rows.notes == [
        "the column Image is read as image",
        "the column Problem is read as problem",
    ]


def test_all_bad_rows_are_listed_at_once_whichever_check_found_them(drawings, tmp_path, capsys):
    table = json.loads((drawings / "train.json").read_text())[:8]
    for row in table:
        row["image"] = str(drawings / row["image"])
    table[1]["solution"] = "<answer>a<|im_end|>b</answer>"
    table[2]["image"] = str(tmp_path / "missing.png")
    table[3]["problem"] = ""
    table[4]["image"] = f"data:image/png;base64,{'A' * 3000}"
    table[5]["image"] = "https://example.org/a.png"
    table[6]["problem"] = "Is it <|image_pad|>?"
    (tmp_path / "train.json").write_text(json.dumps(table))
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), "--dry_run"]
    with pytest.raises(ValueError) as error:
        train_cls.main([*argv, "--output_dir", str(tmp_path / "run")])
    text = str(error.value)
    assert "6 bad rows" in text and "AAAAAAAAAA" not in text and len(text) < 3000
    for line in (
        "row 1",
        "its solution holds <|im_end|>, which no answer can",
        "row 2",
        "missing: there is no such file",
        "row 3",
        "problem is empty",
        "row 4 (image stored in the data set): not an image",
        "row 5",
        "the image is str 'https://example.org/a.png'",
        "row 6",
        "which stands for an image",
    ):
        assert line in text, line


def test_negative_coordinates_are_refused():
    from rewards.boxes import read_boxes

    with pytest.raises(ValueError, match="negative coordinate"):
        read_boxes("<answer>[{'Position': [-1, 2, 30, 40], 'Confidence': 1.0}]</answer>")
    assert read_boxes("<answer>[{'Position': [1e-3, 2, 30, 40], 'Confidence': 1.0}]</answer>")


def test_one_bad_row_is_one():
    with pytest.raises(ValueError, match="d: 1 bad row\n"):
        refuse([Fault(0, "w", "f", "t")], "d")


# ---- evaluation alone ---------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_alone_is_the_evaluation_before_training(tmp_path, plain):
    """And K drawn answers a row are those of the row, whatever else is evaluated."""
    argv = ["--eval_only", "--eval_samples", "6", "--max_completion_length", "40"]
    (line,) = train(tmp_path / "run", *argv)
    before = read_lines(plain / "metrics.jsonl")[0]
    same = [name for name in before if not name.startswith(("time/", "memory/"))]
    assert {name: line[name] for name in same} == {name: before[name] for name in same}
    files = [folder / "eval-0.jsonl" for folder in (tmp_path / "run", plain)]
    assert files[0].read_text() == files[1].read_text()
    assert not list((tmp_path / "run").glob("*/"))
    page = run_page(read_run(tmp_path / "run"))
    assert "Nothing was trained (--eval_only)" in page and "Training groups" not in page
    (line,) = train(tmp_path / "drawn", *argv, "--eval_samples_per_prompt", "4")
    drawn = json.loads((tmp_path / "drawn" / "samples-0.json").read_text())
    assert [len(row) for row in drawn] == [4] * 6
    earned = [[record["rewards"]["accuracy"] for record in row] for row in drawn]
    assert line["eval/mean@4/accuracy"] == pytest.approx(sum(map(sum, earned)) / 24)
    assert line["eval/pass@4/accuracy"] == pytest.approx(sum(any(row) for row in earned) / 6)
    totals = [{record["reward"] for record in row} for row in drawn]
    assert line["eval/frac_reward_zero_std"] == sum(len(row) == 1 for row in totals) / 6
    argv[2] = "2"
    train(tmp_path / "few", *argv, "--eval_samples_per_prompt", "4")
    assert json.loads((tmp_path / "few" / "samples-0.json").read_text()) == drawn[:2]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_what_a_run_saved_evaluates_as_the_run_did(tmp_path, adapted):
    """Checkpoint, final model and adapter, each by itself."""
    few = ["--eval_samples", "12", "--max_completion_length", "40"]
    argv = [*SHORT, *few, "--save_steps", "2", "--learning_rate", "1e-2", "--warmup_ratio", "0"]
    peft = ["--use_peft"] * adapted
    train(tmp_path / "run", *argv, *peft)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    before, after = lines[0], lines[-1]
    assert after["eval/mean_length"] != before["eval/mean_length"], "nothing learned: blunt"
    run, saved = tmp_path / "run", []
    if adapted:
        base = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:flowers"]
        for adapter in ("checkpoint-2", "final/adapter"):
            saved.append([*base, *peft, "--adapter_name_or_path", str(run / adapter)])
    for model in ["final"] if adapted else ["checkpoint-2", "final"]:
        saved.append(["--model_name_or_path", str(run / model), "--dataset_name", "demo:flowers"])
    for number, flags in enumerate(saved):
        (line,) = train(tmp_path / f"{number}", "--eval_only", *few, *flags)
        own = [name for name in line if name.startswith("eval/")]
        assert {name: line[name] for name in own} == {name: after[name] for name in own}, flags


@pytest.mark.slow
def test_evaluation_alone_loads_neither_reference_nor_optimizer(tmp_path, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("not for an evaluation")

    for name in ("_load_policy", "_load_reference", "Optimizer"):
        monkeypatch.setattr(grpo.engine.load, name, never)
    argv = ["--eval_only", "--eval_samples", "2", "--max_completion_length", "8"]
    train(tmp_path / "run", *argv, "--learning_rate", "1")
    out = capsys.readouterr().out
    assert "evaluates 2 rows" in out and "reference" not in out
    with pytest.raises(
        ValueError, match="--eval_only with --use_peft needs --adapter_name_or_path"
    ):
        train_cls.main([*argv, "--use_peft", "--output_dir", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="auto does not go with --eval_only"):
        again = ["--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path / "run")]
        train_cls.main([*argv, *again])


# ---- the shared photographs ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared photographs are not here")
def test_real_photographs_train_in_every_form(tmp_path):
    rows = load(str(SHARED / "clothing"), "train")
    forms = {"folders": class_folders(rows, tmp_path / "photos")}
    for name, table in chats(rows).items():
        forms[name] = tmp_path / f"{name}.jsonl"
        forms[name].write_text("".join(json.dumps(row) + "\n" for row in table))
        assert contents(load(str(forms[name]), "train")) == contents(rows)
    few = [*SHORT, "--max_pixels", "12544", "--max_steps", "1", "--max_prompt_length", "2000"]
    few += ["--model_name_or_path", str(CHECKPOINT)]
    for name in ("folders", "vlm-r1"):
        train(tmp_path / f"run {name}", *few, "--dataset_name", str(forms[name]))
    cards = load(str(SHARED / "cards"), "train")
    coco_file(cards, tmp_path / "cards" / "train" / "_annotations.coco.json")
    coco_file(load(str(SHARED / "cards"), "test"), tmp_path / "cards/test/_annotations.coco.json")
    found = load(str(tmp_path / "cards"), "train")
    assert [row.image_keys for row in found] == [row.image_keys for row in cards]
    argv = [*few, "--dataset_name", str(tmp_path / "cards")]
    lines = train(tmp_path / "run cards", *argv, script=train_det)
    assert "eval/AP" in lines[0]
