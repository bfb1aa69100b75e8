"""Hugging Face sets with an image and a class label, or with objects and their boxes."""

from functools import partial
from pathlib import Path

from data import coco
from data.errors import UserError
from data.rows import IMAGE_COLUMNS, Rows
from data.wording import Ask, check_names

BOXES, CATEGORIES = ("bbox", "bboxes", "boxes"), ("category", "categories", "label", "labels")


def label_column(table) -> str | None:
    """The column with class labels, None if there is none.

    Raises UserError if there are several.
    """
    import datasets

    labels = [n for n, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) > 1:
        raise UserError(f"several columns are class labels: {', '.join(labels)}; keep one")
    return labels[0] if labels else None


def read_labels(table, column: str, folder: Path, ask: Ask) -> Rows:
    """Classification: a row's solution is the name of its label."""
    names = [name.replace("_", " ") for name in table.features[column].names]
    check_names(names, f"{column}: the classes")
    problem = ask.class_problem(names)

    def convert(row: dict) -> dict:
        label = row[column]
        known = isinstance(label, int) and 0 <= label < len(names)
        fault = "" if known else f"{column} is {label!r}, and there are {len(names)} classes"
        solution = names[label] if known else None
        return row | {"problem": problem, "solution": solution, "fault": fault}

    rows = Rows(table.with_format("arrow"), folder, convert)
    rows.worded = True
    rows.said = [f"{len(names)} classes, {len(table)} photographs: {', '.join(names)}"]
    return rows


def has_objects(table) -> bool:
    return "objects" in table.column_names


def read_objects(table, folder: Path, ask: Ask) -> Rows:
    """Detection: `objects` has for each image lists of boxes and of their categories.

    Boxes are [x, y, width, height] in pixels, as in COCO, unless some cannot be, and all can be two
    corners; ask.corners decides otherwise. Raises UserError if the columns are others, or a row
    has no boxes with their categories.
    """
    kind = table.features["objects"]
    kind = getattr(kind, "feature", kind)
    kind = kind[0] if isinstance(kind, list) else kind
    if not isinstance(kind, dict):
        raise UserError("objects are no lists of boxes and categories")
    boxes = next((name for name in BOXES if name in kind), None)
    label = next((name for name in CATEGORIES if name in kind), None)
    if boxes is None or label is None:
        raise UserError(f"objects has {', '.join(kind)}; it needs bbox and category")
    of = kind[label]
    known = getattr(getattr(of, "feature", of), "names", None)
    images = [name for name in IMAGE_COLUMNS if name in table.column_names]
    bare = table.select_columns(["objects"]).with_format(None)
    sizes = _sizes(table, images[0])
    entries, annotations = [], []
    for i, row in enumerate(bare):
        w, h = sizes[i]
        image = partial(_image, table, images[0], i)
        entries.append({"id": i, "file_name": f"row {i}", "image": image, "width": w, "height": h})
        for box, category in _pairs(row["objects"], boxes, label, i):
            if known and not 0 <= category < len(known):
                raise UserError(f"row {i}: category {category}, and there are {len(known)}")
            number = len(annotations) + 1
            place = {"id": number, "image_id": i, "category_id": category}
            annotations.append(place | {"bbox": list(box)})
    corners = ask.corners
    if corners is None:
        pairs = [(a["bbox"], sizes[a["image_id"]]) for a in annotations]
        corners = any(_outside(*p) for p in pairs) and all(_are_corners(*p) for p in pairs)
    if corners:
        for annotation in annotations:
            x1, y1, x2, y2 = annotation["bbox"]
            annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    for annotation in annotations:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    numbers = sorted({a["category_id"] for a in annotations})
    categories = [{"id": n, "name": known[n] if known else str(n)} for n in numbers]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    rows = coco.rows_of(content, "objects", ask)
    rows.folder, rows.corners = folder, corners
    form = "two corners" if corners else "x, y, width, height"
    rows.said.append(f"boxes are taken to be {form}, in pixels")
    return rows


def _pairs(found, boxes: str, label: str, row: int) -> list[tuple]:
    """(box, category) of each object of a row. Raises UserError if they are not that."""
    if isinstance(found, list):
        found = {name: [each[name] for each in found] for name in (boxes, label)}
    columns = [found.get(name) for name in (boxes, label)] if isinstance(found, dict) else [None]
    if any(not isinstance(column, list) for column in columns) or len(columns[0]) != len(
        columns[1]
    ):
        raise UserError(f"row {row}: objects has no boxes with a category each")
    for box, category in zip(*columns, strict=True):
        four = isinstance(box, list) and len(box) == 4
        if not four or not all(isinstance(n, int | float) for n in box) or category is None:
            raise UserError(f"row {row}: objects has the box {box}, category {category}")
    return list(zip(*columns, strict=True))


def _image(table, column: str, index: int):
    image = table.with_format("arrow")[index].to_pylist()[0][column]
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def _sizes(table, column: str) -> list[tuple[int, int]]:
    """Width and height of each image in pixels, from columns of these names or the images."""
    if {"width", "height"} <= set(table.column_names):
        sizes = list(zip(table["width"], table["height"], strict=True))
        if all(isinstance(side, int) for size in sizes for side in size):
            return sizes
    from data.images import open_image

    def size(index: int) -> tuple[int, int]:
        image = _image(table, column, index)
        image = next(iter(image), None) if isinstance(image, list) else image
        image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
        try:
            return open_image(image).size
        except (ValueError, TypeError):  # data/check.py names the image
            return (10**6, 10**6)

    return [size(index) for index in range(len(table))]


def _outside(box: list, size: tuple[int, int]) -> bool:
    """Whether [x, y, width, height] would reach a pixel or more out of the image."""
    return box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1


def _are_corners(box: list, size: tuple[int, int]) -> bool:
    """Whether [x1, y1, x2, y2] would be a box inside the image."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= size[0] + 1 and 0 <= y1 < y2 <= size[1] + 1
