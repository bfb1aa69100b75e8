"""Data sets by name: which form is it, which splits are there, which rows are held out.

A name is an embedded demo ("demo:flowers"), a file or folder, or a data set on the hub. The form is
told by looking: COCO annotations (data/coco.py), tables (data/virft.py), class folders
(data/folders.py).
"""

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path

from data import coco, flowers, folders, scenes, virft
from data.errors import UserError
from data.rows import Rows
from data.wording import Ask

DEMOS = {"demo:flowers": flowers.rows, "demo:scenes": scenes.rows}
SHARE = 0.2  # is held out where there is no test split
AS_TAUGHT = Ask()  # as Qwen2-VL was
DEMO_ROWS = {"train": 480, "test": 180}


def load(dataset_name: str, split: str, ask: Ask = AS_TAUGHT) -> Rows:
    """The rows of a split; `ask` words the prompts where the data set has none.

    Raises UserError if the data set or the split does not exist (naming the splits there are),
    a file cannot be read, a column is missing, or there is no row.
    """
    path, where = Path(dataset_name).expanduser(), f"{dataset_name}, split {split!r}"
    kind, parts = look(dataset_name)
    if kind != "hub" and split not in parts:
        raise UserError(
            f"{dataset_name}: no split {split!r}; there is {', '.join(parts) or 'none'} "
            f"(--dataset_train_split and --dataset_test_split choose)"
        )
    try:
        if kind == "demo":
            rows = Rows(_demo(dataset_name, split), Path())
        elif kind == "hub":
            rows = virft.read_hub(dataset_name, split, ask)
        elif kind == "coco":
            rows = coco.read(parts[split], ask)
        elif kind == "folders":
            classes = sorted({name for part in parts.values() for name in folders.classes_of(part)})
            rows = folders.read(parts[split], ask, classes)
        else:
            rows = virft.read(path, split, parts[split], ask)
    except ValueError as error:
        text = str(error)
        raise UserError(text if dataset_name in text else f"{where}: {text}") from error
    rows.name, rows.ask = where, ask
    if not len(rows):
        raise UserError(f"{where}: no rows")
    if ask.template is not None and not rows.worded:
        raise UserError(f"--prompt_template has no effect here: {dataset_name} has prompts")
    return rows


def read_splits(
    dataset_name: str, train_split: str, test_split: str | None, test_share: float | None, ask: Ask
) -> tuple[Rows, Rows]:
    """The rows to train on and those held out, by the flags of these names, unchecked.

    Without a test split a share of the images is held out: by default SHARE of a data set whose
    prompts are made here, else nothing. Raises UserError as `load`.
    """
    train = load(dataset_name, train_split, ask)
    if test_split is None:
        found, others = splits(dataset_name), ["test", "validation"][: 1 + train.worded]
        others = [split for split in others if split in found and split != train_split]
        test_split = next(iter(others), None)
    if test_split and test_share is not None:
        raise UserError(
            f"--test_share has no effect here: {dataset_name} has a split {test_split!r}"
        )
    if test_split:
        held_out = load(dataset_name, test_split, replace(ask, corners=train.corners))
        train.said += [f"held out: {line}" for line in held_out.said]
        return train, held_out
    share = SHARE * train.worded if test_share is None else test_share
    return hold_out(train, share) if share else (train, train.pick([]))


def splits(dataset_name: str) -> list[str]:
    """Names of the splits. Raises UserError if the data set does not exist."""
    kind, parts = look(dataset_name)
    if kind == "hub":
        import datasets

        return virft.on_hub(dataset_name, lambda: datasets.get_dataset_split_names(dataset_name))
    return list(parts)


def look(dataset_name: str) -> tuple[str, dict]:
    """("demo", "coco", "folders", "tables" or "hub", split -> what holds it): what a name means.

    Of the hub no splits are known. Raises UserError if it is none of these, or two at once.
    """
    path = Path(dataset_name).expanduser()
    if dataset_name in DEMOS:
        return "demo", DEMO_ROWS
    if not _is_local(path):
        return "hub", {}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "tables", virft.find(path)
    annotations, tables = coco.find(path), virft.has_tables(path)
    if annotations and tables and path.is_dir():
        raise UserError(
            f"{path}: holds COCO annotations and rows in other files; give --dataset_name one of "
            f"the files, such as {next(iter(annotations.values()))}"
        )
    if annotations:
        return "coco", annotations
    classes = {} if tables else folders.find(path)
    return ("folders", classes) if classes else ("tables", virft.find(path))


def _is_local(path: Path) -> bool:
    """Whether a name means a file or folder and no data set on the hub, which is "owner/name".

    Raises UserError for what can only be a path and does not exist.
    """
    if path.exists():
        return True
    if path.is_absolute() or len(path.parts) > 2 or path.suffix in (".json", ".jsonl", ".parquet"):
        raise UserError(f"--dataset_name {path}: no such file or folder")
    return False


@cache
def _demo(dataset_name: str, split: str) -> list[dict]:
    rows = DEMOS[dataset_name](split, DEMO_ROWS[split])
    for row in rows:
        buffer = BytesIO()
        row["image"].save(buffer, "PNG")
        row["image"] = {"bytes": buffer.getvalue()}
    return rows


def hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(to train on, held out): of each class, or of all, about `share` of the images.

    Which follows from the images' content alone, so equal images are on one side. A class with one
    image keeps it to train on.
    """
    with ThreadPoolExecutor() as pool:
        facts = list(pool.map(lambda i: _facts(rows[i]), range(len(rows))))
    first: dict[str, int] = {}  # image -> the first row that has it, or that shares images with it
    together: dict[int, list[int]] = {}
    for i, (keys, _) in enumerate(facts):
        linked = {first[key] for key in keys if key in first}
        root = min(linked, default=i)
        members = [i]
        for other in linked - {root}:
            members += together.pop(other)
        together.setdefault(root, []).extend(members)
        for member in members:
            first |= dict.fromkeys(facts[member][0], root)
    classes: dict[str, list[int]] = defaultdict(list)
    for root in together:
        one_class = rows.worded and rows.asks_in is None
        classes[facts[root][1] if one_class else ""].append(root)
    held: set[int] = set()
    for roots in classes.values():
        smallest = {r: min(key for i in together[r] for key in facts[i][0]) for r in roots}
        order = sorted(roots, key=lambda r: hashlib.sha256(smallest[r].encode()).hexdigest())
        count = round(share * len(order)) or int(share > 0)
        held |= {i for root in order[: min(count, len(order) - 1)] for i in together[root]}
    sides = [[i for i in range(len(rows)) if (i in held) == side] for side in (False, True)]
    parts = [rows.pick(side) for side in sides]
    for part, side in zip(parts, sides, strict=True):
        place = {old: new for new, old in enumerate(side)}
        part.faults = [
            replace(fault, row=place[fault.row]) for fault in rows.faults if fault.row in place
        ]
    parts[1].name = f"{rows.name}, what is held out of it"
    parts[0].said = [
        *rows.said,
        f"{len(sides[1])} of {len(rows)} rows are held out, chosen by their images (--test_share)",
    ]
    return parts[0], parts[1]


def _facts(row) -> tuple[tuple[str, ...], str]:
    """(image keys, solution) of a row."""
    try:
        return row.keys or (f"row {row.index}",), row.solution
    except (ValueError, TypeError):  # a fault of the row, which data/check.py names
        return (f"row {row.index}",), row.solution
