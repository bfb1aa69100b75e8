"""Hugging Face data sets with an image and a class label, or with objects and their boxes."""

from functools import partial
from pathlib import Path

from data import detection
from data.errors import UserError
from data.rows import IMAGE_COLUMNS, SplitRows
from data.wording import Wording, check_names

BOXES, CATEGORIES = ("bbox", "bboxes", "boxes"), ("category", "categories", "label", "labels")


def label_column(table) -> str | None:
    """The column with class labels, or None. Raises UserError if there are several."""
    import datasets

    labels = [n for n, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) > 1:
        raise UserError(f"several columns are class labels: {', '.join(labels)}; keep one")
    return labels[0] if labels else None


def read_labels(table, column: str, folder: Path, wording: Wording) -> SplitRows:
    """Classification: a row's solution is the name of its label.

    table: a `datasets.Dataset`; folder: what image paths are relative to. Raises UserError if two
    classes have one name.
    """
    names = [name.replace("_", " ") for name in table.features[column].names]
    check_names(names, f"{column}: the classes")
    problem = wording.class_problem(names)

    def convert(row: dict) -> dict:
        label = row[column]
        known = isinstance(label, int) and 0 <= label < len(names)
        fault = "" if known else f"{column} is {label!r}, and there are {len(names)} classes"
        solution = names[label] if known else None
        return row | {"problem": problem, "solution": solution, "fault": fault}

    rows = SplitRows(table.with_format("arrow"), folder, convert)
    rows.has_our_prompts = True
    rows.notes = [f"{len(names)} classes, {len(table)} photographs: {', '.join(names)}"]
    return rows


def has_objects(table) -> bool:
    return "objects" in table.column_names


def read_objects(table, folder: Path, wording: Wording) -> SplitRows:
    """Detection: `objects` has for each image lists of boxes and of their categories.

    The table is turned into the content of a COCO file, and read as one. Boxes are taken for
    [x, y, width, height] in pixels, as in COCO; for two corners if wording.corners says so, or if
    it is None, some box reaches out of its image, and as two corners all lie inside. Raises
    UserError if there are other columns, or a row has no boxes with their categories.
    """
    boxes, labels, names = _object_columns(table.features["objects"])
    image_column = next(name for name in IMAGE_COLUMNS if name in table.column_names)
    sizes = _sizes(table, image_column)
    images, annotations = [], []
    for i, row in enumerate(table.select_columns(["objects"]).with_format(None)):
        w, h = sizes[i]
        image = partial(_image, table, image_column, i)
        images.append({"id": i, "file_name": f"row {i}", "image": image, "width": w, "height": h})
        for box, category in _boxes_with_categories(row["objects"], boxes, labels, i):
            if names and not 0 <= category < len(names):
                raise UserError(f"row {i}: category {category}, and there are {len(names)}")
            ids = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
            annotations.append(ids | {"bbox": list(box)})
    corners = wording.corners
    if corners is None:
        placed = [(a["bbox"], sizes[a["image_id"]]) for a in annotations]
        corners = any(_reaches_out(box, size) for box, size in placed)
        corners = corners and all(_are_corners(box, size) for box, size in placed)
    for annotation in annotations:
        if corners:
            x1, y1, x2, y2 = annotation["bbox"]
            annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    numbers = sorted({a["category_id"] for a in annotations})
    categories = [{"id": n, "name": names[n] if names else str(n)} for n in numbers]
    content = {"images": images, "annotations": annotations, "categories": categories}
    rows = detection.rows_of(content, "objects", wording)
    rows.folder, rows.corners = folder, corners
    form = "two corners" if corners else "x, y, width, height"
    rows.notes.append(f"boxes are taken to be {form}, in pixels")
    return rows


def _object_columns(feature) -> tuple[str, str, list[str] | None]:
    """What `objects` calls its boxes and its categories, and the categories' names if it has them.

    Raises UserError if it has no such lists.
    """
    feature = getattr(feature, "feature", feature)
    feature = feature[0] if isinstance(feature, list) else feature
    if not isinstance(feature, dict):
        raise UserError("objects are no lists of boxes and categories")
    boxes = next((name for name in BOXES if name in feature), None)
    labels = next((name for name in CATEGORIES if name in feature), None)
    if boxes is None or labels is None:
        raise UserError(f"objects has {', '.join(feature)}; it needs bbox and category")
    category = feature[labels]
    return boxes, labels, getattr(getattr(category, "feature", category), "names", None)


def _boxes_with_categories(objects, boxes: str, labels: str, row: int) -> list[tuple]:
    """(box, category) of each object of a row; boxes and labels are the keys of the two.

    Raises UserError if a box is not four numbers, or a category is missing.
    """
    if isinstance(objects, list):
        objects = {name: [each[name] for each in objects] for name in (boxes, labels)}
    objects = objects if isinstance(objects, dict) else {}
    box_list, label_list = objects.get(boxes), objects.get(labels)
    are_lists = isinstance(box_list, list) and isinstance(label_list, list)
    if not are_lists or len(box_list) != len(label_list):
        raise UserError(f"row {row}: objects has no boxes with a category each")
    pairs = list(zip(box_list, label_list, strict=True))
    for box, category in pairs:
        four = isinstance(box, list) and len(box) == 4
        if not four or not all(isinstance(n, int | float) for n in box) or category is None:
            raise UserError(f"row {row}: objects has the box {box}, category {category}")
    return pairs


def _image(table, column: str, index: int):
    image = table.with_format("arrow")[index].to_pylist()[0][column]
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def _sizes(table, column: str) -> list[tuple[int, int]]:
    """Width and height of each image in pixels: from columns of these names, else from the images
    in `column`."""
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
        except (ValueError, TypeError):  # no size to fail at: data/check.py names the image
            return (10**6, 10**6)

    return [size(index) for index in range(len(table))]


def _reaches_out(box: list, size: tuple[int, int]) -> bool:
    """Whether a box [x, y, width, height] would reach more than a pixel out of the image."""
    return box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1


def _are_corners(box: list, size: tuple[int, int]) -> bool:
    """Whether a box [x1, y1, x2, y2] would lie inside the image, give or take a pixel."""
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= size[0] + 1 and 0 <= y1 < y2 <= size[1] + 1
