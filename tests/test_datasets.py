"""Several data sets at once: names, prompts by weight, checks, frames, metrics, files, resuming."""

import json
import random
import shutil
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from PIL import Image

import train_cls
import train_det
from data.check import load_splits
from data.errors import UserError
from data.flowers import SPECIES, rows
from data.load import find_form
from data.sets import short_names
from data.stream import PromptStream, WeightedStream
from grpo.flags.combine import without_effect
from grpo.flags.config import TrainingConfig
from grpo.plan.plan import open_questions, sources
from grpo.report.charts import charts_of, set_of
from grpo.report.gallery import frames_for, training_groups
from grpo.report.page import headline, run_page
from grpo.report.pictures import Album
from grpo.report.read import Completions, read_run
from grpo.reward import Record
from grpo.rollout import Group
from grpo.run.checkpoint import State
from grpo.run.data import Data
from grpo.run.metrics import evaluation_metrics, rollout_metrics
from grpo.run.resume import read_state
from grpo.run.same import data_facts
from models.processor import Processor
from rewards.coco import average_precisions
from tests.runs import CHECKPOINT, read_lines, read_steps, timeless, train
from tests.test_cli import parse

PROCESSOR = Processor(CHECKPOINT)
FEW = ["--model_name_or_path", str(CHECKPOINT), "--max_steps", "3", "--prompts_per_step", "4"]
FEW += ["--num_generations", "2", "--max_completion_length", "24", "--learning_rate", "1e-3"]
FEW += ["--warmup_ratio", "0", "--save_steps", "2", "--eval_samples_per_prompt", "2"]
FEW += ["--eval_samples", "3"]


def save_table(folder, split: str, table: list[dict]):
    """A split of rows in a folder; images are saved beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for number, row in enumerate(table):
        row["image"].save(folder / f"{split}-{number}.png")
        saved.append({**row, "image": f"{split}-{number}.png"})
    (folder / f"{split}.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The demo's flowers in two data sets of six species each, 18 and 12 rows to train on."""
    root = tmp_path_factory.mktemp("halves")
    early = [species.name for species in SPECIES[:6]]
    for split, count in (("train", 36), ("test", 12)):
        tables = {"early": [], "late": []}
        for row in rows(split, count):
            tables["early" if row["solution"][8:-9] in early else "late"].append(row)
        save_table(root / "early", split, tables["early"])
        save_table(root / "late", split, tables["late"][: 12 if split == "train" else None])
    return [str(root / "early"), str(root / "late")]


@pytest.fixture(scope="module")
def weighted(halves, tmp_path_factory):
    """A run on both, weights 3 to 1."""
    folder = tmp_path_factory.mktemp("weighted") / "run"
    train(folder, *FEW, "--dataset_name", *halves, "--dataset_weights", "3", "1")
    return folder


def loaded(*names, script=train_cls, **flags) -> tuple:
    """(config, Data) of data sets by these names."""
    config = script.Config(dataset_name=[str(name) for name in names], **flags)
    config.given = frozenset(flags)
    train_rows, held_out = load_splits(config, PROCESSOR, lambda items, *_: items)
    sizes, samples = (None, 0, 0), config.eval_samples
    return config, Data(train_rows, held_out, PROCESSOR, CHECKPOINT, sizes, samples)


# ---- names and flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, names",
    [
        (["photos/flowers/", "x/pets.jsonl"], ["flowers", "pets"]),
        (["laolao77/ViRFT_CLS_flower_4_shot", "a/b.v2"], ["ViRFT_CLS_flower_4_shot", "b.v2"]),
        (["a/train.json", "b/train.json"], ["a", "b"]),
        (["a/x/train.json", "b/x/train.json"], ["a_x_train", "b_x_train"]),
        (["a/train.json", "b/train.json", "c/a"], ["a_train", "b_train", "a"]),
        (["demo:flowers", "one, two/"], ["flowers", "one_two"]),
        (["a b", "a_b"], ["a_b", "a_b-2"]),
        (["x/AP", "花/"], ["AP-2", "花"]),
        (["x" * 250, "x" * 251, "b"], ["x" * 60, "x" * 60 + "-2", "b"]),
        (["/", "///"], ["data", "data-2"]),
    ],
)
def test_short_names(given, names):
    assert short_names(given) == names


def test_one_name_is_a_list_of_one_and_a_comma_is_part_of_it(tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\ndataset_name: x, y\n")
    for argv in (["--config", str(tmp_path / "a.yaml")], ["--model_name_or_path", "m"]):
        name = [] if "--config" in argv else ["--dataset_name", "x, y"]
        assert parse(*argv, *name)[0].dataset_name == ["x, y"]
    words = ["--model-name-or-path=m", "--dataset-name", "a,b", "c", "--dataset_weights", "3,1"]
    config, _ = parse(*words)
    assert (config.dataset_name, config.dataset_weights) == (["a,b", "c"], [3, 1])
    assert parse(words[0], "--dataset_name=-x")[0].dataset_name == ["-x"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("a a/", "names one data set twice, a and a/: leave one out"),
        ("a --dataset-name=b", "--dataset_name is there twice: for several, --dataset_name a b"),
        ("a b --dataset_weights 1", "a number for each of the 2 data sets, and has 1"),
        ("a b --dataset_weights 1 2 3", "a number for each of the 2 data sets, and has 3"),
        ("a b --dataset_weights 1 0", "is 0 for b: leave that data set out"),
        ("a b --dataset_weights 1,-1", "is -1.0; it must be at least 0"),
        ("a b --dataset_weights nan 1", "is nan; it must be finite"),
        ("a b --interleave_prob 0.5 0.5", "use --dataset_weights, one number for each name"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse("--model_name_or_path", "m", "--dataset_name", *words.split())


def test_commas_between_names_are_no_path(tmp_path):
    for names in (f"{tmp_path}/a,{tmp_path}/b", "me/a, me/b"):
        with pytest.raises(UserError, match="with blanks between them: --dataset_name .*a .*b$"):
            find_form(names)


def test_a_link_to_a_data_set_is_that_data_set(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="names one data set twice, .*a and .*b: leave one out"):
        parse("--model_name_or_path=m", "--dataset_name", f"{tmp_path}/a", f"{tmp_path}/b")


def test_weights_of_one_data_set_have_no_effect():
    config, _ = parse("--model_name_or_path=m", "--dataset_name=d", "--dataset_weights", "3", "1")
    (sentence,) = without_effect(config, world=1)
    assert sentence == "--dataset_weights has no effect: there is one data set"


def test_a_checkpoint_of_before_there_could_be_several_is_resumed(tmp_path):
    """Its state.json has the one name as a text."""
    config = TrainingConfig(model_name_or_path="m", dataset_name="d", max_steps=5)
    state = asdict(State(step=2, steps=5, config={**asdict(config), "dataset_name": "d"}))
    assert read_state(tmp_path, state, config, 5, {}).step == 2
    other = TrainingConfig(model_name_or_path="m", dataset_name=["d", "e"], max_steps=5)
    with pytest.raises(UserError, match=r"--dataset_name: 'd' then, \['d', 'e'\] now"):
        read_state(tmp_path, state, other, 5, {})


# ---- drawing ------------------------------------------------------------------------------------


def test_any_four_prompts_are_three_and_one():
    drawn = WeightedStream({"a": 7, "b": 5}, [3, 1], seed=1).next(400)
    for start in range(len(drawn) - 3):
        assert sum(number < 7 for number in drawn[start : start + 4]) == 3


@pytest.mark.parametrize("weights", [[1, 1], [0.1, 0.2, 0.7], [5, 1, 1, 9, 2], [1e-6, 1], [1e9, 3]])
def test_prompts_are_drawn_in_proportion_each_row_once_an_epoch_of_its_set(weights):
    sizes = {f"set {i}": 3 + 4 * i for i in range(len(weights))}
    stream, count = WeightedStream(sizes, weights, seed=3), 500
    chance, drawn = random.Random(0), []
    while len(drawn) < count:  # whatever a step's size, and resumed after each
        drawn += stream.next(chance.randrange(9))
        saved = json.loads(json.dumps(stream.state()))
        stream = WeightedStream(sizes, weights, seed=3, saved=saved)
    assert drawn == WeightedStream(sizes, weights, seed=3).next(len(drawn))
    start = 0
    for (name, size), weight in zip(sizes.items(), weights, strict=True):
        own = [number - start for number in drawn if start <= number < start + size]
        assert (
            abs(len(own) - len(drawn) * weight / sum(weights)) < len(weights) - 1 or len(own) == 0
        )
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert own == PromptStream(size, f"3/{name}").next(len(own))
        assert stream.epochs[f"epoch/{name}"] == pytest.approx(len(own) / size)
        start += size
    assert stream.epochs["epoch"] == len(drawn) / start


# ---- reading ------------------------------------------------------------------------------------


def test_each_set_is_read_by_itself_and_named(halves, tmp_path):
    """Its own splits, its own list of classes; its name in the plan; flags that one has no use
    for."""
    for split in ("a", "b"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number, row in enumerate(rows(f"photos {split}", 5)):
            row["image"].save(tmp_path / "photos" / split / f"{number}.png")
    config, data = loaded(*halves, tmp_path / "photos", test_share=0.2, eval_samples=2)
    assert [(r.dataset, r.index) for r in (data.rows[17], data.rows[18], data.rows[-1])] == [
        ("early", 17), ("late", 0), ("photos", 7)]  # fmt: skip
    assert len(data.rows) == 18 + 12 + 8 and "a, b" in data.rows[-1].problem
    assert [row.dataset for row in data.eval_rows] == ["early"] * 2 + ["late"] * 2 + ["photos"] * 2
    assert sources(config, data)[1:] == [
        f"data      late ({halves[1]}): 12 rows to train on, 2 held out, 31.6% of the prompts",
        f"data      photos ({tmp_path}/photos): 8 rows to train on, 2 held out, "
        "21.1% of the prompts",
        "data      together 38 rows, 6 held out; prompts each row once an epoch",
    ]
    plan = "\n".join(open_questions(data.rows))
    assert f"early: --test_share has no effect: {halves[0]} has a split 'test'" in plan
    assert "photos: 2 of 10 rows are held out" in plan and "prompt    photos: What does" in plan
    with pytest.raises(UserError, match="--test_share has no effect: .*early has a split"):
        loaded(*halves, test_share=0.2)
    with pytest.raises(UserError, match="--prompt_template has no effect: .*late has prompts"):
        loaded(*halves, prompt_template="Which?")


def test_faults_are_named_with_their_own_set(halves, tmp_path):
    with pytest.raises(UserError, match="--dataset_name .*nowhere.json: no such file"):
        loaded(halves[0], tmp_path / "nowhere.json")
    table = rows("train", 3)
    table[1]["solution"] = ""
    _, data = loaded(halves[0], save_table(tmp_path / "third", "train", table))
    assert [len(split.faults) for split in data.splits] == [0, 1, 0, 0]
    argv = [*FEW, "--dataset_name", halves[0], str(tmp_path / "third")]
    with pytest.raises(UserError) as caught:
        train_cls.main(argv)
    assert str(caught.value).startswith(
        f"{tmp_path / 'third'}, split 'train': 1 bad row\n  row 1 ("
    )


def test_what_one_set_holds_out_and_another_trains_on_is_counted(halves, tmp_path):
    seen = save_table(tmp_path / "third", "train", rows("test", 2))
    _, data = loaded(*halves, seen)
    (note,) = data.rows.notes
    assert note.startswith("2 images are held out of early and trained on in third: ")
    _, twice = loaded(halves[0], halves[0] + "/train.json")
    assert twice.rows.notes[0] == "18 images are trained on in early and in train"
    assert f"data      {note}" in open_questions(data.rows)


def test_aliases_may_be_of_any_set(halves, tmp_path):
    late = train_cls.read_class(loaded(halves[1])[1].rows[0].solution)
    (tmp_path / "aliases.json").write_text(json.dumps({late: ["x"], "no such class": ["y"]}))
    config, data = loaded(*halves, aliases=str(tmp_path / "aliases.json"))
    train_cls.read_task(config, data, [])
    assert data.rows.notes == ["--aliases: no class of the data set is no such class"]


def test_facts_tell_the_sets_apart(halves):
    def facts(*names):
        return data_facts(loaded(*names)[1], "task", "dtype", False)

    both = facts(*halves)
    assert both["the data sets"] == "early 18 + 6, late 12 + 6"
    assert "the data sets" not in facts(halves[0])
    assert both["the data set"] != facts(*reversed(halves))["the data set"]


# ---- boxes --------------------------------------------------------------------------------------

BOXES = "<answer>[{{'Position': {}, 'Confidence': 1.0}}]</answer>"


def boxes_set(folder, asks: str, box: list[int], category: str = "cup"):
    """A data set of boxes, two rows to train on and one held out, in images of 400 x 300."""
    problem = f"Detect category '{category}', {asks}."
    table = [
        {"image": Image.new("RGB", (400, 300), (60 * i, 90, box[0])), "problem": problem,
         "solution": BOXES.format(box)}
        for i in range(3)
    ]  # fmt: skip
    save_table(folder, "train", table[:2])
    return save_table(folder, "test", table[2:])


@pytest.fixture
def two_frames(tmp_path):
    pixels = boxes_set(tmp_path / "px", "in pixels of the image", [40, 30, 400, 300])
    return pixels, boxes_set(tmp_path / "th", "from 0 to 1000", [100, 100, 900, 800], "pen")


def test_each_set_has_its_own_frame(two_frames):
    config, data = loaded(*two_frames, script=train_det)
    task = train_det.read_task(config, data, [])
    in_pixels, in_thousandths = data.rows[0], data.rows[2]
    assert task.frames.answer(in_pixels) == (400, 300)
    assert task.frames.answer(in_thousandths) == (1000, 1000)
    assert "px: solutions count pixels of the image" in str(task)
    assert "\nframes    th: solutions count thousandths" in str(task)
    config.box_frame = "thousandths"
    task = train_det.read_task(config, data, [])
    assert "[100, 100, 1000, 1000]" in task.solution(in_pixels)
    assert task.solution(in_thousandths) == in_thousandths.solution
    sizes = {"answers": "thousandths", "resized": {}}
    assert task.frames.described([(400, 300)]) == {"sets": {"px": sizes, "th": sizes}}


def test_data_frame_is_for_the_sets_whose_form_does_not_say_it(two_frames, tmp_path):
    """COCO counts pixels, whatever the flag says; it is refused where no set has a use for it."""
    folders = [tmp_path / name / "train" for name in ("coco", "other")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        Image.new("RGB", (400, 300), (9, 9, number)).save(folder / "0.png")
        image = {"id": 0, "file_name": "0.png", "width": 400, "height": 300}
        box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [40, 30, 100, 60]}
        content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    flags = {"script": train_det, "data_frame": "thousandths", "box_frame": "thousandths"}
    config, data = loaded(folders[0].parent, two_frames[1], **flags)
    frames = train_det.read_task(config, data, []).frames.sets
    assert (frames["coco"].solutions, frames["th"].solutions) == ("pixels", "thousandths")
    assert "--data_frame thousandths has no effect: it counts pixels" in data.rows.parts[0].notes
    config, data = loaded(*(folder.parent for folder in folders), **flags)
    with pytest.raises(UserError, match="coco: --data_frame thousandths: .*coco.* counts pixels"):
        train_det.read_task(config, data, [])


def test_average_precision_of_each_set_and_together(two_frames, tmp_path):
    """Their ids are the same; together an image of one is no image of the other, and a category of
    the same name is one."""
    config, data = loaded(*two_frames, script=train_det)
    task = train_det.read_task(config, data, [])
    right = [train_det.truth(row, task) for row in data.eval_rows]
    metrics, files = average_precisions(right, data.eval_rows, task.frames)
    wanted = {f"eval/{s}{m}": 1 for s in ("", "px/", "th/") for m in ("AP", "AP50")}
    wanted |= {f"eval/{s}AP50/{n}": 1 for s, n in (("", "cup"), ("", "pen"))}
    assert metrics == pytest.approx(wanted | {"eval/px/AP50/cup": 1, "eval/th/AP50/pen": 1})
    assert files["coco-px"][0]["bbox"] == pytest.approx([40, 30, 360, 270])
    assert files["coco-th"][0]["bbox"] == pytest.approx([40, 30, 320, 210])
    metrics, _ = average_precisions([right[0], None], data.eval_rows, task.frames)
    assert metrics["eval/AP50"] == pytest.approx(0.5)
    assert (metrics["eval/px/AP50"], metrics["eval/th/AP50"]) == pytest.approx((1, 0))
    cups = boxes_set(tmp_path / "cups", "from 0 to 1000", [100, 100, 900, 800])
    config, data = loaded(two_frames[0], cups, script=train_det)
    task = train_det.read_task(config, data, [])
    both = ", ".join(
        f"{{'Position': {box}, 'Confidence': 0.9}}"
        for box in ([100, 100, 1000, 1000], [100, 100, 900, 800])
    )  # of px's image and of its own
    metrics, _ = average_precisions([None, f"[{both}]"], data.eval_rows, task.frames)
    assert {name for name in metrics if "AP50/" in name} == {
        "eval/AP50/cup", "eval/cups/AP50/cup", "eval/px/AP50/cup"}  # fmt: skip
    assert metrics["eval/AP50/cup"] < 0.6 and metrics["eval/px/AP50"] == 0


def test_a_set_of_another_script_is_named_with_a_command_that_works(halves, two_frames, tmp_path):
    argv = ["--dataset-weights", "3", "1", "1", "--dataset_name", *halves, str(two_frames[0])]
    config, data = loaded(*halves, two_frames[0])
    with pytest.raises(UserError) as caught:
        train_cls.read_task(config, data, [*argv, "--beta", "0", "--aliases", "x"])
    text = str(caught.value)
    assert (
        text.startswith(f"{two_frames[0]}, split 'train': row 0 (") and "a boxes solution" in text
    )
    assert "Leave it out here, and for it run (without --aliases, which it does not know):" in text
    assert text.endswith(f"torchrun train_det.py --beta 0 --dataset_name {two_frames[0]}")
    config, data = loaded(*two_frames)
    with pytest.raises(UserError) as caught:  # all of them: the whole command
        train_cls.read_task(config, data, argv)
    assert str(caught.value).endswith(f"torchrun train_det.py {' '.join(argv)}")
    one = {"image": Image.new("RGB", (400, 300)), "problem": "Find it."}
    one |= {"solution": "<answer>(10,10),(200,280)</answer>"}
    config, data = loaded(two_frames[0], save_table(tmp_path / "g", "train", [one] * 2))
    with pytest.raises(UserError, match=r"differ \(.*px: boxes; .*g: grounding\): one run trains"):
        train_det.read_task(train_det.Config(dataset_name="d"), data, [])


# ---- a run --------------------------------------------------------------------------------------


def test_numbers_of_a_set_are_of_its_own_completions_and_prompts_of_all_that_were_drawn():
    def record(dataset: str, value: float) -> Record:
        return Record(0, "t", None, "", {"a": value}, {}, value, 1, False, dataset)

    drawn = [[record("x", 1.0), record("x", 0.0)], [record("y", 0.0), record("y", 0.0)]]
    metrics = evaluation_metrics([of_row[0] for of_row in drawn], drawn)
    assert (metrics["eval/x/pass@2/a"], metrics["eval/y/pass@2/a"]) == (1, 0)
    assert (metrics["eval/x/a"], metrics["eval/y/a"], metrics["eval/a"]) == (1, 0, 0.5)
    kept = Group(None, [], row=SimpleNamespace(dataset="x"), records=drawn[0])
    metrics = rollout_metrics([kept], {"x": 3, "y": 1})
    assert (metrics["sampling/x/prompts"], metrics["sampling/y/prompts"]) == (3, 1)
    assert metrics["reward/x"] == 0.5 and "reward/y" not in metrics


def test_a_run_counts_names_and_measures_each_set(weighted):
    completions = read_lines(weighted / "completions.jsonl")
    prompts = [line["dataset"] for line in completions if line["sample"] == 0]
    assert Counter(prompts) == {"early": 9, "late": 3}
    assert {line["row"] for line in completions if line["dataset"] == "late"} <= set(range(12))
    for line in read_steps(weighted)[1:]:
        of_step = [one for one in completions if one["step"] == line["step"]]
        for name, count in (("early", 3), ("late", 1)):
            own = [one["reward"] for one in of_step if one["dataset"] == name]
            assert line[f"sampling/{name}/prompts"] == count
            assert line[f"reward/{name}"] == pytest.approx(sum(own) / len(own))
        mean = (3 * line["rewards/early/format/mean"] + line["rewards/late/format/mean"]) / 4
        assert line["rewards/format/mean"] == pytest.approx(mean)
        assert line["completions/late/mean_length"] > 0 and "reward_std/early" in line
    assert (line["epoch"], line["epoch/early"], line["epoch/late"]) == (12 / 30, 9 / 18, 3 / 12)
    answers = read_lines(weighted / "eval-3.jsonl")
    assert Counter(one["dataset"] for one in answers) == {"early": 3, "late": 3}
    for name in ("early", "late"):
        own = [one["rewards"]["accuracy"] for one in answers if one["dataset"] == name]
        assert line[f"eval/{name}/accuracy"] == pytest.approx(sum(own) / len(own))
        assert f"eval/{name}/pass@2/accuracy" in line
    assert line["eval/accuracy"] == pytest.approx(
        sum(one["rewards"]["accuracy"] for one in answers) / 6
    )


def test_it_is_resumed_exactly(weighted, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(weighted, again)
    shutil.rmtree(again / "final")
    train(again, "--resume_from_checkpoint", "auto")
    for name in ("completions.jsonl", "final/model.safetensors", "eval-3.jsonl"):
        assert (again / name).read_bytes() == (weighted / name).read_bytes(), name
    assert timeless(read_steps(again)) == timeless(read_steps(weighted))
    more = ["--resume_from_checkpoint", "auto", "--max_steps", "4", "--dataset_weights", "1", "1"]
    with pytest.raises(UserError, match=r"--dataset_weights: \[3.0, 1.0\] then, \[1.0, 1.0\] now"):
        train(again, *more)


def test_a_set_may_be_called_as_a_term_is():
    """Which numbers are of which set, where a name alone does not tell."""
    own = ["reward/accuracy", "rewards/accuracy/format/mean", "eval/accuracy/pass@2/format"]
    own += ["completions/accuracy/mean_length", "sampling/accuracy/prompts", "epoch/accuracy"]
    joint = ["rewards/accuracy/mean", "eval/accuracy", "eval/mean@2/accuracy", "eval/AP50/other"]
    joint += ["dead_groups/other", "sampling/prompts", "reward"]
    for name in own + joint:
        assert bool(set_of(name, ("accuracy", "other"))[0]) == (name in own), name
    assert set_of(own[1], ("accuracy",)) == ("accuracy", "rewards/format/mean")


def test_its_report_shows_each_set(weighted, halves):
    run = read_run(weighted)
    assert run.datasets == dict(zip(("early", "late"), halves, strict=True))
    charts = {chart["title"]: [line["name"] for line in chart["lines"]] for chart in charts_of(run)}
    terms = ["accuracy", "format", "mean@2/accuracy", "pass@2/accuracy"]
    for title in ("Held out", "Held out: early", "Held out: late"):
        assert set(terms) <= set(charts[title]), title
        assert not any(name.startswith(("early", "late")) for name in charts[title])
    assert charts["Reward: late"] == ["reward"]
    assert {"accuracy", "early/accuracy", "late/accuracy"} <= {
        line["name"] for line in headline(run)
    }
    album = Album(run.config, run.wording, run.datasets)
    assert {key for _, answers in run.answers() for key in answers} >= {("early", 2), ("late", 2)}
    solutions = [album.row(True, name, 2).solution for name in ("early", "late")]
    assert len(set(solutions)) == 2 and not album.notes
    assert album.picture(False, "early", 0).uri != album.picture(False, "late", 0).uri
    completions = Completions(weighted / "completions.jsonl")
    for group in training_groups(run, completions, album):
        name = completions.group(group["step"], group["prompt"])[0]["dataset"]
        assert group["class"].startswith(f"{name}: ")
        assert group["picture"] is album.picture(False, name, group["row"])
    frames = SimpleNamespace(frames={"sets": {"early": {"answers": "pixels"}, "late": {}}})
    assert frames_for(frames, "late") == {}
    assert album.row(True, "late", 1).called == "row 1 of late"
    assert album.row(False, "late", 99) is None
    assert album.notes == ["rows are missing: the data set late has fewer of them now"]
    page = run_page(run)
    assert "Row 2 of late: <bdi>" in page and ">late: " in page and "term by term: early" in page
