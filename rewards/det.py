"""The detection rewards: how well do the answer's boxes, and its confidence in them, fit the truth?

Boxes are `{'Position': [x1, y1, x2, y2], 'Confidence': c}` in a frame that is 1000 x 1000 unless
another is given. What models write is read leniently and never evaluated: an element that is no
legal box stays in the count as a wrong one and voids no other. Time is linear in the text's length.

Not here: categories (each prompt asks for one), average precision (train_det.py), the layout of the
completion as a whole (`format.py`).
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.parse import find_answer, perfect

CONFIDENCE_KINDS = ("calibrated", "visual_rft")
THOUSANDTHS = (1000.0, 1000.0)

_KEY = r"""(?:^|,)\s*["'`]?%s["'`]?\s*:"""  # the whole key: MyConfidence is another
_POSITION = re.compile(_KEY % "position" + r"\s*[\[(]([^\[\](){}]*)[\])]", re.IGNORECASE)
_CONFIDENCE = re.compile(_KEY % "confidence" + r"([^,]*)", re.IGNORECASE)
_FENCE = re.compile(r"```\w{0,20}")
_NUMBER = r"\s*([+-]?\d{1,9}(?:\.\d{0,9})?)\s*"
_PAIRS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclass(frozen=True)
class Box:
    """A legal box, clipped to its frame: x1 < x2, y1 < y2, confidence 0 to 1."""

    x1: float
    y1: float
    x2: float
    y2: float
    confidence: float = 1.0


@dataclass(frozen=True)
class Parsed:
    """What an answer holds: legal boxes, what is wrong with each bad element, why it is no list."""

    boxes: tuple[Box, ...]
    faults: tuple[str, ...] = ()
    reason: str = ""

    @property
    def bad(self) -> int:
        """Number of bad elements."""
        return len(self.faults)


def parse_boxes(text: str, frame: tuple[float, float] = THOUSANDTHS) -> Parsed:
    """Read a Python or JSON list of boxes as models write it.

    Several lines, a code fence, one dict without a list, trailing commas, keys in any case, mixed
    quotes and floats are all fine; of a truncated list the whole elements count. `No Objects` and
    `[]` are the empty list. An element whose position is not four finite numbers, that is empty
    after clipping to `frame` (width, height), or whose confidence is missing or outside 0 to 1 is
    bad. Returns a Parsed whose reason is "" or "not a list of boxes". Raises nothing.
    """
    text = text.strip()
    if fence := _FENCE.match(text):
        text = text[fence.end() :]
    # Not by a pattern: one that ends in white space and a fence is quadratic in white space.
    text = text.removesuffix("```").strip()
    if text.rstrip(".!").strip("'\"").casefold() in ("no objects", "no object"):
        return Parsed(())
    if not text.startswith(("[", "{")):
        return Parsed((), reason="not a list of boxes")
    elements, between, start = [], [], 0
    while (opened := text.find("{", start)) >= 0:
        between.append(text[start:opened])
        closed = text.find("}", opened)
        if closed < 0:  # a truncated tail
            start = len(text)
            break
        elements.append(_read_element(text[opened + 1 : closed], frame))
        start = closed + 1
    between.append(text[start:])
    if len(between) == 1:  # no element at all
        empty = text.startswith("[") and text.endswith("]") and not text[1:-1].strip()
        return Parsed((), reason="" if empty else "not a list of boxes")
    if not elements:  # cut before the first was whole
        return Parsed((), reason="not a list of boxes")
    boxes = tuple(element for element in elements if isinstance(element, Box))
    faults = [element for element in elements if isinstance(element, str)]
    chatter = sum(bool(part.strip(" \t\r\n[]")) for part in ",".join(between).split(","))
    return Parsed(boxes, (*faults, *["text between the boxes"] * chatter))


def _read_element(body: str, frame: tuple[float, float]) -> Box | str:
    """The Box, or why it is none."""
    positions, confidences = _POSITION.findall(body), _CONFIDENCE.findall(body)
    for key, found in (("Position", positions), ("Confidence", confidences)):
        if len(found) != 1:
            return f"a box with {'two of' if found else 'no'} {key}"
    (confidence,) = _numbers([confidences[0].strip(" \t\r\n\"'`")], 1) or (math.nan,)
    if not 0 <= confidence <= 1:
        return "a Confidence that is not 0 to 1"
    position = _numbers(positions[0].split(","), 4)
    return _clipped(position, confidence, frame) if position else "a Position that is not 4 numbers"


def _numbers(words: list[str], count: int) -> list[float] | None:
    """`count` finite numbers, with perhaps a comma after them; None for anything else."""
    words = [word.strip() for word in words]
    words = words[:-1] if len(words) == count + 1 and not words[-1] else words
    if len(words) != count or any(len(word) > 40 or "_" in word for word in words):
        return None
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _clipped(position: list[float], confidence: float, frame: tuple[float, float]) -> Box | str:
    x1, x2 = (min(max(x, 0.0), frame[0]) for x in position[::2])
    y1, y2 = (min(max(y, 0.0), frame[1]) for y in position[1::2])
    if x1 >= x2 or y1 >= y2 or not (x2 - x1) * (y2 - y1):  # an area can underflow to 0
        return "corners swapped, or no area inside the frame"
    return Box(x1, y1, x2, y2, confidence)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 to 1."""
    inter, union, _ = _areas(a, b)
    return inter / union


def giou(a: Box, b: Box) -> float:
    """Generalized IoU, -1 to 1 (Rezatofighi et al. 2019, algorithm 1)."""
    inter, union, hull = _areas(a, b)
    return inter / union - (hull - union) / hull


def _areas(a: Box, b: Box) -> tuple[float, float, float]:
    """Areas of the intersection, the union and the smallest box around both."""
    width = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    height = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    inter = width * height
    union = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - inter
    hull = (max(a.x2, b.x2) - min(a.x1, b.x1)) * (max(a.y2, b.y2) - min(a.y1, b.y1))
    return inter, union, hull


def match_boxes(
    predicted: tuple[Box, ...], true: tuple[Box, ...], iou_threshold: float = 0.5
) -> list[tuple[Box, float]]:
    """Each distinct prediction, by falling confidence, with the IoU of its true box or 0.

    Exact duplicates are dropped. A prediction takes the free true box of highest IoU, if that is
    above `iou_threshold`, strictly.
    """
    free, matched = list(true), []
    for box in sorted(dict.fromkeys(predicted), key=lambda box: -box.confidence):
        best = max(free, key=lambda other: iou(box, other), default=None)
        overlap = iou(box, best) if best else 0.0
        if overlap > iou_threshold:
            free.remove(best)
        else:
            overlap = 0.0
        matched.append((box, overlap))
    return matched


def iou_reward(
    completion: str,
    solution: str,
    iou_threshold: float = 0.5,
    frame: tuple[float, float] = THOUSANDTHS,
) -> float:
    """Sum of matched IoU / max(true boxes, predicted boxes), 0 to 1.

    1 where nothing is predicted and nothing is there. Raises ValueError for a bad solution only.
    """
    return _paid(completion, solution, iou_threshold, frame, lambda box, overlap: overlap)


def confidence_reward(
    completion: str,
    solution: str,
    kind: str = "calibrated",
    iou_threshold: float = 0.5,
    frame: tuple[float, float] = THOUSANDTHS,
) -> float:
    """What the confidence of the boxes earns, 0 to 1.

    calibrated  max(0, confidence over matched - confidence over unmatched) / max(true, predicted);
                a bad element counts as unmatched with confidence 1
    visual_rft  mean over predictions of c where matched, 1 - c where not: the published formula,
                which pays 1.0 for a wrong box with confidence 0

    1 where nothing is predicted and nothing is there. Raises ValueError for an unknown kind and for
    a bad solution.
    """
    if kind == "calibrated":

        def earns(box: Box, overlap: float) -> float:
            return box.confidence if overlap else -box.confidence

        return _paid(completion, solution, iou_threshold, frame, earns, bad=-1.0)
    if kind == "visual_rft":

        def earns(box: Box, overlap: float) -> float:
            return box.confidence if overlap else 1 - box.confidence

        return _paid(completion, solution, iou_threshold, frame, earns, missed=False)
    raise ValueError(f"confidence reward {kind!r} is none of {', '.join(CONFIDENCE_KINDS)}")


def _paid(completion, solution, iou_threshold, frame, earns, bad=0.0, missed=True) -> float:
    """Mean of what each prediction earns, over predictions or (`missed`) true boxes if more."""
    true = read_boxes(solution, frame)
    answer = find_answer(completion)[0]
    if answer is None:
        return 0.0
    parsed = parse_boxes(answer, frame)
    matched = match_boxes(parsed.boxes, true, iou_threshold)
    count = len(matched) + parsed.bad
    if parsed.reason or not count or not true:
        return float(not parsed.reason and not count and not true)
    total = sum(earns(*pair) for pair in matched) + bad * parsed.bad
    return min(1.0, max(0.0, total / (max(count, len(true)) if missed else count)))


def explain_boxes(
    completion: str,
    solution: str,
    iou_threshold: float = 0.5,
    frame: tuple[float, float] = THOUSANDTHS,
) -> str:
    """Why boxes earn less than they could: the first thing that is wrong, "" where nothing is."""
    true = read_boxes(solution, frame)
    answer, reason = find_answer(completion)
    if answer is None:
        return reason
    parsed = parse_boxes(answer, frame)
    matched = match_boxes(parsed.boxes, true, iou_threshold)
    count = len(matched) + parsed.bad
    found = sum(overlap > 0 for _, overlap in matched)
    checks = {
        parsed.reason: bool(parsed.reason),
        "box where nothing is": count and not true,
        "no box predicted": true and not count,
        parsed.faults[0] if parsed.bad else "": parsed.bad,
        "IoU below threshold": true and found < min(count, len(true)),
        "too many boxes": count > len(true),
        "too few boxes": count < len(true),
    }
    return next((why for why, is_so in checks.items() if is_so), "")


def other_readings(
    completion: str,
    solution: str,
    iou_threshold: float,
    frame: tuple[float, float],
    size: tuple[int, int],
) -> dict[str, float]:
    """The IoU reward that an answer would earn if its numbers were meant in another way.

    size: width and height in pixels of the upright image. Returns {reading: 0 to 1}, the reward as
    it is under "as asked"; in the other readings any confidence, or none, is fine. {} where the
    answer or the solution holds no position. Raises ValueError for a bad solution only.
    """
    true, bodies = read_boxes(solution, frame), re.split(r"[{}]", find_answer(completion)[0] or "")
    found = [_POSITION.findall(body) for body in bodies]
    positions = [_numbers(one[0].split(","), 4) for one in found if len(one) == 1]
    if not true or not any(positions):
        return {}
    earned = {"as asked": iou_reward(completion, solution, iou_threshold, frame)}
    for name, read in _readings(frame, size).items():
        boxes = [_clipped(read(*p), 1.0, frame) if p else "" for p in positions]
        legal = tuple(box for box in boxes if isinstance(box, Box))
        matched = match_boxes(legal, true, iou_threshold)
        count = len(matched) + len(boxes) - len(legal)
        earned[name] = sum(overlap for _, overlap in matched) / max(count, len(true))
    return earned


def _readings(frame: tuple[float, float], size: tuple[int, int]) -> dict:
    """name -> f(four numbers as they stand) -> x1, y1, x2, y2 in the frame."""
    (width, height), (across, down) = frame, size if frame == THOUSANDTHS else THOUSANDTHS
    x, y = width / across, height / down
    scaled = "pixels of the image" if frame == THOUSANDTHS else "thousandths of the image"
    return {
        "boxes with any confidence": lambda a, b, c, d: (a, b, c, d),
        scaled: lambda a, b, c, d: (a * x, b * y, c * x, d * y),
        "shares of the image": lambda a, b, c, d: (a * width, b * height, c * width, d * height),
        "[y1, x1, y2, x2]": lambda a, b, c, d: (b, a, d, c),
        "[x, y, width, height]": lambda a, b, c, d: (a, b, a + c, b + d),
    }


def grounding_reward(
    completion: str, solution: str, frame: tuple[float, float] = THOUSANDTHS
) -> float:
    """(1 + GIoU) / 2 of the answer's one box, `(x1,y1),(x2,y2)` or `[x1, y1, x2, y2]`, 0 to 1.

    Swapped corners, no area, coordinates outside the frame and any other text earn 0. Raises
    ValueError for a bad solution only.
    """
    true = read_grounding(solution, frame)
    box = _one_box(find_answer(completion)[0] or "", frame)
    return (1 + giou(box, true)) / 2 if box else 0.0


def explain_grounding(
    completion: str, solution: str, frame: tuple[float, float] = THOUSANDTHS
) -> str:
    """Why a grounding answer earns less than it could, "" where nothing is wrong."""
    answer, reason = find_answer(completion)
    if answer is None:
        return reason
    numbers = _four_numbers(answer)
    if numbers is None:
        return "not one box"
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        return "corners swapped, or no area"
    if not _one_box(answer, frame):
        return f"outside the frame of {frame[0]:g} x {frame[1]:g}"
    return "GIoU below 1" if grounding_reward(completion, solution, frame) < 1 else ""


def other_grounding_readings(
    completion: str, solution: str, frame: tuple[float, float], size: tuple[int, int]
) -> dict[str, float]:
    """As `other_readings`, for `grounding_reward`."""
    true, numbers = read_grounding(solution, frame), _four_numbers(find_answer(completion)[0] or "")
    if numbers is None:
        return {}
    earned = {"as asked": grounding_reward(completion, solution, frame)}
    for name, read in list(_readings(frame, size).items())[1:]:  # there is no confidence here
        x1, y1, x2, y2 = read(*numbers)
        inside = 0 <= x1 < x2 <= frame[0] and 0 <= y1 < y2 <= frame[1]
        earned[name] = (1 + giou(Box(x1, y1, x2, y2), true)) / 2 if inside else 0.0
    return earned


def _four_numbers(text: str) -> tuple[float, ...] | None:
    found = _PAIRS.fullmatch(text.strip()) or _FOUR.fullmatch(text.strip())
    return tuple(map(float, found.groups())) if found else None


def _one_box(text: str, frame: tuple[float, float]) -> Box | None:
    numbers = _four_numbers(text)
    if numbers is None:
        return None
    x1, y1, x2, y2 = numbers
    inside = 0 <= x1 < x2 <= frame[0] and 0 <= y1 < y2 <= frame[1]
    return Box(x1, y1, x2, y2) if inside else None


# ---- solutions: the data set's own, read strictly ------------------------------------------------


def solution_kind(solution: str) -> str:
    """ "boxes", "grounding" or "class": what a data set's solution is meant for."""
    answer = find_answer(perfect(solution))[0] or ""
    if _PAIRS.fullmatch(answer):
        return "grounding"
    looks = answer.startswith(("[", "{")) or answer.casefold().rstrip(".") == "no objects"
    return "boxes" if looks else "class"


@lru_cache(maxsize=4096)  # a solution is read once per completion and term
def read_boxes(solution: str, frame: tuple[float, float] = THOUSANDTHS) -> tuple[Box, ...]:
    """The true boxes of a solution.

    Raises ValueError where it holds no list of legal boxes inside the frame: what was found and
    what to do.
    """
    found = repr(solution if len(solution) <= 80 else solution[:80] + "...")
    if solution_kind(solution) == "class":
        raise ValueError(f"{found} is a classification solution: use train_cls.py")
    answer = find_answer(perfect(solution))[0] or ""
    parsed, wide = parse_boxes(answer, frame), parse_boxes(answer, (math.inf, math.inf))
    cut = parsed.boxes and answer[0] + answer[-1] not in ("[]", "{}")
    if parsed.reason or parsed.bad or cut or answer.count("{") != len(parsed.boxes):
        raise ValueError(f"{found} is not a list of boxes with Position and Confidence")
    if parsed != wide:
        size = f"{frame[0]:g} x {frame[1]:g}"
        raise ValueError(f"{found} has coordinates outside its frame, {size} (--box_frame)")
    return parsed.boxes


@lru_cache(maxsize=4096)
def read_grounding(solution: str, frame: tuple[float, float] = THOUSANDTHS) -> Box:
    """The true box of a grounding solution. Raises ValueError where it holds none in the frame."""
    box = _one_box(find_answer(perfect(solution))[0] or "", frame)
    if box is None:
        size = f"{frame[0]:g} x {frame[1]:g}"
        raise ValueError(f"{solution[:80]!r} is not one box (x1,y1),(x2,y2) inside {size}")
    return box
