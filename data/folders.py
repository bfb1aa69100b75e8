"""Photographs in class folders: `photos/tulip/a.jpg`, or `photos/train/tulip/a.jpg`.

Not here: whether a file is an image (data/check.py); a suffix decides what is taken for one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError
from data.rows import SplitRows
from data.wording import Wording, check_names

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES += (".heic", ".heif", ".avif")
# Stands in the name of a class folder for "/", which no folder has: "Ram C／V Cargo Van".
SLASH = "\uff0f"
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def find(path: Path) -> dict[str, Path]:
    """Name of a split -> the folder with its class folders; nothing if `path` has no photographs in
    folders.

    Raises UserError if some folders are splits and others are not, or if two are one split.
    """
    inside = folders(path) if path.is_dir() else []
    splits: dict[str, Path] = {}
    for folder in inside:
        split = SPLITS.get(folder.name.lower())
        if split is None or not folders(folder):
            continue
        if split in splits:
            raise UserError(
                f"{path}: {splits[split].name} and {folder.name} are one split; keep one"
            )
        splits[split] = folder
    others = [f.name for f in inside if f not in splits.values() and photographs(f)]
    if splits and others:
        first = next(iter(splits.values()))
        raise UserError(
            f"{path}: {first.name} has class folders, and {others[0]} is no split with class "
            f"folders: move it away, or give --dataset_name {first}"
        )
    if splits:
        return splits
    return {"train": path} if any(photographs(folder) for folder in inside) else {}


def read(path: Path, wording: Wording, classes: list[str] | None = None) -> SplitRows:
    """A row for each photograph in path's class folders, in the order of their names.

    classes: those of all splits, for the prompt; by default this split's. A class has its folder's
    name, with spaces for underscores and "/" for SLASH. Raises UserError if there is one class
    only, if a folder has no photograph or if a photograph lies beside the folders.
    """
    loose = [file.name for file in photographs(path, deep=False)]
    if loose:
        raise UserError(
            f"{path}: {loose[0]} lies beside the class folders ({len(loose)} such files); move "
            f"each photograph into the folder of its class"
        )
    by_folder = {folder: photographs(folder) for folder in folders(path)}
    empty = [folder.name for folder, photos in by_folder.items() if not photos]
    if empty:
        raise UserError(f"{path}: no photograph in {', '.join(empty)}; remove the folder")
    if len(by_folder) < 2:
        raise UserError(
            f"{path}: the photographs are in one folder, {next(iter(by_folder)).name}, so there is "
            f"nothing to tell apart: make a folder for each class"
        )
    names = {folder: class_name(folder) for folder in by_folder}
    check_names(list(names.values()), f"{path}: the class folders")
    problem = wording.class_problem(classes or list(names.values()))
    table = [
        {"image": str(file.relative_to(path)), "problem": problem, "solution": names[folder]}
        for folder, photos in by_folder.items()
        for file in photos
    ]
    rows = SplitRows(table, path)
    rows.has_our_prompts = True
    rows.notes = [f"{len(names)} classes, {len(table)} photographs: {', '.join(names.values())}"]
    others = [f for folder in by_folder for f in files(folder) if not is_photograph(f)]
    if others:
        listed = ", ".join(f.name for f in others[:5])
        rows.notes.append(f"left out as they are no photographs: {listed} ({len(others)} in all)")
    return rows


def class_name(folder: Path) -> str:
    return folder.name.replace("_", " ").replace(SLASH, "/").strip()


def classes_of(path: Path) -> list[str]:
    """The names of the class folders in `path`, sorted."""
    return [class_name(folder) for folder in folders(path)]


def folders(path: Path) -> list[Path]:
    """The folders in `path` that are not hidden, sorted."""
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def photographs(path: Path, deep: bool = True) -> list[Path]:
    """Files with the suffix of an image, sorted; in subfolders too if `deep`."""
    return [file for file in files(path, deep) if is_photograph(file)]


def is_photograph(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def files(path: Path, deep: bool = True) -> list[Path]:
    """The files in a folder that are not hidden, sorted. Links are followed; a broken one is listed
    too, for data/check.py to report."""
    return sorted(_walk(path, deep))


def _walk(path: Path, deep: bool) -> Iterator[Path]:
    visited = set()
    for folder, inside, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        again = real in visited  # a link to a folder above
        visited.add(real)
        inside[:] = [name for name in inside if name[0] != "." and deep and not again]
        yield from (Path(folder, name) for name in names if name[0] != "." and not again)
