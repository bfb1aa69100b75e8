"""Visual-RFT's table: its rule beside ours in one evaluation, and docs/reproduce.md."""

import json
import re
import subprocess
from io import BytesIO
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

import train_cls
from benchmarks import virft
from data.load import read_splits
from data.wording import Wording
from grpo.flags.combine import without_effect
from grpo.flags.parser import parse_config
from grpo.rollout import Group
from models.processor import Processor
from rewards.cls import visual_rft_accuracy
from tests.runs import CHECKPOINT, ROOT, read_lines

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


# ---- the sets and the table ---------------------------------------------------------------------

NAMES = ["rose_garden", "F/A-18", "colts foot"]
HUB: dict[str, dict] = {}
FOLDERS = {"flowers": "jpg", "pets": "images", "aircraft": "images", "cars": "cars_test"}


def lists(folder: Path, name: str) -> list[str]:
    """A stand-in of Visual-RFT's list of a set: two test images of each class; their names."""
    folder.mkdir(exist_ok=True)
    files = [f"{number:05d}.jpg" for number in range(6)]
    entries = [
        {f"/mnt/x/data/{FOLDERS[name]}/{file}": {"label": torch.tensor(n % 3), "pred": None}}
        for n, file in enumerate(files)
    ]
    torch.save(entries, folder / f"{virft.SETS[name].lists}.pth")
    (folder / f"{virft.SETS[name].lists}.txt").write_text("\n".join(NAMES))
    return files


def picture(color: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (color, 5, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


def photographs(folder: Path, name: str, files: list[str], form: str) -> Path | str:
    """The test images as a benchmark's own folder, a parquet or a save_to_disk folder holds them.
    Others of the same names are beside them, as in Cars196: of the training split."""
    if form == "folder":
        for n, file in enumerate(files):
            for inside, color in ((FOLDERS[name], 20 * n), ("cars_train", 250)):
                (folder / "data" / inside).mkdir(parents=True, exist_ok=True)
                (folder / "data" / inside / file).write_bytes(picture(color))
        return folder
    sets = {}
    for split, first in (("train", 120), ("test", 0)):
        images = [{"bytes": picture(first + 20 * n), "path": f} for n, f in enumerate(files)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = {"image": images, "label": [0] * len(files)}
        sets[split] = datasets.Dataset.from_dict(table, features=features)
    if form == "hub":
        HUB["me/photographs"] = sets
        return "me/photographs"
    if form == "saved":
        datasets.DatasetDict(sets).save_to_disk(folder)
    else:
        folder.mkdir()
        for split, of_split in sets.items():
            of_split.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def few(folder: Path, names=NAMES) -> Path:
    """A stand-in of a ViRFT set on the hub: two rows of each class, its own problems."""
    folder.mkdir()
    rows = []
    for n, name in enumerate(names * 2):
        (folder / f"{n}.jpg").write_bytes(picture(100 + 20 * n))
        rows.append(
            {"image": f"{n}.jpg", "problem": "Which?", "solution": f"<answer>{name}</answer>"}
        )
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def table_of(folder: Path, **splits: dict[str, int]) -> Path:
    """A parquet of pictures: split -> the name that a file had -> its color."""
    folder.mkdir(exist_ok=True)
    for split, colors in splits.items():
        images = [{"bytes": picture(red), "path": name} for name, red in colors.items()]
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": images}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def made(root: Path, name: str, form: str = "folder") -> Path:
    files = lists(root / "lists", name)
    source = photographs(root / f"images-{name}-{form}", name, files, form)
    rows = few(root / f"rows-{name}-{form}")
    virft.main(
        ["make", name, str(source), "--lists", str(root / "lists"), "--rows", str(rows)]
        + ["--to", str(root / "virft")]
    )
    return root / "virft" / name


@pytest.mark.parametrize("form", ["folder", "parquet", "saved", "hub"])
def test_a_set_is_made_of_its_lists_from_each_form(tmp_path, monkeypatch, capsys, form):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: HUB[name])
    target = made(tmp_path, "cars", form)
    assert capsys.readouterr().out == f"{target}: 3 classes, 6 training and 6 test images\n"
    train, test = read_splits(str(target), "train", None, None, Wording())
    for split, rows, first in (("train", train, 100), ("test", test, 0)):
        reds = {}
        for row in rows:
            red = Image.open(row.images[0]).convert("RGB").getpixel((9, 9))[0]
            reds.setdefault(row.solution, []).append(round((red - first) / 20))
        assert {name: sorted(of) for name, of in reds.items()} == {
            "rose garden": [0, 3], "F/A-18": [1, 4], "colts foot": [2, 5],
        }, split  # fmt: skip
    settings = yaml.safe_load((tmp_path / "virft" / "cars-think.yaml").read_text())
    assert settings["dataset_name"] == str(target)
    assert "identify the model of the car based" in settings["prompt_template"]


def reds(source: Path, wanted: list[str]) -> list[int]:
    found = virft.find_images(str(source), wanted)
    opened = [Image.open(BytesIO(x) if isinstance(x, bytes) else x) for x in found.values()]
    return [round(image.getpixel((9, 9))[0], -1) for image in opened]


def test_photographs_of_one_name_are_told_apart(tmp_path):
    """Cars196 has a cars_train/00001.jpg and a cars_test/00001.jpg."""
    name, (train, test) = "1.jpg", (f"cars_{split}/1.jpg" for split in ("train", "test"))
    both = table_of(tmp_path / "both", train={test: 10, train: 200})
    assert reds(both, [test]) == [10] and reds(both, [train]) == [200]
    alone = table_of(tmp_path / "alone", train={name: 200}, test={name: 10})
    assert reds(alone, [test]) == [10]
    for source in (table_of(tmp_path / "a", train={name: 200}),
                   table_of(tmp_path / "b", train={train: 200})):  # fmt: skip
        with pytest.raises(virft.UserError, match=f"no image {test}"):
            virft.find_images(str(source), [test])
    assert reds(tmp_path / "a", ["jpg/1.jpg"]) == [200], "other sets call none of them the same"
    with pytest.raises(virft.UserError, match="2 files called jpg/1.jpg"):
        virft.find_images(str(table_of(tmp_path / "c", train={name: 1}, val={name: 2})), [
            "jpg/1.jpg"
        ])  # fmt: skip
    files = photographs(tmp_path / "files", "cars", [name], "folder")
    table_of(files, train={name: 200})
    assert reds(files, [test]) == [0], "a table beside the photographs is not asked"


def test_training_classes_have_the_names_of_the_list(tmp_path, capsys):
    """Else the two splits would hold two classes that count as one."""
    files = lists(tmp_path / "lists", "pets")
    source = photographs(tmp_path / "images", "pets", files, "folder")
    rows = few(tmp_path / "rows", ["Rose-Garden", "f/a-18", "Colts foot", "tricycle"])
    argv = ["make", "pets", str(source), "--lists", str(tmp_path / "lists"), "--rows", str(rows)]
    virft.main([*argv, "--to", str(tmp_path / "virft")])
    train, test = read_splits(str(tmp_path / "virft/pets"), "train", None, None, Wording())
    assert {row.solution for row in train} == {row.solution for row in test} | {"tricycle"}
    assert capsys.readouterr().out.endswith("\nnote: no test image of tricycle\n")


def test_what_is_wrong_with_the_sources_is_named(tmp_path, capsys):
    files = lists(tmp_path / "lists", "pets")
    source = photographs(tmp_path / "images", "pets", files, "folder")
    rows = few(tmp_path / "rows", ["rose garden", "colts foot"])
    argv = ["make", "pets", str(source), "--lists", str(tmp_path / "lists"), "--rows", str(rows)]
    argv += ["--to", str(tmp_path / "virft")]

    def refused(*changed: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            virft.main([*argv, *changed])
        return capsys.readouterr().err

    (source / "data/images" / files[0]).unlink()
    assert f"no image images/{files[0]}; give the folder in which images/ lies" in refused()
    (source / "data/images" / files[0]).write_bytes(picture(0))
    assert "pets.txt: missing" in refused("--lists", str(tmp_path))
    (tmp_path / "lists/pets.txt").write_text("one class")
    assert "not the list of images and labels of" in refused()
    lists(tmp_path / "lists", "pets")
    torch.save([], tmp_path / "lists/pets.pth")
    assert "no image, an image twice" in refused()
    lists(tmp_path / "lists", "pets")
    (source / "data/images" / files[0]).write_bytes(b"")
    assert f"{files[0]}: " in refused()
    (source / "data/images" / files[0]).write_bytes(picture(0))
    other = few(tmp_path / "other", ["tricycle"])
    assert f"{other}: none of its classes is in the list" in refused("--rows", str(other))
    (other / "train.json").write_text((rows / "train.json").read_text())
    assert f"error: {other}, row 2: {other}/2.jpg: missing" in refused("--rows", str(other))
    (other / "train.json").write_text(
        json.dumps([{"image": "0.jpg", "problem": "?", "solution": ""}])
    )
    assert f"{other}, row 0" in refused("--rows", str(other))
    assert not list(tmp_path.glob("virft/*"))
    virft.main(argv)
    assert "note: no training image of F/A-18" in capsys.readouterr().out
    assert "is there already" in refused()


def test_the_table_is_the_mean_over_seeds(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        virft.main(["table", str(tmp_path)])
    for n, name in enumerate(virft.SETS):
        figures = {
            "base": (0.4, 0.5),
            "seed-0-test": (0.6, 0.7),
            "seed-1-test": (0.7, 0.9 + n / 100),
        }
        for run, (right, published) in figures.items():
            folder = tmp_path / f"m-think-{name}" / run
            folder.mkdir(parents=True)
            line = {"eval/accuracy": right, "eval/accuracy_visual_rft": published}
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, **line}) + "\n")
            (folder / "config.yaml").write_text("eval_only: true")
    (tmp_path / "m-think-flowers" / "seed-0").mkdir()
    (tmp_path / "m-think-flowers" / "seed-0" / "metrics.jsonl").write_text("{}\n")
    capsys.readouterr()
    virft.main(["table", str(tmp_path)])
    head, _, base, trained = capsys.readouterr().out.splitlines()
    assert head == "| | seeds | average | flowers | pets | aircraft | cars |"
    assert base == "| m-think, base | - | 40.0 / 50.0 |" + " 40.0 / 50.0 |" * 4
    assert trained.startswith("| m-think, trained | 2 | 65.0 / 80.8 | 65.0 ± 7.1 / 80.0 ± 14.1 |")
    assert trained.endswith("| 65.0 ± 7.1 / 81.5 ± 16.3 |")


def test_what_is_no_figure_is_left_out_of_the_table_and_named(tmp_path, capsys):
    good = '{"eval/accuracy": 0.5, "eval/accuracy_visual_rft": 0.75}'
    runs = {
        "seed-0-test": ("", good),
        # the reward pays by the published rule
        "seed-1-test": ("", good.replace("}", ', "eval/accuracy_exact": 0.25}')),
        "seed-2-test": ("eval_samples: 2", good),
        "seed-3-test": ("", good[:-9]),
        "seed-4-test": ("", ""),  # stopped
        "seed-5-test": ("", "5"),
        "seed-6-test": ("", good.replace("0.5", "NaN")),
        "seed-7-test": ("", good.replace("0.5", "null")),
    }
    for name, (settings, line) in runs.items():
        folder = tmp_path / "m-think-pets" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(line)
        (folder / "config.yaml").write_text(f"eval_only: true\n{settings}")
    virft.main(["table", str(tmp_path)])
    _, _, trained, *notes = capsys.readouterr().out.splitlines()
    assert trained == "| m-think, trained | 2 | - | - | 37.5 ± 17.7 / 75.0 ± 0.0 | - | - |"
    assert [note.split(":")[1] for note in notes] == [
        f" left out {tmp_path}/m-think-pets/seed-{n}-test" for n in range(2, 8)
    ]
    assert "--eval_samples 2, not of all rows" in notes[0]


# ---- docs/reproduce.md --------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "reproduce.md").read_text()


def commands(card: int) -> list[list[str]]:
    """The page's commands, as bash would start them. card: which of its two lines is pasted."""
    making, runs = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    choices = re.findall(r"^(?:# )?card=.*\n", runs, flags=re.MULTILINE)
    assert len(choices) == 2 and choices[1].startswith("# ")
    runs = runs.replace(choices[0] + choices[1], choices[card].removeprefix("# "))
    stubs = "".join(f"{name}() {{ echo {name} $*; }}\n" for name in ("git", "python", "torchrun"))
    ran = subprocess.run(
        ["bash", "-eu", "-c", stubs + making + runs], capture_output=True, text=True, check=True
    )
    return [line.split() for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with stand-ins, virft/flowers and so on, as the page's first commands make them."""
    root = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(
            virft, "SETS", {n: s._replace(rows=f"few-{n}") for n, s in virft.SETS.items()}
        )
        for _, dash_m, module, *argv in commands(0)[1:5]:
            assert (dash_m, module) == ("-m", "benchmarks.virft")
            name, source, _, folder = argv[1:]
            few(root / f"few-{name}")
            Path(folder).mkdir(parents=True, exist_ok=True)
            photographs(Path(source), name, lists(Path(folder), name), "folder")
            virft.main(argv)
    return root


def test_the_question_stands_on_the_page():
    assert virft.question("flowers", "think").replace("\n", "\n    ") in PAGE
    assert "think" not in virft.question("pets", "answer")


@pytest.mark.parametrize("card", [0, 1])
def test_the_commands_of_the_page_combine(sets, monkeypatch, card):
    monkeypatch.chdir(sets)
    found = [argv for name, *argv in commands(card) if name == "torchrun"]
    assert len(found) == 4 * 4 * (1 + 3 * 2) and {script for script, *_ in found} == {
        "train_cls.py"
    }
    folders = set()
    for _, *argv in found:
        config = parse_config(train_cls.Config, argv)[0]
        assert without_effect(config, world=1) == []
        assert config.eval_only or (config.optim == "adamw_8bit") == bool(card)
        folders.add(config.output_dir)
    assert len(folders) == len(found)


@pytest.mark.slow
def test_the_page_from_its_runs_to_its_table(sets, monkeypatch, capsys):
    """One set, base, one seed, on the demo's model with two steps; then the last command."""
    monkeypatch.chdir(sets)
    small = ["--prompts_per_step", "2", "--num_generations", "2", "--max_completion_length", "40"]
    found = [argv for name, *argv in commands(1) if name == "torchrun"]
    outputs = [
        f"runs/virft/qwen2-vl-2b-think-pets/{run}" for run in ("base", "seed-0", "seed-0-test")
    ]
    for output in outputs:
        (argv,) = [argv[1:] for argv in found if argv[argv.index("--output_dir") + 1] == output]
        argv = [str(CHECKPOINT) if word.startswith("Qwen/") else word for word in argv]
        training = [] if "--eval_only" in argv else ["--max_steps", "2"]
        assert train_cls.main([*argv, *small[: 6 if training else 0], *training]) == 0
    said = capsys.readouterr().out
    assert "no effect" not in said and "identify the species of the pet" in said
    assert said.count("accuracy_visual_rft") >= 3
    last = commands(1)[-1]
    virft.main(last[3:])
    base, trained = capsys.readouterr().out.splitlines()[2:]
    assert base.startswith("| qwen2-vl-2b-think, base | - | - | - | ")
    assert trained.startswith("| qwen2-vl-2b-think, trained | 1 | - | - | ")
