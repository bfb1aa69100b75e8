"""Photographs in class folders: `photos/tulip/a.jpg`, or `photos/train/tulip/a.jpg`.

Folders that are splits or part of a layout (images, masks, annotations) are never classes. Not
here: whether a file is an image (data/check.py); a suffix decides what is taken for one.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError
from data.rows import SplitRows
from data.splits import is_layout, says_nothing, splits_among
from data.wording import LISTED, Wording, check_names

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES += (".heic", ".heif", ".avif")
# Stands in the name of a class folder for "/", which no folder has: "Ram C／V Cargo Van".
SLASH = "\uff0f"
HIDDEN = (".", "@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN")  # what systems leave behind
# 001.Black_footed_Albatross, n02085620-Chihuahua
NUMBERED = re.compile(r"(?:\d+|n\d{8})\s*[.\-_)]+\s*(?=[^\W\d])")
WORDNET = re.compile(r"n\d{8}")


def find(path: Path) -> dict[str, Path]:
    """Name of a split -> the folder with its class folders; nothing if `path` has no photographs in
    folders.

    A folder that alone has all photographs is looked into. Raises UserError if the folders are no
    classes, if some are splits and others are not, or if two are one split.
    """
    inside = with_photographs(path)
    named = splits_among(folder.name for folder in inside)
    roots = {folder: _class_root(folder) for folder in inside if folder.name in named}
    splits: dict[str, Path] = {}
    for folder in filter(roots.get, inside):
        split = named[folder.name]
        if split in splits:
            raise UserError(
                f"{path}: {splits[split].name} and {folder.name} are one split; give "
                f"--dataset_name a folder that has one of them"
            )
        splits[split] = folder
    if splits:
        others = [folder.name for folder in inside if folder not in splits.values()]
        if others:
            first = splits.get("train") or next(iter(splits.values()))
            raise UserError(
                f"{path}: {first.name} is a split with class folders, and {others[0]} is none: "
                f"give --dataset_name {first}, or move {others[0]} elsewhere"
            )
        return {split: roots[folder] for split, folder in splits.items()}
    if len(inside) == 1 and with_photographs(inside[0]):
        return find(inside[0])
    never = [f for f in inside if f.name in named or is_layout(f.name)]
    if inside and all(says_nothing(f.name) for f in inside):  # original, augmented
        never = inside
    if never:
        raise UserError(_no_classes(path, inside, never))
    _refuse_parents(path, inside)
    return {"train": path} if inside else {}


def _refuse_parents(path: Path, classes: list[Path]) -> None:
    """Raises UserError if all classes hold the same folders, and no photograph beside them: either
    may be the classes."""
    if len(classes) < 2:
        return
    deeper = [{folder.name for folder in with_photographs(each)} for each in classes]
    loose = any(is_photograph(f) for each in classes for f in files(each, depth=1))
    same = set.intersection(*deeper) if not loose else set()
    alone = all(len(names) == 1 for names in deeper) and any(map(is_layout, same))
    if same and not alone:  # n01443537/images/ alone is that class's folder
        shown, one = ", ".join(sorted(same)[:3]), sorted(same)[0]
        text = (
            f"{path}: {classes[0].name}, {classes[1].name} have the same folders in them ({shown})"
        )
        if splits_among(same).keys() == same:
            raise UserError(f"{text}: put the splits above the classes, {one}/{classes[0].name}")
        todo = (
            f"put the photographs of each class straight into its folder, {classes[0].name}/1.jpg"
        )
        if all(map(is_layout, same)):
            raise UserError(f"{text}, which are no classes: {todo}")
        raise UserError(
            f"{text}, so it is not clear which are the classes. If {shown} are, give "
            f"--dataset_name {classes[0]}; else {todo}"
        )


def _class_root(split: Path) -> Path | None:
    """The folder with the class folders of a split: its own, or one that alone has its photographs,
    as in train/images/tulip. None if there is none."""
    inside = with_photographs(split)
    if len(inside) == 1 and (is_layout(inside[0].name) or with_photographs(inside[0])):
        return _class_root(inside[0])
    classes = inside and not any(is_layout(folder.name) for folder in inside)
    return split if classes else None


def _no_classes(path: Path, inside: list[Path], never: list[Path]) -> str:
    """The message for a folder whose folders are no classes: what they are, what lies beside.

    never: those of them that cannot be classes.
    """
    found = [f"{folder.name} ({len(photographs(folder))} photographs)" for folder in inside]
    text = f"{path}: there are no class folders here but {', '.join(found)}. "
    others = [file for file in files(path, depth=2) if not is_photograph(file)]
    if others:
        by_suffix = Counter(file.suffix for file in others)
        listed = [file.relative_to(path) for file in others if by_suffix[file.suffix] <= 3]
        many = [f"{n} *{suffix}" for suffix, n in by_suffix.items() if n > 3]
        text += f"Beside them: {', '.join([*map(str, listed[:8]), *many])}. "
    if len(never) < len(inside):
        text += f"A folder called {never[0].name} is never a class; rename it if it is one. "
    deeper = [folder for folder in inside if _class_root(folder)]
    if len(deeper) == 1:
        name = deeper[0].name
        return f"{text}If the folders in {name} are classes, give --dataset_name {deeper[0]}"
    return (
        f"{text}Put the photographs of each class into a folder of its name (tulip/1.jpg, "
        f"rose/1.jpg), or list them in a CSV file with the columns image and label. Boxes are read "
        f"from COCO, YOLO or Pascal VOC files (docs/data.md)"
    )


def read(path: Path, wording: Wording, classes: list[str] | None = None) -> SplitRows:
    """A row for each photograph in path's class folders, in the order of their names.

    classes: those of all splits, for the prompt; by default this split's. Raises UserError if there
    is one class only, if a class has no photograph or if a photograph lies beside the folders.
    """
    loose = [file.name for file in files(path, depth=1) if is_photograph(file)]
    if loose:
        raise UserError(
            f"{path}: {loose[0]} lies beside the class folders ({len(loose)} such files); move "
            f"each photograph into the folder of its class"
        )
    names = class_names(path)
    by_folder = {folder: photographs(folder) for folder in names}
    if len(by_folder) < 2:
        raise UserError(
            f"{path}: the photographs are in one folder, {next(iter(by_folder)).name}, so there is "
            f"nothing to tell apart: make a folder for each class"
        )
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
    if any(
        NUMBERED.match(folder.name) and name[0] != folder.name[0] for folder, name in names.items()
    ):
        rows.notes.append("the numbers before the classes' names are left out")
    rows.notes += about_classes(list(names.values()))
    return rows


def about_classes(names: list[str]) -> list[str]:
    """Lines for the plan on names that make the task harder than it is."""
    notes = []
    if len(names) > LISTED:
        notes.append(
            f"the prompt does not list the classes, as they are more than {LISTED}; "
            f"--prompt_template '... {{classes}} ...' does"
        )
    if all(name.isdigit() for name in names):
        notes.append("the classes have numbers for names, so answers are numbers")
    elif all(WORDNET.fullmatch(name) for name in names):
        notes.append(
            f"the classes have WordNet ids for names ({names[0]}), which no model answers: rename "
            f"the folders by the list that came with them"
        )
    return notes


def class_names(path: Path) -> dict[Path, str]:
    """Class folder -> its class: the folder's name with spaces for underscores and "/" for SLASH,
    and without a number before it if all folders have one and are told apart without.

    Raises UserError for a folder without a photograph that is not part of a layout.
    """
    inside = folders(path)
    photos = {folder for folder in inside if has_photograph(folder)}
    for folder in inside:
        if folder in photos or is_layout(folder.name):
            continue
        held = [file.name for file in files(folder)]
        if held:
            raise UserError(
                f"{path}: {folder.name} holds no photograph ({', '.join(held[:3])}): if it is a "
                f"class, put its photographs there, else move it out of {path.name}"
            )
        raise UserError(f"{path}: {folder.name} is empty: put its photographs there, or remove it")
    names = {folder: folder.name for folder in inside if folder in photos}
    bare = {folder: NUMBERED.sub("", name, count=1) for folder, name in names.items()}
    if all(map(NUMBERED.match, names.values())) and len(set(bare.values())) == len(names):
        names = bare
    return {f: name.replace("_", " ").replace(SLASH, "/").strip() for f, name in names.items()}


def beside(path: Path, sources: dict[str, Path]) -> list[str]:
    """Names of what lies in `path` and is not used: neither a class nor on the way to one."""
    used = set(sources.values()) | {above for root in sources.values() for above in root.parents}
    inside = [p for p in path.iterdir() if not p.name.startswith(HIDDEN) and p not in used]
    if path in sources.values():
        inside = [p for p in inside if not (p.is_dir() and has_photograph(p))]
    return sorted(p.name for p in inside)


def folders(path: Path) -> list[Path]:
    """The folders in `path` that are not hidden, sorted; none if it is no folder."""
    inside = path.iterdir() if path.is_dir() else ()
    return sorted(f for f in inside if f.is_dir() and not f.name.startswith(HIDDEN))


def with_photographs(path: Path) -> list[Path]:
    """The folders in `path` that have a photograph in them, however deep."""
    return [folder for folder in folders(path) if has_photograph(folder)]


def has_photograph(path: Path) -> bool:
    return any(map(is_photograph, _walk(path)))


def photographs(path: Path) -> list[Path]:
    """Files with the suffix of an image, sorted, in subfolders too."""
    return [file for file in files(path) if is_photograph(file)]


def is_photograph(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def files(path: Path, depth: int = 99) -> list[Path]:
    """The files in a folder that are not hidden, sorted. depth: 1 for those in no subfolder. Links
    are followed; a broken one is listed too, for data/check.py to report."""
    return sorted(_walk(path, depth))


def _walk(path: Path, depth: int = 99) -> Iterator[Path]:
    visited = set()
    for folder, inside, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        again = real in visited  # a link to a folder above
        visited.add(real)
        deep = len(Path(folder).relative_to(path).parts) + 1 < depth
        inside[:] = [name for name in inside if not name.startswith(HIDDEN) and deep and not again]
        yield from (Path(folder, name) for name in names if name[0] != "." and not again)
