"""Boxes in the notations of other tools and models, as solutions hold them.

A script reads each solution of its rows once, before it looks at what they count
(data/kinds.py's `read_kinds`). What can be read without doubt becomes the project's own form, so
rewards, hints and conversions know no other. What cannot is named, and is a bad row for every
script: boxes are never taken for a class. Not here: what a model answers (boxes.py).
"""

import ast
import json
import re
from dataclasses import dataclass, replace
from math import inf

from data.errors import UserError
from rewards.boxes import (
    NOTHING,
    are_no_objects,
    corners_of,
    first_fault,
    four_numbers,
    grounding_text,
    looks_like_boxes,
    numbers_in,
    parse_boxes,
    position_text,
    solution_kind,
    true_answer,
)

LONGEST = 50_000  # characters of a solution that are looked into
FARTHEST = 1e6  # thousandths or pixels
SEARCHED = 2000  # of a class: no name comes near it
READ = (
    "one box is read as <answer>(101,201),(350,666)</answer>, several as "
    "<answer>[{'Position': [101, 201, 350, 666], 'Confidence': 1.0}, ...]</answer>"
)

# Tags around a box and around its name: Qwen-VL's, Qwen2-VL's, InternVL's and DeepSeek-VL2's.
_BOX_TAG = re.compile(
    r"<\|box_start\|>(.*?)<\|box_end\|>|<box>(.*?)</box>|<bbox>(.*?)</bbox>"
    r"|<\|det\|>(.*?)<\|/det\|>",
    re.DOTALL,
)
_TAG_ENDS = ("<|box_end|>", "</box>", "</bbox>", "<|/det|>")  # without one, a search takes long
_NAME_TAG = re.compile(
    r"<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>|<ref>([^<]*)</ref>"
    r"|<\|ref\|>([^<]*)<\|/ref\|>"
)
_LABEL = re.compile(r"""["'](?:label|category|name|class)["']\s*:\s*["']([^"']*)["']""")
_NAME_KEYS = ("label", "category", "name", "class")
_BOX_KEYS = ("position", "bbox_2d", "bbox", "bboxes", "box", "boxes", "bounding_box")
_CORNER_KEYS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_N = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_KEY_AND_NUMBER = re.compile(rf"([a-z]\w*)\s*[:=]\s*({_N})", re.IGNORECASE)
_KEYED = re.compile(rf"(?:[a-z]\w{{0,9}}\s*[:=]\s*{_N}[\s,;]*){{4}}", re.IGNORECASE)
_GEMINI = re.compile(r"\bbox_2d\b")
# What is boxes, or another place in the image, but not in a notation that is read.
_UNREAD = {
    "PaliGemma's <loc> tokens, which count 1024ths with y before x": r"<loc\d+>",
    "Florence-2's <loc_> tokens": r"<loc_\d+>",
    "Kosmos-2's <patch_index_> tokens": r"<patch_index_\d+>",
    "MiniGPT's boxes, which count hundredths": r"\{<\d+><\d+><\d+><\d+>\}",
    "corners of a polygon": r"<\|?quad|[\"'](?:polygon|segmentation)[\"']\s*:",
    "points, not boxes": r"<points?\b|[\"']point(?:s|_2d)?[\"']\s*:",
    "boxes with something around them, or with something missing": (
        r"<\|?/?(?:box|bbox|bndbox|det\|)|box_start|box_end|bbox|<x_?min>"
        rf"|[\[(<]\s*{_N}(?:\s*,\s*{_N}){{3}}\s*[\])>]"
        rf"|(?<![\w.,-]){_N}(?:\s*,\s*{_N}){{3}}(?![\w-]|[.,]\d)"
        rf"|\(\s*{_N}\s*,\s*{_N}\s*\)\s*,\s*\(\s*{_N}"
        rf"|\bx_?(?:1|min)\s*[:=]\s*{_N}.*\by_?(?:1|min)\s*[:=]"
        rf"|^\s*{_N}(?:\s*,\s*{_N}){{4,}}\s*$"
    ),
    "four numbers with a name or a unit beside them": (
        rf"^(?:[^\W\d][^\d]*[\s:=,(\[（])?[\s(\[（]*{_N}(?:px|%)?"
        rf"(?:(?:[\s,;|/()\[\]（），]|to)+{_N}(?:px|%)?){{3,}}[\s)\]）]*"
        r"(?:[\s,;:]+[^\W\d][^\d]*)?$"
    ),
}
_UNREAD = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _UNREAD.items()}


@dataclass(frozen=True)
class Reading:
    """What a solution is.

    kind: "class", "boxes" or "grounding" (one box). text: the solution in the project's own form.
    notation: "" if it was in that form, else a word for the one that it was in. listed: the same as
    a list of boxes, "" if there is no choice: a set where some rows have several boxes has lists
    only. labels: what the boxes are called. fault: why it is not read, "" if it is.
    """

    kind: str
    text: str
    notation: str = ""
    listed: str = ""
    labels: tuple[str, ...] = ()
    fault: str = ""

    def as_list(self) -> "Reading":
        """The same boxes as a list."""
        notation = self.notation or "one box"
        return replace(self, kind="boxes", text=self.listed, listed="", notation=notation)


@dataclass(frozen=True)
class _Found:
    corners: list[float]
    label: str = ""
    confidence: float = 1.0


def read_solution(solution: str) -> Reading:
    """What a data set's solution is, in whatever notation it is written. Raises nothing."""
    answer = true_answer(solution)
    try:
        return _read(solution, answer)
    except UserError as error:
        return Reading("boxes", solution, fault=f"{_show(solution)} is not read: {error}; {READ}")


def _read(solution: str, answer: str) -> Reading:
    if are_no_objects(answer):
        return Reading("boxes", solution)
    if numbers := four_numbers(answer):
        found = [_Found(list(numbers))]
        listed = _listed(found) if answer.startswith("[") else ""  # may stand beside lists of lists
        kind = solution_kind(solution)  # one bbox_2d in a list is boxes
        listed = listed if kind == "grounding" else ""
        return _checked(Reading(kind, solution, listed=listed, labels=_labels(answer)), found)
    if answer.startswith(("[", "{")):
        parsed = parse_boxes(answer, (inf, inf))
        own_form = not parsed.reason and not parsed.bad and answer[-1] in "]}"
        if own_form and answer.count("{") == len(parsed.boxes):
            found = [_Found(list(corners)) for corners in corners_of(solution)]
            return _checked(Reading("boxes", solution, labels=_labels(answer)), found)
    if len(answer) > LONGEST:
        if solution_kind(solution) == "class":
            return Reading("class", solution)
        raise UserError(f"it is longer than {LONGEST} characters")
    if any(end in answer for end in _TAG_ENDS) and _BOX_TAG.search(answer):
        return _converted(_in_tags(answer), "tags around each box")
    if numbers := _in_a_row(answer):
        return _converted([_Found(four) for four in numbers], "four numbers")
    if _KEYED.fullmatch(answer):
        named = {key.casefold(): float(n) for key, n in _KEY_AND_NUMBER.findall(answer)}
        if {"x", "y"} <= named.keys() or any(set(names) == named.keys() for names in _CORNER_KEYS):
            return _converted(_in_dict(named), "four numbers with their names")
    if _GEMINI.search(answer):
        raise UserError(
            "it has box_2d, which Gemini writes with y before x: write bbox_2d with x1, y1, x2, y2"
        )
    value = _value(answer)
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_pair, value)):
        value = [*value[0], *value[1]]  # ((x1, y1), (x2, y2))
    if isinstance(value, dict | list):
        return _of_value(value)
    if _is_yolo(answer):
        raise UserError("it is YOLO's lines, shares of the image around a box's centre")
    for name, pattern in _UNREAD.items():
        if pattern.search(answer[:SEARCHED]):
            raise UserError(f"it is {name}")
    if looks_like_boxes(answer):
        raise UserError("it is no list of boxes")
    return Reading("class", solution)


def _of_value(value) -> Reading:
    """The reading of a solution that is JSON or a Python literal."""
    if isinstance(value, dict) or any(isinstance(item, dict) for item in value):
        items = [value] if isinstance(value, dict) else value
        found = [box for item in items for box in _in_dict(item)]
        known = {*_BOX_KEYS, *sum(_CORNER_KEYS, ())}
        keys = sorted({str(key).casefold() for item in items for key in item} & known)
        notation = f"boxes with {', '.join(keys)}"
        return _checked(Reading("boxes", _listed(found), notation, labels=_names(found)), found)
    return _converted([_Found(numbers) for numbers in _lists_of_four(value)], "lists of numbers")


def _converted(found: list[_Found], notation: str) -> Reading:
    """The reading of boxes that were in another notation."""
    listed, names = _listed(found), _names(found)
    if len(found) == 1:
        text = grounding_text(found[0].corners)
        reading = Reading("grounding", text, notation, listed=listed, labels=names)
    else:
        reading = Reading("boxes", listed, notation, labels=names)
    return _checked(reading, found)


def _checked(reading: Reading, found: list[_Found]) -> Reading:
    """The reading, with the fault of the first box that is legal in no image.

    Raises UserError if a box's coordinates are all at most 1, or far beyond any image.
    """
    for box in found:
        if max(box.corners) > FARTHEST:
            raise UserError(f"{box.corners} is no place in an image")
        if max(box.corners) <= 1:
            raise UserError(
                f"{box.corners} is shares of the image (0 to 1): multiply them by 1000 for "
                f"thousandths, or by its width and height for pixels"
            )
    return replace(reading, fault=first_fault([box.corners for box in found], (inf, inf)))


def _listed(found: list[_Found]) -> str:
    boxes = [position_text(box.corners, box.confidence) for box in found]
    return f"<answer>[{', '.join(boxes)}]</answer>" if boxes else NOTHING


def _names(found: list[_Found]) -> tuple[str, ...]:
    return tuple(box.label for box in found if box.label)


def _labels(answer: str) -> tuple[str, ...]:
    return tuple(_LABEL.findall(answer))


def _in_a_row(answer: str) -> list[list[float]] | None:
    """The boxes of a text that is four numbers, or of which each line is; None of any other."""
    found = []
    for line in [answer] if _four(answer) else re.split(r"[\n;]", answer):
        if line.strip():
            found.append(_four(line))
    return found if found and all(found) else None


def _four(text: str) -> list[float] | None:
    """Four numbers between commas or spaces, in brackets or not; None for anything else."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()
    return numbers_in(re.split(r"\s*[,;]\s*|\s+", text), 4)


def _is_yolo(answer: str) -> bool:
    """Whether each line is a class and four shares of the image."""
    lines = [numbers_in(line.split(), 5) for line in answer.splitlines()]
    return all(line and max(line[1:]) <= 1 and min(line[1:]) >= 0 for line in lines)


def _in_tags(answer: str) -> list[_Found]:
    """The boxes of a text that holds nothing but tags around boxes and around their names."""
    rest = _NAME_TAG.sub("", _BOX_TAG.sub("", answer))
    if re.sub(r"\band\b|[\s,;.:]", "", rest):
        raise UserError(f"there is text around the boxes, {_show(rest.strip())}")
    found, label, end = [], "", 0
    for tag in _BOX_TAG.finditer(answer):
        names = _NAME_TAG.findall(answer[end : tag.start()])
        label, end = "".join(names[-1]).strip() if names else label, tag.end()
        body = "".join(part for part in tag.groups() if part).strip()
        corners = four_numbers(body) or _four(body)
        several = [list(corners)] if corners else _lists_of_four(_value(body))
        found += [_Found(numbers, label) for numbers in several]
    return found


def _lists_of_four(value) -> list[list[float]]:
    """The boxes of [x1, y1, x2, y2] or of a list of those. Raises UserError for anything else."""
    if not isinstance(value, list | tuple):
        raise UserError("it is not four numbers")
    if not value:
        return []
    if all(_is_number(item) for item in value):
        value = [value]
    found = []
    for item in value:
        if isinstance(item, str):
            raise UserError(
                "it is a list of texts, neither boxes nor a class, which is its name alone"
            )
        numbers = item if isinstance(item, list | tuple) and all(map(_is_number, item)) else []
        numbers = numbers_in([str(number) for number in numbers], 4)
        if numbers is None:
            kind = "points or a polygon" if _is_pairs(item) else "not four numbers"
            raise UserError(f"{_show(item)} is {kind}")
        found.append(numbers)
    return found


def _is_pair(item) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and all(map(_is_number, item))


def _is_pairs(item) -> bool:
    """Whether a list that is no box holds x and y of points, in lists or one after the other."""
    numbers = isinstance(item, list | tuple) and all(map(_is_number, item))
    return isinstance(item, list | tuple) and (
        not numbers or (len(item) != 4 and len(item) % 2 == 0)
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_dict(item) -> list[_Found]:
    """The boxes of an object with a known key. Raises UserError for any other."""
    if not isinstance(item, dict):
        raise UserError(f"{_show(item)} is no box with its corners")
    content = {str(key).casefold(): value for key, value in item.items() if value is not None}
    label = next((str(content[key]) for key in _NAME_KEYS if key in content), "")
    keys = [key for key in _BOX_KEYS if key in content]
    corners = [names for names in _CORNER_KEYS if set(names) <= content.keys()]
    if len(keys) + len(corners) != 1:
        if {"x", "y"} <= content.keys():
            raise UserError(
                "it is x and y with a width and a height, or of a point: write bbox_2d with "
                "x1, y1, x2, y2"
            )
        many = "two boxes in one object" if keys or corners else "no key bbox_2d"
        raise UserError(f"{_show(item)} has {many}")
    if corners:
        numbers = [[content[name] for name in corners[0]]]
    elif isinstance(content[keys[0]], dict):
        return [_Found(box.corners, label) for box in _in_dict(content[keys[0]])]
    else:
        numbers = content[keys[0]]
    confidence = content.get("confidence", 1.0)
    if not _is_number(confidence) or not 0 <= confidence <= 1:
        raise UserError(f"{_show(item)} has a confidence that is not 0 to 1")
    return [_Found(four, label, confidence) for four in _lists_of_four(numbers)]


def _value(text: str):
    """What JSON, or a Python literal, holds; None if the text is neither."""
    if not text.startswith(("[", "{", "((")):
        return None
    if not re.search("[a-zA-Z]", text):
        text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # CogVLM's 010
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _show(value) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
