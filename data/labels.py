"""Tables with an image and a class label, or with objects and their boxes, as Hugging Face sets,
CSV files and JSON lines have them.

Not here: which column is which (data/columns.py).
"""

from collections.abc import Callable, Sequence
from functools import partial

from data import annotations
from data.columns import Roles
from data.detection import rows_of
from data.errors import UserError
from data.folders import about_classes
from data.images import size_if_known
from data.rows import IMAGE_COLUMNS, SplitRows, as_text
from data.table import Table
from data.wording import Wording, check_names

BOXES, CATEGORIES = ("bbox", "bboxes", "boxes"), ("category", "categories", "label", "labels")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_labels(
    table: Table,
    roles: Roles,
    column: str,
    wording: Wording,
    others: Callable[[], list[Table]],
) -> SplitRows:
    """Classification: a row's solution is the name of its label, with spaces for underscores.

    A label is an index of named classes (`datasets.ClassLabel`), or a text or number that is the
    name itself; then the classes are those of all splits. others: the tables of the other splits.
    Raises UserError if two classes have one name, or if
    there is one class only.
    """
    if named := table.class_labels.get(column):
        names = [name.replace("_", " ") for name in named]
    else:
        tables = [table, *(other for other in others() if column in other.columns)]
        found = {class_text(value) for each in tables for value in each.values(column)}
        names = sorted(found - {""})
    check_names(names, f"{column}: the classes")
    if not names:
        shown = str(table.first.get(column))[:80]
        raise UserError(f"the column {column} holds {shown}, which is no name of a class")
    if len(names) < 2:
        raise UserError(f"the column {column} has one class only, {names}: nothing to tell apart")
    problem, image = wording.class_problem(names), roles.image

    def convert(row: dict) -> dict:
        label = row.get(column)
        if named:
            known = isinstance(label, int) and 0 <= label < len(names)
            fault = "" if known else f"{column} is {label!r}, and there are {len(names)} classes"
            solution = names[label] if known else None
        else:
            solution = class_text(label)
            fault = "" if solution else f"{column} is {str(label)[:80]!r}, no name of a class"
        images = {} if image in IMAGE_COLUMNS else {"image": row.get(image)}
        return row | images | {"problem": problem, "solution": solution, "fault": fault}

    rows = SplitRows(table.stored, table.folder, convert)
    rows.has_our_prompts = True
    rows.notes = [f"{len(names)} classes, {len(table)} photographs: {', '.join(names)}"]
    rows.notes += [*roles.notes, *about_classes(names)]
    return rows


def class_text(value) -> str:
    """The name of the class that a label's text or number is; "" for anything else."""
    text = as_text(value) if isinstance(value, str | int | float) else ""
    return text.replace("_", " ").strip() if isinstance(text, str) else ""


def read_objects(table: Table, image_column: str, wording: Wording) -> SplitRows:
    """Detection: `objects` has for each image lists of boxes and of their categories.

    The table is turned into the content of a COCO file, and read as one. Boxes are taken for
    [x, y, width, height] in pixels, as in COCO; for two corners if wording.corners says so, or if
    it is None, some box reaches out of its image, and as two corners all lie inside. Raises
    UserError if there are other columns, or a row has no boxes with their categories.
    """
    boxes, labels = _object_keys(table)
    names = table.category_names(labels)
    annotated, all_objects = [], table.values("objects")
    for i, objects in enumerate(all_objects):
        for box, category in _boxes_with_categories(objects, boxes, labels, i):
            if names and not 0 <= category < len(names):
                raise UserError(f"row {i}: category {category}, and there are {len(names)}")
            annotated.append((i, list(box), category))
    sizes = _sizes(table, image_column)
    corners = wording.corners
    if corners is None:
        placed = [(box, sizes[i]) for i, box, _ in annotated]
        _, corners = annotations.guess_corners(placed, share=0.0)
    images = [_entry(table, image_column, i, sizes[i]) for i in range(len(table))]
    content = _content(images, annotated, corners, names)
    rows = rows_of(content, "objects", wording)
    rows.corners = corners
    form = "two corners" if corners else "x, y, width, height"
    rows.notes.append(f"boxes are taken to be {form}, in pixels")
    return rows


def has_corners(columns: Sequence[str]) -> bool:
    """Whether a table has a box in each row, in columns xmin, ymin, xmax and ymax."""
    return set(CORNERS) <= {str(column).lower() for column in columns}


def read_corners(table: Table, image_column: str, wording: Wording) -> SplitRows:
    """Detection: each row is one box of an image, as TensorFlow's CSV files have it, with the
    corners in columns xmin, ymin, xmax, ymax in pixels and the category in `class` or `label`.

    Raises UserError if there is no such column, or a corner is no number.
    """
    lower = {str(column).lower(): column for column in table.columns}
    category = next((lower[n] for n in ("class", *CATEGORIES, "name") if n in lower), None)
    if category is None:
        raise UserError(f"it has boxes, and no column class that says of what; {table.columns}")
    numbers, annotated = {}, []  # an image's name -> its number
    for i in range(len(table)):
        row = table.row(i)
        image = numbers.setdefault(row[image_column], len(numbers))
        box = [annotations.number(row[lower[name]]) for name in CORNERS]
        if not annotations.is_box(box) or not class_text(row[category]):
            values = [row[lower[name]] for name in CORNERS]
            raise UserError(f"row {i}: the corners {values} of {row[category]!r} are no box")
        annotated.append((image, box, class_text(row[category])))
    images = [
        {"id": i, "file_name": str(name), "width": size[0], "height": size[1]}
        for name, i in numbers.items()
        for size in [_size(name, table)]
    ]
    rows = rows_of(_content(images, annotated, True, None), "the table", wording)
    rows.notes.append("boxes are two corners, in pixels")
    return rows


def _content(images: list[dict], annotated: list[tuple], corners: bool, names) -> dict:
    """The content of a COCO file. annotated: (image's number, box, category) of each box; a
    category is an index of `names`, or text or a number that is the name."""
    found = sorted({category for _, _, category in annotated}, key=lambda c: (str(type(c)), c))
    ids = {c: c if isinstance(c, int) else n for n, c in enumerate(found, 1)}
    entries = []
    for image, box, category in annotated:
        box = annotations.without_corners(box) if corners else box
        entry = {"id": len(entries) + 1, "image_id": image, "category_id": ids[category]}
        entries.append(entry | {"bbox": box, "area": box[2] * box[3]})
    categories = [{"id": ids[c], "name": names[c] if names else str(c)} for c in found]
    return {"images": images, "annotations": entries, "categories": categories}


def _object_keys(table: Table) -> tuple[str, str]:
    """What `objects` calls its boxes and its categories. Raises UserError if it has no such
    lists."""
    for objects in table.values("objects"):
        keys = objects if isinstance(objects, dict) else {}
        if isinstance(objects, list) and objects and isinstance(objects[0], dict):
            keys = objects[0]
        if keys:
            boxes = next((name for name in BOXES if name in keys), None)
            labels = next((name for name in CATEGORIES if name in keys), None)
            if boxes is None or labels is None:
                raise UserError(f"objects has {', '.join(keys)}; it needs bbox and category")
            return boxes, labels
    raise UserError("objects are no lists of boxes and categories")


def _boxes_with_categories(objects, boxes: str, labels: str, row: int) -> list[tuple]:
    """(box, category) of each object of a row; boxes and labels are the keys of the two.

    Raises UserError if a box is not four numbers, or a category is missing.
    """
    if isinstance(objects, list) and all(isinstance(each, dict) for each in objects):
        objects = {name: [each.get(name) for each in objects] for name in (boxes, labels)}
    objects = objects if isinstance(objects, dict) else {}
    box_list, label_list = objects.get(boxes), objects.get(labels)
    are_lists = isinstance(box_list, list) and isinstance(label_list, list)
    if not are_lists or len(box_list) != len(label_list):
        raise UserError(f"row {row}: objects has no boxes with a category each")
    pairs = list(zip(box_list, label_list, strict=True))
    for box, category in pairs:
        if not annotations.is_box(box) or not isinstance(category, int | str):
            raise UserError(f"row {row}: objects has the box {box}, category {category}")
    return pairs


def _entry(table: Table, column: str, index: int, size: tuple) -> dict:
    """A row's image as an entry of a COCO file; it is read when it is needed."""
    image = partial(_image, table, column, index)
    return {
        "id": index,
        "file_name": f"row {index}",
        "image": image,
        "width": size[0],
        "height": size[1],
    }


def _image(table: Table, column: str, index: int):
    image = table.row(index)[column]
    return image[0] if isinstance(image, list) and len(image) == 1 else image


def _sizes(table: Table, column: str) -> list[tuple[int, int]]:
    """Width and height of each image in pixels: from columns of these names, else from the images
    in `column`."""
    if {"width", "height"} <= set(table.columns):
        sizes = list(zip(table.values("width"), table.values("height"), strict=True))
        if all(isinstance(side, int) for size in sizes for side in size):
            return sizes
    return [_size(_image(table, column, index), table) for index in range(len(table))]


def _size(image, table: Table) -> tuple[int, int]:
    """Width and height in pixels of an image as a table holds it: a path, bytes or a dict."""
    image = next(iter(image), None) if isinstance(image, list) else image
    image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    return size_if_known(table.image_file(image) if isinstance(image, str) else image)
