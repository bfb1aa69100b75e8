"""YOLO folders: photographs, and beside each or in `labels/` a text file with a line for each box,
`class x y width height`: its centre and size in shares of the image.

    images/train/1.jpg  labels/train/1.txt      train/images/1.jpg  train/labels/1.txt
    images/1.jpg        labels/1.txt            1.jpg               1.txt

The classes' names are in a YAML file (`names`), classes.txt or obj.names. A line with more corners
is a polygon, whose box is taken. Not here: rows and prompts (data/detection.py).
"""

from pathlib import Path

import yaml

from data import annotations, files
from data.detection import rows_of
from data.errors import UserError
from data.folders import folders, photographs
from data.images import size_if_known
from data.places import last_part
from data.rows import SplitRows
from data.splits import is_layout, split_of
from data.wording import Wording

NAME_FILES = ("classes.txt", "obj.names", "*.names", "_darknet.labels", "labels/classes.txt")
NAME_FILES += ("*/_darknet.labels", "*/classes.txt")
IN_IMAGES = ("images", "jpegimages")  # what is called labels/ for the text files
ENTRIES = {"train": "train", "val": "validation", "valid": "validation", "test": "test"}


def find(path: Path) -> dict[str, list[Path]]:
    """Name of a split -> its photographs; nothing if `path` is no YOLO set: a folder, or its YAML
    file."""
    path = root_of(path)
    settings, file = settings_of(path)
    if path.is_file():
        if file is None:
            return {}
        path = path.parent
    if file is None and not any(map(_is_labelled, photographs(path)[:200])):
        return {}
    splits = _named_splits(settings, file) if file else {}
    splits = splits if "train" in splits else _listed_splits(path)
    for folder in folders(path) if not splits else []:
        if split := split_of(folder.name):  # train/images, or photographs with labels beside them
            splits.setdefault(split, []).extend(photographs(folder))
        if folder.name.lower() in IN_IMAGES:
            for inner in folders(folder):
                if split := split_of(inner.name):
                    splits.setdefault(split, []).extend(photographs(inner))
    splits = splits or {"train": photographs(path)}
    return splits if any(_is_labelled(p) for those in splits.values() for p in those) else {}


def root_of(path: Path) -> Path:
    """The folder with the YAML file or the names: `path`, or one that alone is in it."""
    while path.is_dir() and settings_of(path)[1] is None and len(folders(path)) == 1:
        (inner,) = folders(path)
        if split_of(inner.name) or is_layout(inner.name) or _names_file(path):
            break
        path = inner
    return path


def settings_of(path: Path) -> tuple[dict, Path | None]:
    """What a YOLO set's YAML file says, and the file; ({}, None) if it has none."""
    listed = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    for file in listed:
        if file.suffix not in (".yaml", ".yml"):
            continue
        try:
            content = yaml.safe_load(files.read_text(file))
        except (UserError, yaml.YAMLError, RecursionError) as error:
            if file != path:  # some other tool's, beside the data
                continue
            raise UserError(f"{file}: not YAML: {str(error)[: files.SHOWN]}") from error
        if isinstance(content, dict) and "names" in content:
            return content, file
    return {}, None


def _named_splits(settings: dict, file: Path) -> dict[str, list[Path]]:
    """The photographs of each split that the YAML file names, of those that are there: a folder, a
    text file that lists them, or several of both."""
    roots = [file.parent / str(settings.get("path") or ""), file.parent]
    splits: dict[str, list[Path]] = {}
    for entry, split in ENTRIES.items():
        values = settings.get(entry) or []
        for value in values if isinstance(values, list) else [values]:
            # Roboflow writes ../train/images of a folder train/ beside the file
            texts = [str(value), str(value).removeprefix("../")]
            tried = [root / text for root in roots for text in texts]
            found = next((place for place in tried if place.exists()), None)
            if found is None:
                continue
            if found.is_file():
                lines = [line.strip() for line in files.read_text(found).splitlines()]
                inside = [found.parent / line for line in lines if line]
            else:
                inside = photographs(found)
            splits.setdefault(split, []).extend(inside)
    return {split: inside for split, inside in splits.items() if inside}


def _listed_splits(path: Path) -> dict[str, list[Path]]:
    """The photographs of each split that a text file lists, as darknet has it: train.txt, by the
    last part of each path."""
    splits: dict[str, list[Path]] = {}
    for entry, split in ENTRIES.items():
        if files.fault(path / f"{entry}.txt"):
            continue
        names = [last_part(line) for line in files.read_text(path / f"{entry}.txt").splitlines()]
        by_name = {photo.name: photo for photo in photographs(path)}
        if names and all(name in by_name for name in names if name):
            splits.setdefault(split, []).extend(by_name[name] for name in names if name)
    return splits if "train" in splits else {}


def label_file(photo: Path) -> Path:
    """The text file with a photograph's boxes: in labels/ for one in images/, with the same folders
    below, else beside it."""
    parts = list(photo.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part.lower() in IN_IMAGES]
    if places:
        parts[places[-1]] = "Labels" if parts[places[-1]] == "Images" else "labels"
        in_labels = Path(*parts).with_suffix(".txt")
        if in_labels.is_file() or not photo.with_suffix(".txt").is_file():
            return in_labels
    return photo.with_suffix(".txt")


def _is_labelled(photo: Path) -> bool:
    return _is_labels(label_file(photo))


def _is_labels(file: Path) -> bool:
    """Whether a file is text whose first line is numbers, 5 at least."""
    if files.fault(file, files.SETTINGS):
        return False
    try:
        lines = [line.split() for line in files.read_text(file).splitlines() if line.strip()]
    except UserError:
        return False
    return bool(lines) and len(lines[0]) >= 5 and all(map(_is_number, lines[0]))


def _is_number(word: str) -> bool:
    try:
        return annotations.is_number(float(word))
    except ValueError:
        return False


def read(path: Path, split: str, sources: dict[str, list[Path]], wording: Wording) -> SplitRows:
    """The rows of a split. path: the data set; sources: what `find` returned.

    Image ids are the photographs' paths below the folder with the names, category ids the classes'
    numbers, as the files have them.
    Raises UserError for a line that is no box, a class without a name, or if there is no box.
    """
    photos, path = sources[split], root_of(path)
    root = path.parent if path.is_file() else path
    names, keypoints = class_names(path)
    images, entries, wrong, without = [], [], [], 0
    for photo in photos:
        name = str(photo.relative_to(root)) if photo.is_relative_to(root) else str(photo)
        size = size_if_known(photo)
        file = label_file(photo)
        images.append({"id": name, "file_name": name, "width": size[0], "height": size[1]})
        without += not file.is_file()
        lines = files.read_text(file).splitlines() if file.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                category, box = _box(line.split(), size, keypoints)
                if not 0 <= category < len(names):
                    raise ValueError(f"class {category}, and the set names {len(names)}")
            except ValueError as error:
                wrong.append(f"{file}, line {number}: {error}")
                continue
            entry = {"id": len(entries) + 1, "image_id": name, "category_id": category}
            entries.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"{path}: {len(wrong)} bad lines\n  " + "\n  ".join(wrong[:10]) + more)
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": entries, "categories": categories}
    rows = rows_of(content, path, wording)
    rows.folder = root
    rows.notes.insert(0, f"read as YOLO: {len(photos)} photographs, boxes in shares of the image")
    if without:
        rows.notes.append(f"{without} photographs have no text file, so nothing is in them")
    known = {label_file(photo) for of_split in sources.values() for photo in of_split}
    folders_of = {label_file(photo).parent for photo in photos}
    beside = [f for folder in folders_of for f in sorted(folder.glob("*.txt"))]
    if extra := [f for f in beside if f not in known and _is_labels(f)]:
        rows.notes.append(f"{len(extra)} text files have no photograph, {extra[0].name} the first")
    return rows


def _box(words: list[str], size: tuple[int, int], keypoints: bool) -> tuple[int, list[float]]:
    """(class, [x, y, width, height] in pixels) of a line. Raises ValueError if it is none."""
    if not all(map(_is_number, words)):
        raise ValueError(f"{' '.join(words)[:80]!r} are not all numbers")
    category, *numbers = map(float, words)
    numbers = numbers[:4] if keypoints else numbers
    if category != int(category):
        raise ValueError(f"class {category} is not a whole number")
    is_polygon = len(numbers) >= 6 and len(numbers) % 2 == 0
    if len(numbers) != 4 and not is_polygon:
        raise ValueError(f"{len(numbers)} numbers after the class, where a box has 4")
    if min(numbers) < -0.01 or max(numbers) > 1.01:
        raise ValueError(f"{max(numbers, key=abs):g} is no share of the image, 0 to 1")
    if is_polygon:
        x, y, width, height = annotations.box_of_mask(numbers)
    else:
        width, height = numbers[2:]
        x, y = numbers[0] - width / 2, numbers[1] - height / 2
    return int(category), [x * size[0], y * size[1], width * size[0], height * size[1]]


def _names_file(root: Path) -> Path | None:
    return next((f for name in NAME_FILES for f in sorted(root.glob(name))), None)


def class_names(path: Path) -> tuple[list[str], bool]:
    """The classes' names by their numbers, and whether lines have keypoints after their box.

    Raises UserError if no file names them.
    """
    settings, file = settings_of(path)
    names = settings.get("names")
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        names = [names.get(number, str(number)) for number in range(max(names, default=-1) + 1)]
    root = path.parent if path.is_file() else path
    if names is None:
        listed = _names_file(root)
        if listed is None:
            raise UserError(
                f"{root}: a YOLO set without its classes' names: write classes.txt with a name on "
                f"each line, or data.yaml with names: [...]"
            )
        file, names = listed, files.read_text(listed).splitlines()
        names = [line.strip() for line in names]
        names = names[: max((i + 1 for i, name in enumerate(names) if name), default=0)]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f"{file}: names is no list of names: {str(names)[:80]!r}")
    return [str(name) for name in names], "kpt_shape" in settings
