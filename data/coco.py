"""COCO detection files: `instances_*.json` with its images beside it or above.

A row asks for one category in one image: for each that the image shows, and for a share of those
that it does not. Crowd boxes are no boxes to find, and where an image has only such ones of a
category it is not asked for. Segmentations and keypoints are not read.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from data.errors import UserError
from data.folders import SPLITS
from data.rows import Fault, Rows
from data.wording import Ask, check_names

OTHERS = ("captions", "person_keypoints", "stuff", "panoptic")  # of the same images
PARTS = ("images", "annotations", "categories")
NOTHING = "<answer>No Objects</answer>"


def find(path: Path) -> dict[str, Path]:
    """Split -> its annotation file; nothing if `path` has none.

    Raises UserError if several files hold one split.
    """
    if path.is_file():
        return {"train": path} if path.suffix == ".json" and is_coco(path) else {}
    files = sorted(path.glob("*.json"))
    for folder in sorted(path.iterdir()) if path.is_dir() else []:
        if folder.name == "annotations" or folder.name.lower() in SPLITS:
            files += sorted(folder.glob("*.json"))
    files = [file for file in files if is_coco(file)]
    if any(file.stem.startswith("instances") for file in files):
        files = [file for file in files if not file.stem.startswith(OTHERS)]
    found: dict[str, Path] = {}
    for file in files:
        split = split_name(file) if len(files) > 1 else "train"
        if split is None or split in found:
            other = found.get(split) or next(f for f in files if f != file)
            raise UserError(
                f"{path}: {file.relative_to(path)} and {other.relative_to(path)} are annotation "
                f"files, and their names do not tell which split each is; call them "
                f"instances_train.json and instances_test.json, or give --dataset_name one of them"
            )
        found[split] = file
    return found


def split_name(file: Path) -> str | None:
    """The split that a file's own name tells, or its folder's: train2017 is train."""
    for text in (file.stem, file.parent.name):
        words = re.findall(r"[a-z]+", text.lower())
        names = [SPLITS[word] for word in words if word in SPLITS]
        if names:
            return names[0]
    return None


def is_coco(file: Path) -> bool:
    """Whether the file is a JSON object with the parts of a COCO detection file."""
    try:
        content = _content(file) if begins_with(file, b"{") else None
    except (ValueError, RecursionError, OSError):  # whoever reads it next says what is wrong
        return False
    return content is not None and all(isinstance(content.get(part), list) for part in PARTS)


def begins_with(file: Path, mark: bytes) -> bool:
    """Whether the first character of a text file is `mark`: what kind of JSON it is."""
    if not file.is_file():
        return False
    with file.open("rb") as start:
        return start.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark)


def _content(file: Path) -> dict:
    found = file.stat()
    return _parsed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)  # large ones take seconds, and are asked for more than once
def _parsed(file: Path, changed: int, size: int) -> dict:
    return json.loads(file.read_text(encoding="utf-8-sig"))


def read(file: Path, ask: Ask) -> Rows:
    """The rows of an annotation file. Raises UserError as `rows_of`, or if no image is found."""
    content = _content(file)
    rows = rows_of(content, file, ask)
    rows.folder = image_folder(content, file)
    return rows


def image_folder(content: dict, file: Path) -> Path:
    """Where most of the first images lie: beside the file, in a folder there, or in one beside its
    folder.

    Raises UserError naming the folders that were looked at.
    """
    names = [_file_name(entry) for entry in content["images"][:20]]
    inside = ("", "images", "data", file.stem.removeprefix("instances_"), split_name(file) or "")
    inside += tuple(f"images/{name}" for name in inside[3:])
    roots = (file.parent, file.parent.parent)
    tried = list(dict.fromkeys(root / folder for root in roots for folder in inside))
    found = [sum((folder / name).is_file() for name in names) for folder in tried]
    if not any(found):
        listed = ", ".join(map(str, tried))
        raise UserError(f"{file}: its first image, {names[0]!r}, is in none of {listed}")
    return tried[found.index(max(found))]


def _file_name(entry: dict) -> str:
    return str(entry.get("file_name", "")).replace("\\", "/")


def rows_of(content: dict, where, ask: Ask) -> Rows:
    """The rows of an annotation file's content, in its order of images and categories.

    where: the file, for messages. Raises UserError if an image or category is named that the
    content does not have, if a number is given twice, or if there is no box. A box that is none is
    a fault of its row.
    """
    images, names = _by_id(content, "images", where), _by_id(content, "categories", where)
    shown: dict[tuple, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict):
            raise UserError(f"{where}: {str(annotation)[:80]!r} is no annotation")
        place = annotation.get("image_id"), annotation.get("category_id")
        for number, known, what in zip(place, (images, names), ("image", "category"), strict=True):
            if not isinstance(number, int | str) or number not in known:
                raise UserError(
                    f"{where}: annotation {annotation.get('id')} is of {what} {number!r}, which "
                    f"the file does not have"
                )
        shown[place].append(annotation)
    if not shown:
        raise UserError(f"{where}: no annotation")
    boxed = {p: found for p, found in shown.items() if not all(map(_is_crowd, found))}
    used = {category for _, category in boxed}
    called = {number: str(entry.get("name", number)) for number, entry in names.items()}
    asked = [number for number in names if number in used]
    check_names([called[number] for number in asked], f"{where}: the categories")
    if not boxed:
        raise UserError(f"{where}: all boxes are crowds, so there is nothing to find")
    numbers = [n for a in content["annotations"] if _is_box(a.get("bbox")) for n in a["bbox"]]
    if numbers and max(numbers) <= 1:
        raise UserError(f"{where}: no coordinate is above 1; boxes must count pixels, not shares")
    absent = _absent(images, asked, shown, round(share_of(len(boxed), ask.absent_share)))
    order = [(i, c) for i in images for c in asked if (i, c) in boxed or (i, c) in absent]
    table, faults, clipped, twice = [], [], 0, 0
    for index, (image, category) in enumerate(order):
        entry, found = images[image], shown.get((image, category), [])
        size = entry.get("width"), entry.get("height")
        solution, wrong, cut, same = _solution([a for a in found if not _is_crowd(a)], size)
        clipped, twice = clipped + cut, twice + same
        problem = ask.boxes_problem(called[category])
        place = {"image_id": image, "category_id": category, "category": called[category]}
        place |= {"annotations": found, "size": size}
        row = {"image": entry.get("image") or _file_name(entry)}
        table.append(row | {"problem": problem, "solution": solution, "place": place})
        if wrong:
            todo = "correct the annotation, or remove it"
            faults.append(Fault(index, str(entry.get("file_name", "image")), wrong, todo))
    rows = Rows(table, Path())
    rows.worded = True
    rows.asks_in, rows.faults = ask.frame, faults
    rows.said = [
        f"{len(images)} images, {len(asked)} categories: {', '.join(called[c] for c in asked)}",
        f"{len(boxed)} rows ask for what an image shows, {len(absent)} for what it does not "
        f"(--absent_share)",
    ]
    crowds = sum(map(_is_crowd, content["annotations"]))
    unused = [called[c] for c in names if c not in used]
    if crowds:
        rows.said.append(f"{crowds} crowd boxes are left out")
    if twice:
        rows.said.append(f"{twice} boxes are there twice, and are asked for once")
    if all(called[number].isdigit() for number in asked):
        rows.said.append("the categories have numbers for names, so the prompt asks for numbers")
    if clipped:
        rows.said.append(f"{clipped} boxes reach out of their image and are clipped to it")
    if unused:
        rows.said.append(f"never asked for, as no box is of them: {', '.join(unused)}")
    return rows


def _by_id(content: dict, part: str, where) -> dict:
    found = {}
    for entry in content[part]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int | str) or number in found:
            raise UserError(f"{where}: {part}: {str(entry)[:80]!r} has no id of its own")
        found[number] = entry
    if len({type(number) for number in found}) > 1:
        raise UserError(f"{where}: {part}: some ids are numbers and some are text")
    return found


def _is_crowd(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd"))


def share_of(present: int, share: float) -> float:
    """How many more make `share` of the sum."""
    return present * share / (1 - share)


def _absent(images, asked: list, shown: dict, count: int) -> set[tuple]:
    """`count` pairs of an image and a category that it does not show, by chance, but always the
    same; one of each image first, then two."""
    chosen: set[tuple] = set()
    free = {i: [c for c in asked if (i, c) not in shown] for i in images}
    while len(chosen) < count and any(free.values()):
        drawn = []
        for image, categories in free.items():
            if categories:
                order = sorted(categories, key=lambda c: _chance(image, c))
                free[image] = order[1:]
                drawn.append((image, order[0]))
        drawn.sort(key=lambda pair: _chance("row", *pair))
        chosen |= set(drawn[: count - len(chosen)])
    return chosen


def _chance(*words) -> str:
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()


def _solution(annotations: list[dict], size: tuple) -> tuple[str, str, int, int]:
    """(solution in pixels, what is wrong or "", boxes clipped, boxes that are there twice) of the
    boxes [x, y, width, height] in an image of this (width, height)."""
    boxes, clipped = [], 0
    if not all(_is_number(side) and side > 0 for side in size):
        return NOTHING, f"width and height are {size[0]} and {size[1]}", 0, 0
    for annotation in annotations:
        box, name = annotation.get("bbox"), f"annotation {annotation.get('id')}"
        if not _is_box(box):
            return NOTHING, f"{name} has the bbox {str(box)[:80]}, not four numbers", 0, 0
        x, y, w, h = box
        wide = (x, y, x + w, y + h)
        corners = [
            min(max(round(float(n), 4), 0.0), side)
            for n, side in zip(wide, (*size, *size), strict=True)
        ]
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            return NOTHING, f"{name}, bbox {box}: no area inside the image", 0, 0
        clipped += any(abs(a - b) > 1e-3 for a, b in zip(wide, corners, strict=True))
        boxes.append(f"{{'Position': {[_short(n) for n in corners]}, 'Confidence': 1.0}}")
    own = list(dict.fromkeys(boxes))
    solution = f"<answer>[{', '.join(own)}]</answer>" if own else NOTHING
    return solution, "", clipped, len(boxes) - len(own)


def _is_box(box) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _short(number: float) -> int | float:
    return int(number) if number == int(number) else number
