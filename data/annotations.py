"""Annotations as tools write them -> sound ones: ids, sizes, crowds, boxes of polygons, corners.

Nothing is dropped here; what cannot be mended stays, for data/detection.py to refuse. Not here:
what rows are made of them (data/detection.py).
"""

import math
from collections.abc import Callable, Sequence

NO = ("0", "false", "no", "")
YES = ("1", "true", "yes")


def sound(
    content: dict, size_of: Callable[[dict], tuple[int, int]], corners: bool | None = None
) -> tuple[dict, list[str], bool]:
    """A copy of the content of a COCO file in which 1.0 is 1, an image without a size has its own,
    a box that is missing is that of its segmentation, `iscrowd` is 0 or 1, and boxes are
    x, y, width, height.

    size_of: width and height in pixels of an entry's image. corners: whether boxes are two
    corners; None guesses: if most would reach out of their image, and as corners all lie inside it.
    Returns the copy, lines for the plan, and whether boxes were read as corners.
    """
    images = [_sound_image(entry, size_of) for entry in content["images"]]
    categories = [_with_ids(entry, ("id",)) for entry in content["categories"]]
    sizes = {
        e["id"]: (e["width"], e["height"]) for e in images if isinstance(e, dict) and _hashable(e)
    }
    annotations, from_masks = [], 0
    for entry in content["annotations"]:
        entry = _with_ids(entry, ("id", "image_id", "category_id"))
        if isinstance(entry, dict):
            entry = entry | {"iscrowd": crowd(entry.get("iscrowd"))}
            if _has_no_area(entry.get("bbox")) and entry.get("segmentation"):
                box = box_of_mask(entry["segmentation"])
                entry, from_masks = entry | {"bbox": box}, from_masks + (box is not None)
        annotations.append(entry)
    notes = [f"{from_masks} boxes are those of their segmentations"] if from_masks else []
    boxes = [
        (a["bbox"], sizes[a["image_id"]])
        for a in annotations
        if isinstance(a, dict) and is_box(a.get("bbox")) and _is_of(a, sizes)
    ]
    if corners is None:
        out, corners = guess_corners(boxes, share=0.5)
        if corners:
            notes.append(
                f"boxes are read as two corners, x1, y1, x2, y2: as x, y, width, height, which "
                f"COCO has, {out} of {len(boxes)} would reach out of their image"
            )
    if corners:
        annotations = [
            a | {"bbox": without_corners(a["bbox"])} if is_box(a.get("bbox")) else a
            for a in annotations
        ]
    return {"images": images, "annotations": annotations, "categories": categories}, notes, corners


def _sound_image(entry, size_of: Callable) -> dict:
    """An image entry with a whole id, and width and height in pixels; other text stays text."""
    entry = _with_ids(entry, ("id",))
    if not isinstance(entry, dict):
        return entry
    size = side(entry.get("width")), side(entry.get("height"))
    if not all(size):
        size = size_of(entry)
    return entry | {"width": size[0], "height": size[1]}


def _with_ids(entry, names: Sequence[str]):
    """The entry with 1 for an id of 1.0."""
    if not isinstance(entry, dict):
        return entry
    whole = {n: int(v) for n in names if isinstance(v := entry.get(n), float) and v.is_integer()}
    return entry | whole


def _has_no_area(box) -> bool:
    """Whether there is no box, or one that some tools write for it: zeros."""
    return not box or (is_box(box) and not (box[2] and box[3]))


def _is_of(annotation: dict, images: dict) -> bool:
    number = annotation.get("image_id")
    return isinstance(number, int | str) and number in images


def _hashable(entry: dict) -> bool:
    return isinstance(entry.get("id"), int | str)


def side(value):
    """A width or height in pixels; 0 if it is missing, and text if it is no number."""
    value = number(value)
    if isinstance(value, str):
        return value if value.strip() else 0
    return value if is_number(value) and value > 0 else 0


def number(value):
    """A number that may be written as text; anything else as it is."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if is_number(value) and value == int(value) else value


def crowd(value) -> int | str:
    """0 or 1 of an annotation's `iscrowd`; anything else as its text, which is refused."""
    text = str(value).strip().lower()
    if value is None or text in NO:
        return 0
    if text in YES or (is_number(value) and value in (0, 1)):
        return int(text in YES or bool(value))
    return str(value)[:80]


def box_of_mask(segmentation) -> list[float] | None:
    """The box [x, y, width, height] of a segmentation: polygons, or pycocotools' run-length code
    (`counts` as text or as a list). None if it is neither."""
    if isinstance(segmentation, dict):
        from pycocotools import mask

        try:
            rle = segmentation
            if isinstance(rle["counts"], list):
                rle = mask.frPyObjects(rle, *rle["size"])
            box = mask.toBbox(rle).tolist()
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return box if box[2] > 0 and box[3] > 0 else None
    if not isinstance(segmentation, list | tuple):
        return None
    parts = (
        segmentation if all(isinstance(p, list | tuple) for p in segmentation) else [segmentation]
    )
    points = [n for part in parts for n in flat(part)]
    if len(points) < 6 or len(points) % 2 or not all(map(is_number, points)):
        return None
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def flat(part) -> list:
    """The numbers of a polygon, whether they are x, y, x, y or [x, y], [x, y]."""
    return [n for each in part for n in (each if isinstance(each, list | tuple) else [each])]


def guess_corners(placed: Sequence[tuple], share: float) -> tuple[int, bool]:
    """How many boxes [x, y, width, height] would reach out of their image, and whether they are two
    corners: if these are more than a share of all, and as corners all lie inside.

    placed: (box, (width, height) of its image) of each.
    """
    out = sum(reaches_out(box, size) for box, size in placed)
    return out, out > share * len(placed) and all(are_corners(box, size) for box, size in placed)


def reaches_out(box: Sequence, size: tuple) -> bool:
    """Whether a box [x, y, width, height] would reach more than a pixel out of the image."""
    if not all(map(is_number, size)):
        return False
    return box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1


def are_corners(box: Sequence, size: tuple) -> bool:
    """Whether a box [x1, y1, x2, y2] would lie inside the image, give or take a pixel."""
    if not all(map(is_number, size)):
        return False
    x1, y1, x2, y2 = box
    return -1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1


def without_corners(box: Sequence) -> list:
    """[x1, y1, x2, y2] as [x, y, width, height]."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def is_box(box) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_number, box))


def is_number(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
