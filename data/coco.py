"""COCO detection files: `instances_*.json` with its images beside it or above.

A row asks for one category in one image: for each that the image shows, and for a share of those
that it does not. Crowd boxes are no boxes to find, and where an image has only such ones of a
category it is not asked for. Segmentations and keypoints are not read.
"""

import hashlib
import json
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from data.ask import Ask
from data.folders import SPLITS
from data.rows import Fault, Rows

PARTS = ("images", "annotations", "categories")
NOTHING = "<answer>No Objects</answer>"


def find(path: Path) -> dict[str, Path]:
    """Split -> its annotation file; nothing if `path` has none.

    Raises ValueError if several files hold one split.
    """
    if path.is_file():
        return {"train": path} if path.suffix == ".json" and is_coco(path) else {}
    files = [
        f for where in ("*", "annotations/*", "*/*") for f in sorted(path.glob(f"{where}.json"))
    ]
    files = [file for file in dict.fromkeys(files) if is_coco(file)]
    instances = [file for file in files if file.stem.startswith("instances")]
    found: dict[str, Path] = {}
    for file in instances or files:
        split = split_name(file) if len(instances or files) > 1 else split_name(file) or "train"
        if split is None or split in found:
            raise ValueError(
                f"{path}: {file.name} and {next(iter(found.values()), file).name} are annotation "
                f"files; name them instances_train.json and instances_test.json, or give "
                f"--dataset_name one of them"
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
    with file.open("rb") as start:
        if not start.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"):
            return False
    try:
        content = _content(file)
    except ValueError:  # whoever reads it next says what is wrong
        return False
    return all(isinstance(content.get(part), list) for part in PARTS)


def _content(file: Path) -> dict:
    found = file.stat()
    return _parsed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)  # large ones take seconds, and are asked for more than once
def _parsed(file: Path, changed: int, size: int) -> dict:
    return json.loads(file.read_text(encoding="utf-8-sig"))


def read(file: Path, ask: Ask) -> Rows:
    """The rows of an annotation file. Raises ValueError as `rows_of`, or if no image is found."""
    content = _content(file)
    rows = rows_of(content, file, ask)
    rows.folder = image_folder(content, file)
    return rows


def image_folder(content: dict, file: Path) -> Path:
    """Where the first image lies: beside the file, in a folder there, or in one beside its folder.

    Raises ValueError naming the folders that were looked at.
    """
    name = str(content["images"][0].get("file_name", ""))
    split = file.stem.removeprefix("instances_")
    roots = [file.parent, file.parent.parent]
    tried = [root / inside for root in roots for inside in ("", "images", split, f"images/{split}")]
    for folder in tried:
        if (folder / name).is_file():
            return folder
    raise ValueError(
        f"{file}: its first image, {name!r}, is in none of {', '.join(map(str, tried))}"
    )


def rows_of(content: dict, where, ask: Ask) -> Rows:
    """The rows of an annotation file's content, in its order of images and categories.

    where: the file, for messages. Raises ValueError if an image or category is named that the
    content does not have, if a number is given twice, or if there is no box. A box that is none is
    a fault of its row.
    """
    images, names = _by_id(content, "images", where), _by_id(content, "categories", where)
    shown: dict[tuple, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        place = annotation.get("image_id"), annotation.get("category_id")
        for number, known, what in zip(place, (images, names), ("image", "category"), strict=True):
            if number not in known:
                raise ValueError(
                    f"{where}: annotation {annotation.get('id')} is of {what} {number}, which the "
                    f"file does not have"
                )
        shown[place].append(annotation)
    if not shown:
        raise ValueError(f"{where}: no annotation")
    boxed = {p: found for p, found in shown.items() if not all(map(_is_crowd, found))}
    used = {category for _, category in boxed}
    called = {number: str(entry.get("name", number)) for number, entry in names.items()}
    asked = [number for number in names if number in used]
    absent = _absent(images, asked, shown, round(share_of(len(boxed), ask.absent_share)))
    order = [(i, c) for i in images for c in asked if (i, c) in boxed or (i, c) in absent]
    table, faults, clipped = [], [], 0
    for index, (image, category) in enumerate(order):
        entry, found = images[image], shown.get((image, category), [])
        size = entry.get("width"), entry.get("height")
        solution, wrong, cut = _solution([a for a in found if not _is_crowd(a)], size)
        clipped += cut
        problem = ask.boxes_problem(called[category])
        place = {"image_id": image, "category_id": category, "category": called[category]}
        place |= {"annotations": found, "size": size}
        row = {"image": entry.get("image") or entry.get("file_name")}
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
    if clipped:
        rows.said.append(f"{clipped} boxes reach out of their image and are clipped to it")
    if unused:
        rows.said.append(f"never asked for, as no box is of them: {', '.join(unused)}")
    return rows


def _by_id(content: dict, part: str, where) -> dict:
    found = {}
    for entry in content[part]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if number is None or number in found:
            raise ValueError(f"{where}: {part}: {str(entry)[:80]!r} has no id of its own")
        found[number] = entry
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


def _solution(annotations: list[dict], size: tuple) -> tuple[str, str, int]:
    """(solution in pixels, what is wrong or "", boxes clipped) of the boxes [x, y, width, height]
    in an image of this (width, height)."""
    boxes, clipped = [], 0
    if not all(isinstance(side, int | float) and side > 0 for side in size):
        return NOTHING, f"width and height are {size[0]} and {size[1]}", 0
    for annotation in annotations:
        box = annotation.get("bbox")
        numbers = isinstance(box, list | tuple) and len(box) == 4
        if not numbers or not all(isinstance(n, int | float) for n in box):
            return NOTHING, f"annotation {annotation.get('id')} has the bbox {str(box)[:80]}", 0
        x, y, w, h = box
        wide = (x, y, x + w, y + h)
        corners = [
            min(max(round(float(n), 4), 0.0), side)
            for n, side in zip(wide, (*size, *size), strict=True)
        ]
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            found = f"annotation {annotation.get('id')}, bbox {box}: no area inside the image"
            return NOTHING, found, 0
        clipped += any(abs(a - b) > 1e-3 for a, b in zip(wide, corners, strict=True))
        boxes.append(f"{{'Position': {[_short(n) for n in corners]}, 'Confidence': 1.0}}")
    return f"<answer>[{', '.join(boxes)}]</answer>" if boxes else NOTHING, "", clipped


def _short(number: float) -> int | float:
    return int(number) if number == int(number) else number
