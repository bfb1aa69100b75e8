"""Photographs in class folders: `photos/tulip/a.jpg`, or `photos/train/tulip/a.jpg`."""

from pathlib import Path

from data.ask import Ask
from data.rows import Rows

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
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
    """Split -> the folder of its class folders; nothing if `path` has no folder of photographs."""
    inside = folders(path) if path.is_dir() else []
    if inside and all(folder.name.lower() in SPLITS and folders(folder) for folder in inside):
        return {SPLITS[folder.name.lower()]: folder for folder in inside}
    return {"train": path} if any(photographs(folder) for folder in inside) else {}


def read(path: Path, ask: Ask, classes: list[str] | None = None) -> Rows:
    """A row for each photograph in path's class folders, in the order of their names.

    classes: those of all splits, for the prompt; by default this split's. A class is called as its
    folder is, with spaces for underscores. Raises ValueError if there is one class only, if a
    folder has no photograph or if a photograph lies beside the folders.
    """
    loose = [file.name for file in photographs(path, deep=False)]
    if loose:
        raise ValueError(
            f"{path}: {loose[0]} lies beside the class folders ({len(loose)} such files); move "
            f"each photograph into the folder of its class"
        )
    found = {folder: photographs(folder) for folder in folders(path)}
    empty = [folder.name for folder, files in found.items() if not files]
    if empty:
        raise ValueError(f"{path}: no photograph in {', '.join(empty)}; remove the folder")
    if len(found) < 2:
        raise ValueError(
            f"{path}: the photographs are in one folder, {next(iter(found)).name}, so there is "
            f"nothing to tell apart: make a folder for each class"
        )
    names = {folder: class_name(folder) for folder in found}
    problem = ask.class_problem(classes or list(names.values()))
    table = [
        {"image": str(file.relative_to(path)), "problem": problem, "solution": names[folder]}
        for folder, files in found.items()
        for file in files
    ]
    rows = Rows(table, path)
    rows.worded = True
    rows.said = [f"{len(found)} classes, {len(table)} photographs: {', '.join(names.values())}"]
    others = [f for folder in found for f in folder.rglob("*") if f.is_file()]
    others = [f for f in others if f.suffix.lower() not in SUFFIXES and f.name[0] != "."]
    if others:
        listed = ", ".join(f.name for f in others[:5])
        rows.said.append(f"{len(others)} files that are no photographs are left out: {listed}")
    twice = {}
    for folder, name in names.items():
        twice.setdefault(name.casefold(), []).append(folder.name)
    for alike in twice.values():
        if len(alike) > 1:
            raise ValueError(f"{path}: {' and '.join(alike)} are one class; join the folders")
    return rows


def class_name(folder: Path) -> str:
    return folder.name.replace("_", " ").strip()


def classes_of(path: Path) -> list[str]:
    return [class_name(folder) for folder in folders(path)]


def folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def photographs(path: Path, deep: bool = True) -> list[Path]:
    """Files with the suffix of an image, in folders inside too if `deep`; no hidden ones."""
    files = path.rglob("*") if deep else path.glob("*")
    found = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
    return sorted(f for f in found if not f.name.startswith("."))
