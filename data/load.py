"""Data sets by name: which form it is, which splits there are, which rows are held out.

A name is an embedded demo ("demo:flowers"), a file or folder, or a data set on the hub. What a
folder holds decides the form: COCO, YOLO or Pascal VOC annotations, tables, class folders, each a
file of its name. Not here: whether the rows are sound (data/check.py).
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path

from data import coco, files, flowers, folders, scenes, tables, unread, voc, yolo
from data.errors import UserError
from data.published import published
from data.rows import Row, SplitRows
from data.splits import split_of, splits_among
from data.wording import Wording, check_names

DEMOS = {"demo:flowers": flowers.rows, "demo:scenes": scenes.rows}
SHARE = 0.2  # of the images is held out where there is no test split
QWEN2_WORDING = Wording()  # boxes as Qwen2-VL writes them
FORMS = {"coco": coco, "yolo": yolo, "voc": voc}  # with boxes, read through data/detection.py
DEMO_ROWS = {"train": 480, "test": 180}


def load(
    dataset_name: str, split: str, wording: Wording = QWEN2_WORDING, several: bool = False
) -> SplitRows:
    """The rows of a split, unchecked. wording: of prompts where the data set has none.

    several: whether there are other data sets, for which a flag may be meant that has no effect on
    this one: it is noted in `unused`, and else refused. Raises UserError if the data set or the
    split does not exist (naming the splits there are), a file cannot be read, a column is missing,
    or there is no row.
    """
    path, where = Path(dataset_name).expanduser(), f"{dataset_name}, split {split!r}"
    form, sources = find_form(dataset_name)
    if split not in sources and split_of(split) in sources:
        split = split_of(split)  # --dataset_test_split val of a file val.jsonl
    if form != "hub" and split not in sources:
        raise UserError(
            f"{dataset_name}: no split {split!r}; there is {', '.join(sources) or 'none'} "
            f"(--dataset_train_split and --dataset_test_split choose)"
        )
    try:
        if form == "demo":
            rows = SplitRows(_demo(dataset_name, split), Path())
        elif form == "hub":
            rows = tables.read_hub(dataset_name, split, wording)
        elif form == "folders":
            names = {name for names in _class_names(sources).values() for name in names}
            rows = folders.read(sources[split], wording, sorted(names))
            rows.notes += _split_notes(path, split, sources)
        elif form == "tables":
            rows = tables.read(path, split, sources, wording)
        else:
            rows = FORMS[form].read(path, split, sources, wording)
    except ValueError as error:
        text = str(error)
        raise UserError(text if dataset_name in text else f"{where}: {text}") from error
    rows.name, rows.source, rows.wording = where, dataset_name, wording
    if not len(rows):
        raise UserError(f"{where}: no rows")
    if wording.template is not None and not rows.has_our_prompts:
        without_effect(rows, "prompt_template", f"{dataset_name} has prompts", several)
    return rows


def without_effect(rows: SplitRows, flag: str, why: str, several: bool) -> None:
    """Notes that a flag has no effect on these rows. Raises UserError if there are no others."""
    if not several:
        raise UserError(f"--{flag} has no effect here: {why}")
    rows.unused[flag] = why


def read_splits(
    dataset_name: str,
    train_split: str,
    test_split: str | None,
    test_share: float | None,
    wording: Wording,
    several: bool = False,
) -> tuple[SplitRows, SplitRows]:
    """The rows to train on and those held out, by the flags of these names, unchecked.

    Without a test split a share of the images is held out: by default SHARE of a data set whose
    prompts are made here, else nothing. several: as for `load`. Raises UserError as `load`, and
    for a --test_share beside a test split.
    """
    train = load(dataset_name, train_split, wording, several)
    present = set(splits(dataset_name)) - {train_split}
    if test_split is None:
        test_split = next((name for name in ("test", "validation") if name in present), None)
    if test_split and test_share is not None:
        without_effect(train, "test_share", f"{dataset_name} has a split {test_split!r}", several)
    if test_split:
        asked, several = replace(wording, corners=train.corners), "prompt_template" in train.unused
        try:
            held_out = load(dataset_name, test_split, asked, several)
        except UserError as error:
            raise UserError(
                f"{error}\n(This is the held-out split {test_split!r}; --dataset_test_split names "
                f"another)"
            ) from error
        if unused := present - {split_of(test_split) or test_split, test_split}:
            train.notes.append(f"splits that are not used: {', '.join(sorted(unused))}")
        train.notes += _compare_categories(train, held_out)
        train.notes += [f"held out: {line}" for line in held_out.notes]
        return train, held_out
    if test_share is None:
        test_share = SHARE if train.has_our_prompts else 0.0
    return hold_out(train, test_share) if test_share else (train, train.pick([]))


def _compare_categories(train: SplitRows, held_out: SplitRows) -> list[str]:
    """A line for the plan on categories that are held out alone. Raises UserError if two names of
    both splits count as one."""
    if not train.asked_frame:
        return []
    trained, tested = (
        dict.fromkeys(row.coco["category"] for row in rows) for rows in (train, held_out)
    )
    check_names(list(trained | tested), f"{train.name}: the categories of both splits")
    only = [name for name in tested if name not in trained]
    return [f"never trained on, as they are held out alone: {', '.join(only)}"] if only else []


def splits(dataset_name: str) -> list[str]:
    """Names of the splits. Raises UserError if the data set does not exist."""
    form, sources = find_form(dataset_name)
    if form == "hub":
        import datasets

        return tables.from_hub(dataset_name, lambda: datasets.get_dataset_split_names(dataset_name))
    return list(sources)


def find_form(dataset_name: str) -> tuple[str, dict]:
    """A data set's form, "demo", "hub", "tables", "folders" or a key of FORMS, and its splits: name
    -> what holds it, a file, a folder or a list of files.

    Of the hub no splits are known. Raises UserError if it has none of these forms, or two at once.
    """
    path = Path(dataset_name).expanduser()
    if dataset_name in DEMOS:
        return "demo", DEMO_ROWS
    if not _is_local(path):
        return "hub", {}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "tables", tables.find(path)
    if not path.is_dir():
        files.regular(path)
    annotations = coco.find(path)
    if path.is_file():
        if annotations or path.suffix in tables.SUFFIX:
            return ("coco", annotations) if annotations else ("tables", tables.find(path))
        if splits := yolo.find(path):
            return "yolo", splits
        raise UserError(unread.what_it_is(path))
    found = tables.find(path)
    strong = {file for those in found.values() for file in those if file.suffix != ".csv"}
    if annotations and strong:
        raise UserError(
            f"{path}: holds COCO annotations and rows in other files; give --dataset_name one of "
            f"the files, such as {next(iter(annotations.values()))}"
        )
    if annotations and (other := yolo.find(path)):
        raise UserError(
            f"{path}: holds COCO annotations and YOLO text files ({', '.join(other)}); give "
            f"--dataset_name one of the files, such as {next(iter(annotations.values()))}"
        )
    if annotations:
        return "coco", annotations
    if strong:
        return "tables", found
    for form in ("yolo", "voc"):
        if splits := FORMS[form].find(path):
            return form, splits
    if found:
        return "tables", found
    inner = [folder for folder in folders.folders(path)[:5] if _is_annotated(folder)]
    if len(inner) > 1:
        names = ", ".join(folder.name for folder in inner)
        raise UserError(f"{path}: several data sets, {names}: give --dataset_name one or more")
    try:
        if splits := folders.find(path):
            return "folders", splits
        found = unread.what_it_is(path)
    except UserError as error:
        found = f"{path}: {tool}" if (tool := unread.tool_of(path)) else str(error)
    tables_beside = [file for kind in tables.CSV for file in sorted(path.glob(f"*{kind}"))]
    hints = [tables.why_no_table(file) for file in tables_beside[:2]]
    raise UserError("\n".join([_convert(path) or found, *hints]))


def _is_annotated(path: Path) -> bool:
    """Whether a folder is a data set with boxes of its own."""
    try:
        return any(form.find(path) for form in FORMS.values())
    except UserError:
        return False


def _convert(path: Path) -> str:
    """The message for a published benchmark in its own layout; "" for anything else."""
    benchmark = published(path)
    if benchmark is None:
        return ""
    return (
        f"{path}: this is {benchmark} in its own layout: make class folders of it with\n"
        f"  python -m data.published {path} {path.name}-classes\n"
        f"and give --dataset_name {path.name}-classes"
    )


def _is_local(path: Path) -> bool:
    """Whether a name is that of a file or folder, not of a data set on the hub ("owner/name").

    Raises UserError for what can only be a path and does not exist.
    """
    if os.path.exists(path):  # Path.exists raises where a folder above may not be read
        return True
    if "," in str(path):  # nor does the hub have such names
        names = " ".join(str(path).replace(",", " ").split())
        raise UserError(
            f"--dataset_name {path}: no such file or folder; several data sets are written with "
            f"blanks between them: --dataset_name {names}"
        )
    if path.is_absolute() or len(path.parts) > 2 or path.suffix in tables.SUFFIX:
        raise UserError(f"--dataset_name {path}: no such file or folder")
    return False


def _class_names(sources: dict[str, Path]) -> dict[str, list[str]]:
    """Split -> the names of its class folders. Raises UserError if two of all count as one."""
    names = {split: list(folders.class_names(root).values()) for split, root in sources.items()}
    everywhere = sorted({name for of_split in names.values() for name in of_split})
    check_names(everywhere, f"{next(iter(sources.values()))}: the class folders of all splits")
    return names


def _split_notes(path: Path, split: str, sources: dict[str, Path]) -> list[str]:
    """Lines for the plan on the training split: classes that it lacks, and what is not used."""
    if split != "train":
        return []
    names, notes, root = _class_names(sources), [], sources[split]
    for other, of_other in names.items():
        if only := [name for name in of_other if name not in names[split]]:
            notes.append(f"never trained on, as {other} alone has them: {', '.join(only)}")
    if root != path and not splits_among([folder.name for folder in folders.folders(root.parent)]):
        notes.append(f"the class folders are those in {root}")
    if benchmark := published(path):
        notes.append(f"this is {benchmark}: python -m data.published makes its own splits of it")
    if beside := folders.beside(path, sources):
        notes.append(f"not used: {', '.join(beside[:8])} ({len(beside)} in all)")
    return notes


@cache
def _demo(dataset_name: str, split: str) -> list[dict]:
    rows = DEMOS[dataset_name](split, DEMO_ROWS[split])
    for row in rows:
        buffer = BytesIO()
        row["image"].save(buffer, "PNG")
        row["image"] = {"bytes": buffer.getvalue()}
    return rows


def hold_out(rows: SplitRows, share: float) -> tuple[SplitRows, SplitRows]:
    """(rows to train on, rows held out): about `share` of the images, in class folders of each
    class.

    Which images follows from their content alone, so equal images are on one side. A class with one
    image keeps it to train on.
    """
    with ThreadPoolExecutor() as pool:
        keys_and_solutions = list(pool.map(lambda i: _keys_and_solution(rows[i]), range(len(rows))))
    keys = [row_keys for row_keys, _ in keys_and_solutions]
    # Class folders and label columns: a solution is a class, and each class gives its share.
    by_class = rows.has_our_prompts and rows.asked_frame is None
    clusters: dict[str, list[list[int]]] = defaultdict(list)
    for cluster in linked_rows(keys):
        clusters[keys_and_solutions[cluster[0]][1] if by_class else ""].append(cluster)
    chosen: set[int] = set()
    for of_class in clusters.values():
        order = sorted(of_class, key=lambda cluster: _digest(keys, cluster))
        count = round(share * len(order)) or int(share > 0)
        chosen |= {i for cluster in order[: min(count, len(order) - 1)] for i in cluster}
    train = _part(rows, [i for i in range(len(rows)) if i not in chosen])
    held_out = _part(rows, sorted(chosen))
    held_out.name = f"{rows.name}, what is held out of it"
    train.notes = [
        *rows.notes,
        f"{len(held_out)} of {len(rows)} rows are held out, chosen by their images (--test_share)",
    ]
    return train, held_out


def linked_rows(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Clusters of rows that share images, each directly or through others of its cluster.

    keys: of each row's images. Returns the rows' indices; the first of a cluster is its lowest.
    """
    cluster_of: dict[str, int] = {}  # image -> the lowest row of its cluster
    clusters: dict[int, list[int]] = {}  # the lowest row -> all rows
    for i, row_keys in enumerate(keys):
        touched = {cluster_of[key] for key in row_keys if key in cluster_of}
        lowest = min(touched, default=i)
        joining = [i]
        for other in touched - {lowest}:
            joining += clusters.pop(other)
        clusters.setdefault(lowest, []).extend(joining)
        for member in joining:
            cluster_of |= dict.fromkeys(keys[member], lowest)
    return list(clusters.values())


def _digest(keys: Sequence[Sequence[str]], cluster: Sequence[int]) -> str:
    """A hash of the cluster's images, whatever their order and the rows': what to sort by."""
    smallest = min(key for i in cluster for key in keys[i])
    return hashlib.sha256(smallest.encode()).hexdigest()


def _part(rows: SplitRows, indices: list[int]) -> SplitRows:
    """These rows as rows of their own, with their faults under their new numbers."""
    part = rows.pick(indices)
    new_index = {old: new for new, old in enumerate(indices)}
    part.faults = [
        replace(fault, row=new_index[fault.row]) for fault in rows.faults if fault.row in new_index
    ]
    return part


def _keys_and_solution(row: Row) -> tuple[tuple[str, ...], str]:
    """The keys of a row's images and its solution. Images that cannot be read are a fault, which
    data/check.py names: such a row gets a key of its own."""
    try:
        return row.image_keys or (f"row {row.index}",), row.solution
    except (ValueError, TypeError):
        return (f"row {row.index}",), row.solution
