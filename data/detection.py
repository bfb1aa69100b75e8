"""Detection rows out of the content of a COCO file: what every form with boxes is read through.

A row asks for one category in one image: there is a row for each category that the image shows,
and for some that it does not (--absent_share). Crowd boxes are not to be found, and an image that
shows nothing but crowds of a category has no row for it. Not here: files (data/coco.py).
"""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.annotations import is_box, is_number
from data.errors import UserError
from data.rows import Fault, SplitRows
from data.wording import Wording, check_names

NOTHING = "<answer>No Objects</answer>"


def file_name(entry: dict) -> str:
    return str(entry.get("file_name", "")).replace("\\", "/")


def rows_of(content: dict, where, wording: Wording) -> SplitRows:
    """The rows of an annotation file's content, in its order of images and categories.

    content: `images` (id, file_name, width, height in pixels, and `image` where the file's name is
    not its path), `annotations` (id, image_id, category_id, bbox as x, y, width, height in pixels,
    iscrowd) and `categories` (id, name); data/annotations.py makes it sound. where: the file, for
    messages. Boxes and solutions count pixels. Raises UserError if an
    annotation is of an image or category that the content does not have, if an id occurs twice, or
    if there is no box. A box that is none is a fault of its row.
    """
    images, categories = _by_id(content, "images", where), _by_id(content, "categories", where)
    annotations = _by_pair(content["annotations"], images, categories, where)
    boxed = {pair for pair, those in annotations.items() if not all(map(_is_crowd, those))}
    with_boxes = {category for _, category in boxed}
    names = {number: str(entry.get("name", number)) for number, entry in categories.items()}
    asked = [number for number in categories if number in with_boxes]
    check_names([names[number] for number in asked], f"{where}: the categories")
    if not boxed:
        raise UserError(f"{where}: all boxes are crowds, so there is nothing to find")
    numbers = [n for a in content["annotations"] if is_box(a.get("bbox")) for n in a["bbox"]]
    if numbers and max(numbers) <= 1:
        raise UserError(f"{where}: no coordinate is above 1; boxes must count pixels, not shares")
    count = round(absent_count(len(boxed), wording.absent_share))
    absent = _choose_absent(images, asked, annotations, count)

    table, faults, clipped, repeated = [], [], 0, 0
    pairs = [(i, c) for i in images for c in asked if (i, c) in boxed or (i, c) in absent]
    for index, (image, category) in enumerate(pairs):
        entry, those = images[image], annotations.get((image, category), [])
        size = entry.get("width"), entry.get("height")
        solution = _solution([a for a in those if not _is_crowd(a)], size)
        clipped, repeated = clipped + solution.clipped, repeated + solution.repeated
        coco = {"image_id": image, "category_id": category, "category": names[category]}
        table.append({
            "image": entry.get("image") or file_name(entry),
            "problem": wording.boxes_problem(names[category]),
            "solution": solution.text,
            "coco": coco | {"annotations": those, "size": size},
        })  # fmt: skip
        if solution.fault:
            todo = "correct the annotation, or remove it"
            shown = str(entry.get("file_name", "image"))
            faults.append(Fault(index, shown, solution.fault, todo))
    rows = SplitRows(table, Path())
    rows.has_our_prompts, rows.asked_frame, rows.faults = True, wording.frame, faults
    rows.notes = [
        f"{len(images)} images, {len(asked)} categories: {', '.join(names[c] for c in asked)}",
        f"{len(boxed)} rows ask for what an image shows, {len(absent)} for what it does not "
        f"(--absent_share)",
        *_notes(content["annotations"], names, asked, clipped, repeated),
    ]
    return rows


def _by_id(content: dict, part: str, where) -> dict:
    """The entries of `part` by their ids. Raises UserError for an id that is none or not unique."""
    entries = {}
    for entry in content[part]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_id(number):
            raise UserError(f"{where}: {part}: {str(entry)[:80]!r} has no id of its own")
        if number in entries:
            both = " and ".join(repr(str(e)[:80]) for e in (entries[number], entry))
            raise UserError(f"{where}: {part}: the id {number!r} is there twice: {both}")
        entries[number] = entry
    if len({type(number) for number in entries}) > 1:
        number, text = (next(n for n in entries if isinstance(n, kind)) for kind in (int, str))
        raise UserError(
            f"{where}: {part}: some ids are numbers and some are text: {number!r}, {text[:80]!r}"
        )
    return entries


def _by_pair(annotations: list, images: dict, categories: dict, where) -> dict[tuple, list[dict]]:
    """(image id, category id) -> its annotations. Raises UserError for an id that is not there."""
    by_pair: dict[tuple, list[dict]] = defaultdict(list)
    for annotation in annotations:
        if not isinstance(annotation, dict):
            raise UserError(f"{where}: {str(annotation)[:80]!r} is no annotation")
        pair = annotation.get("image_id"), annotation.get("category_id")
        for number, known, what in zip(
            pair, (images, categories), ("image", "category"), strict=True
        ):
            if is_id(number) and number in known:
                continue
            found = f"{where}: annotation {annotation.get('id')} is of {what} {number!r:.80}"
            alike = next((other for other in known if str(other) == str(number)), None)
            if is_id(number) and alike is not None:
                kind = "text" if isinstance(number, str) else "a number"
                raise UserError(
                    f"{found}, {kind}, and the file has {alike!r}: write both in one way"
                )
            raise UserError(f"{found}, which the file does not have")
        by_pair[pair].append(annotation)
    if not by_pair:
        raise UserError(f"{where}: no annotation")
    return by_pair


def is_id(value) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _notes(
    annotations: list[dict], names: dict, asked: list, clipped: int, repeated: int
) -> list[str]:
    """Lines for the plan on what was decided about boxes and categories.

    names: category id -> name. asked: ids of the categories that rows ask for. clipped, repeated:
    how many boxes were.
    """
    notes = []
    crowds = sum(map(_is_crowd, annotations))
    unused = [name for number, name in names.items() if number not in asked]
    if crowds:
        notes.append(f"{crowds} crowd boxes are left out")
    if repeated:
        notes.append(f"{repeated} boxes are there twice, and are asked for once")
    if all(names[number].isdigit() for number in asked):
        notes.append("the categories have numbers for names, so the prompt asks for numbers")
    if clipped:
        notes.append(f"{clipped} boxes reach out of their image and are clipped to it")
    if unused:
        more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        notes.append(f"never asked for, as no box is of them: {', '.join(unused[:8])}{more}")
    return notes


def _is_crowd(annotation: dict) -> bool:
    return annotation.get("iscrowd") == 1


def absent_count(present: int, share: float) -> float:
    """How many rows beside `present` ones make up `share` of all."""
    return present * share / (1 - share)


def _choose_absent(images, asked: list, annotations: dict, count: int) -> set[tuple]:
    """`count` pairs of an image and a category that it does not show, at random, but the same ones
    in every run; one pair of each image first, then a second one."""
    chosen: set[tuple] = set()
    free = {i: [c for c in asked if (i, c) not in annotations] for i in images}
    while len(chosen) < count and any(free.values()):
        drawn = []
        for image, categories in free.items():
            if categories:
                order = sorted(categories, key=lambda c: _digest(image, c))
                free[image] = order[1:]
                drawn.append((image, order[0]))
        drawn.sort(key=lambda pair: _digest("row", *pair))
        chosen |= set(drawn[: count - len(chosen)])
    return chosen


def _digest(*words) -> str:
    """A hash to sort by: a random order that is the same in every run."""
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()


class _Solution(NamedTuple):
    """A row's solution in pixels, what is wrong with its boxes or "", and how many of them were
    clipped to the image or left out as they occur twice."""

    text: str
    fault: str = ""
    clipped: int = 0
    repeated: int = 0


def _solution(annotations: list[dict], size: tuple) -> _Solution:
    """The solution of the boxes [x, y, width, height] in an image of this (width, height)."""
    boxes, clipped = [], 0
    if not all(is_number(side) and side > 0 for side in size):
        text = "text: " if any(isinstance(side, str) for side in size) else ""
        return _Solution(NOTHING, f"width and height are {text}{size[0]!r:.80} and {size[1]!r:.80}")
    for annotation in annotations:
        box, name = annotation.get("bbox"), f"annotation {annotation.get('id')}"
        if annotation.get("iscrowd", 0) != 0:
            return _Solution(NOTHING, f"{name} has iscrowd {annotation['iscrowd']!r}, not 0 or 1")
        if not is_box(box):
            return _Solution(NOTHING, f"{name} has the bbox {str(box)[:80]}, not four numbers")
        x, y, w, h = box
        unclipped = (x, y, x + w, y + h)
        corners = [
            min(max(round(float(n), 4), 0.0), side)
            for n, side in zip(unclipped, (*size, *size), strict=True)
        ]
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            return _Solution(NOTHING, f"{name}, bbox {box}: no area inside the image")
        clipped += any(abs(a - b) > 1e-3 for a, b in zip(unclipped, corners, strict=True))
        boxes.append(f"{{'Position': {[_short(n) for n in corners]}, 'Confidence': 1.0}}")
    distinct = list(dict.fromkeys(boxes))
    text = f"<answer>[{', '.join(distinct)}]</answer>" if distinct else NOTHING
    return _Solution(text, "", clipped, repeated=len(boxes) - len(distinct))


def _short(number: float) -> int | float:
    return int(number) if number == int(number) else number
