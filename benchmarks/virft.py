"""Visual-RFT's fine-grained table (arXiv 2503.01785, table 2): its four sets, and its lines.

    python -m benchmarks.virft make flowers IMAGES --lists Visual-RFT/classification/val_data
    python -m benchmarks.virft table RUNS

The first writes class folders, virft/flowers/train and test, and how they are asked about with a
thought and without, virft/flowers-think.yaml and -answer.yaml, for --config. The training images
are those of the set on the hub (--rows: elsewhere). The test images and the names of the classes
are those of Visual-RFT's own lists, NAME.pth and NAME.txt; IMAGES has the photographs: the
benchmark's folder, or a copy of it as parquet or on the hub that has kept the files' names. The
second prints a line for each model, from run folders called as docs/reproduce.md does.

Not here: downloading photographs, and the benchmarks' own splits (data/published.py).
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import yaml

from data import files, tables
from data.errors import UserError
from data.folders import SLASH
from data.images import open_image, size_of
from data.load import find_form, load
from data.published import link
from data.wording import check_names
from rewards.cls import normalize, read_class


class Set(NamedTuple):
    """rows: the few shots on the hub; lists: their lists' name; shown, asked: in the question."""

    rows: str
    lists: str
    shown: str
    asked: str


SETS = {
    "flowers": Set("laolao77/ViRFT_CLS_flower_4_shot", "oxford_flowers", "a plant", "species"),
    "pets": Set("laolao77/ViRFT_CLS_pets37_4shot", "pets", "a pet", "species"),
    "aircraft": Set(
        "laolao77/ViRFT_CLS_fgvc_aircraft_4_shot", "fgvc_aircraft", "an aircraft", "model"
    ),
    "cars": Set("laolao77/ViRFT_CLS_car196_4shot", "stanford_cars", "a car", "model"),
}
# The question of its classification/Qwen2_VL_classification_infere.py, missing blank and all; and
# the same without the thought.
QUESTION = (
    "This is an image containing {shown}. Please identify the {asked} of the {kind} based on the "
    "image.\nOutput {give} <answer> </answer> tags.The output answer format should be as follows:\n"
    "{form}<answer>species name</answer>\nPlease strictly follow the format."
)
FORMATS = {
    "think": (
        "the thinking process in <think> </think> and final answer in",
        "<think> ... </think> ",
    ),
    "answer": ("the final answer in", ""),
}
EXACT, PUBLISHED = "eval/accuracy", "eval/accuracy_visual_rft"


# ---- the sets -----------------------------------------------------------------------------------


def question(name: str, answer_format: str) -> str:
    """How a set's images are asked about."""
    of_set, (give, form) = SETS[name], FORMATS[answer_format]
    kind = of_set.shown.split()[1]
    return QUESTION.format(shown=of_set.shown, asked=of_set.asked, kind=kind, give=give, form=form)


def make(name: str, images: str, lists: Path, rows: str | None, to: Path) -> str:
    """Writes a set and its two files of settings below `to`; a line about it. Raises UserError,
    before anything is written, if something is missing, is not what it should be, or is there."""
    target = to / name
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; remove it, or choose another --to")
    tested = read_list(lists / SETS[name].lists)
    sources = find_images(images, [file for of_class in tested.values() for file in of_class])
    trained = few_shots(rows or SETS[name].rows)
    for classes in (trained, tested):
        check_names(sorted(classes), f"{name}: the classes")
    trained, notes = spelled_as(tested, trained, rows or SETS[name].rows)
    partial = to / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for label, of_class in trained.items():
            for number, (called, image) in enumerate(of_class):
                try:
                    opened = open_image(image)
                except UserError as error:
                    file = "" if isinstance(image, bytes) else f"{image}: "
                    where = f"{rows or SETS[name].rows}, {called}"
                    raise UserError(f"{where}: {file}{error}") from error
                opened.save(folder(partial / "train", label) / f"{number}.png")
        for label, of_class in tested.items():
            for file in of_class:
                place = folder(partial / "test", label) / Path(file).name
                source = sources[file]
                place.write_bytes(source) if isinstance(source, bytes) else link(source, place)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for answer_format in FORMATS:
        settings = {"dataset_name": str(target), "answer_format": answer_format}
        settings["prompt_template"] = question(name, answer_format)
        (to / f"{name}-{answer_format}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    shots, count = (sum(map(len, of.values())) for of in (trained, tested))
    said = f"{target}: {len(tested)} classes, {shots} training and {count:,} test images"
    return "\n".join([said, *notes])


def spelled_as(tested: dict, trained: dict, rows: str) -> tuple[dict, list[str]]:
    """The training classes, spelled as in the list, and notes about classes that only one of the
    two has. Raises UserError if they have none in common."""
    spelled = {normalize(label): label for label in tested}
    named = {spelled.get(normalize(label), label): of for label, of in trained.items()}
    if not named.keys() & tested.keys():
        raise UserError(f"{rows}: none of its classes is in the list, such as {next(iter(tested))}")
    notes = []
    for split, of, others in (("training", named, tested), ("test", tested, named)):
        if lacking := [label for label in others if label not in of]:
            notes.append(f"note: no {split} image of {', '.join(lacking)}")
    return named, notes


def folder(root: Path, label: str) -> Path:
    path = root / label.strip().replace("/", SLASH)
    path.mkdir(parents=True, exist_ok=True)
    return path


def read_list(path: Path) -> dict[str, list[str]]:
    """Class -> the last two parts of its test images' paths, of path.pth and path.txt."""
    labels, where = Path(f"{path}.txt"), Path(f"{path}.pth")
    names = [line.strip() for line in files.read_text(labels).splitlines() if line.strip()]
    try:
        listed = torch.load(files.regular(where, files.SETTINGS), weights_only=True)
        pairs = [(file, int(of["label"])) for entry in listed for file, of in entry.items()]
        found = [("/".join(Path(file).parts[-2:]), names[number]) for file, number in pairs]
        if any(number < 0 for _, number in pairs) or len(dict(found)) < len(found) or not found:
            raise ValueError("no image, an image twice, or a label below 0")
    except UserError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds for what is none of its files
        text = str(error)[: files.SHOWN]
        raise UserError(
            f"{where}: not the list of images and labels of {labels}: {text}"
        ) from error
    of_class = defaultdict(list)
    for file, name in found:
        of_class[name].append(file)
    return dict(of_class)


def few_shots(name: str) -> dict[str, list[tuple]]:
    """Class -> what each of its training rows is called, and its image, a path or bytes."""
    of_class = defaultdict(list)
    for row in load(name, "train"):
        if row.fault or len(row.images) != 1:
            raise UserError(f"{name}, {row.called}: {row.fault or 'not one image'}")
        try:
            label = read_class(row.solution)
        except UserError as error:
            raise UserError(f"{name}, {row.called}: {error}") from error
        of_class[label].append((row.called, row.images[0]))
    return dict(of_class)


class Photo(NamedTuple):
    """A photograph. folder: "" in a table that has kept the file's name alone. split: of a table.
    where: the file, or a table's rows and the number."""

    name: str
    folder: str
    split: str
    where: Path | tuple

    def read(self) -> Path | bytes:
        """Raises UserError if it is missing or no image."""
        source = self.where
        if isinstance(source, tuple):
            rows, number = source
            source = rows[number]["image"]["bytes"]
        try:
            size_of(source)  # without decoding it
        except UserError as error:
            raise UserError(f"{self.split} {self.folder}/{self.name}: {error}") from error
        return source if isinstance(source, bytes) else source.resolve()


def find_images(source: str, wanted: list[str]) -> dict[str, Path | bytes]:
    """The photograph of each wanted path, which ends in its folder and name: a file below a folder,
    or the bytes in a table. Raises UserError if one is missing or there are several."""
    path, names = Path(source), {Path(file).name for file in wanted}
    photos = photos_below(path, names)
    if not photos and (not path.is_dir() or _is_table(path)):
        photos = photos_in_table(source)
    by_name, found = defaultdict(list), {}
    for photo in photos:
        by_name[photo.name].append(photo)
    for file in wanted:
        there = choose(by_name[Path(file).name], Path(file).parent.name)
        if len(there) != 1:
            what = f"{len(there)} files called {file}" if there else f"no image {file}"
            raise UserError(f"{source}: {what}; give the folder in which {Path(file).parent}/ lies")
        found[file] = there[0].read()
    return found


def choose(photos: list[Photo], folder: str) -> list[Photo]:
    """The photographs in that folder. Where a table has kept file names without folders, its test
    split comes first; for Cars196, whose training split uses the same names, no other counts."""
    if inside := [photo for photo in photos if photo.folder == folder]:
        return inside
    alone = [photo for photo in photos if photo.split and not photo.folder]
    tested = [photo for photo in alone if photo.split == "test"]
    return tested if tested or folder == "cars_test" else alone


def photos_below(root: Path, names: set[str]) -> list[Photo]:
    return [
        Photo(name, Path(at).name, "", Path(at) / name)
        for at, _, inside in os.walk(root, followlinks=True)
        for name in inside
        if name in names
    ]


def _is_table(path: Path) -> bool:
    names = ("*.parquet", "dataset_dict.json", "state.json")
    return any(True for name in names for inner in ("", "*/") for _ in path.glob(inner + name))


def photos_in_table(source: str) -> list[Photo]:
    """The images of a table by the names that they had as files."""
    import datasets

    form, splits = find_form(source)
    if form == "hub":
        of_split = tables.from_hub(source, lambda: datasets.load_dataset(source))
    elif form == "tables":
        read = {split: tables.read_table(splits[split]) for split in splits}
        of_split = {split: table.rows for split, table in read.items() if not table.is_list}
    else:
        raise UserError(f"{source}: no folder with photographs, no parquet and no hub data set")
    photos = []
    for split, of in of_split.items():
        rows = of.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        for number, row in enumerate(rows):
            if (name := row["image"]["path"]) and row["image"]["bytes"]:
                path = Path(name)
                photos.append(Photo(path.name, path.parent.name, split, (rows, number)))
    if not photos:
        raise UserError(f"{source}: its images have no file names, so they cannot be told apart")
    return photos


# ---- the table ----------------------------------------------------------------------------------


def figures(runs: Path) -> tuple[dict[tuple[str, str], dict[str, list]], list[str]]:
    """(model and format, "base" or "trained") -> set -> for each evaluation the share that is right
    as a whole and as published; and notes about runs that have no figure."""
    found, notes = defaultdict(lambda: defaultdict(list)), []
    for run in sorted(path for path in runs.glob("*/*") if path.is_dir()):
        named = re.fullmatch(rf"(.+)-({'|'.join(SETS)})", run.parent.name)
        kind = re.fullmatch(r"(base)|seed-\d+-test", run.name)
        if not named or not kind:
            continue
        try:
            pair = figure(run)
        except (UserError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            notes.append(f"note: left out {run}: {error}; remove it and evaluate again")
            continue
        found[named[1], "base" if kind[1] else "trained"][named[2]].append(pair)
    return found, notes


def figure(run: Path) -> tuple[float, float]:
    """Of an evaluation, what is right as a whole and as published. Raises UserError if it is
    not finished or is of some of the rows; what reading a damaged file raises."""
    lines = [json.loads(line) for line in files.read_text(run / "metrics.jsonl").splitlines()]
    last = next((line for line in reversed(lines) if PUBLISHED in line), None)
    if last is None:
        raise UserError("no finished evaluation by both rules")
    settings = yaml.safe_load(files.read_text(run / "config.yaml"))
    if some := settings.get("eval_samples"):
        raise UserError(f"it is of --eval_samples {some}, not of all rows")
    # --answer_match visual_rft pays for another rule
    pair = float(last.get(f"{EXACT}_exact", last.get(EXACT))), float(last[PUBLISHED])
    if not all(0 <= share <= 1 for share in pair):
        raise ValueError(f"{pair} are no shares")
    return pair


def table(runs: Path) -> str:
    """Markdown: for each set, percent right as a whole / as published, the mean over seeds and, of
    several, their standard deviation. The average is there where all sets are. Notes follow."""
    lines = ["| | seeds | average | " + " | ".join(SETS) + " |", "|---" * (3 + len(SETS)) + "|"]
    found, notes = figures(runs)
    for (model, kind), of_set in sorted(found.items()):
        counts = sorted({len(pairs) for pairs in of_set.values()})
        seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:])) if kind != "base" else "-"
        means = [[mean(column) for column in zip(*of_set[name], strict=True)] for name in of_set]
        average = "-"
        if len(means) == len(SETS):
            average = " / ".join(f"{100 * mean(column):.1f}" for column in zip(*means, strict=True))
        cells = [cell(of_set.get(name, [])) for name in SETS]
        lines.append(f"| {model}, {kind} | {seeds} | {average} | " + " | ".join(cells) + " |")
    if not found:
        why = f"{runs}: no evaluation in a folder such as qwen2-vl-2b-think-flowers/base"
        raise UserError("\n".join([why, *notes]))
    return "\n".join([*lines, *notes])


def cell(pairs: list[tuple[float, float]]) -> str:
    texts = []
    for column in zip(*pairs, strict=True):
        spread = f" ± {100 * stdev(column):.1f}" if len(column) > 1 else ""
        texts.append(f"{100 * mean(column):.1f}{spread}")
    return " / ".join(texts) or "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.virft", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write one of the four sets")
    making.add_argument("name", choices=SETS)
    making.add_argument("images", help="the benchmark's folder, or a copy as parquet or on the hub")
    making.add_argument("--lists", type=Path, required=True, help="Visual-RFT's val_data")
    making.add_argument("--rows", help="the training rows; default: the set on the hub")
    making.add_argument("--to", type=Path, default=Path("virft"), help="default: virft")
    commands.add_parser("table", help="print the table").add_argument("runs", type=Path)
    options = vars(parser.parse_args(argv))
    command = {"make": make, "table": table}[options.pop("command")]
    try:
        print(command(**options))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what it had begun is removed", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
