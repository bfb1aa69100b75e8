"""COCO detection files: `instances_*.json` with its images beside it or above.

Not here: what tools write otherwise (data/annotations.py), rows and prompts (data/detection.py).
"""

import json
from functools import lru_cache
from pathlib import Path

from data import annotations, files
from data.detection import file_name, rows_of
from data.errors import UserError
from data.images import size_if_known
from data.places import missing, place_images
from data.rows import SplitRows
from data.splits import SPLITS, split_of, words_of
from data.wording import Wording

OTHER_KINDS = ("captions", "person_keypoints", "stuff", "panoptic")  # files of the same images
PARTS = ("images", "annotations", "categories")


def find(path: Path) -> dict[str, Path]:
    """Name of a split -> its annotation file; nothing if `path` has none.

    Raises UserError if several files hold one split, or if a file lacks annotations or categories.
    """
    if path.is_file():
        return {"train": path} if path.suffix == ".json" and is_coco(path) else {}
    found = sorted(path.glob("*.json"))
    for folder in sorted(path.iterdir()) if path.is_dir() else []:
        if folder.name == "annotations" or split_of(folder.name):
            found += sorted(folder.glob("*.json"))
    found = [file for file in found if is_coco(file)]
    if any(file.stem.startswith("instances") for file in found):
        found = [file for file in found if not file.stem.startswith(OTHER_KINDS)]
    splits: dict[str, Path] = {}
    for file in found:
        split = split_name(file) if len(found) > 1 else "train"
        if split is None or split in splits:
            other = splits.get(split) or next(f for f in found if f != file)
            raise UserError(
                f"{path}: {file.relative_to(path)} and {other.relative_to(path)} are annotation "
                f"files, and their names do not tell which split each is; call them "
                f"instances_train.json and instances_test.json, or give --dataset_name one of them"
            )
        splits[split] = file
    return splits


def split_name(file: Path) -> str | None:
    """The split that the file's name says, else its folder's name: train2017 is train."""
    for text in (file.stem, file.parent.name):
        names = [SPLITS[word] for word in words_of(text) if word in SPLITS]
        if names:
            return names[0]
    return None


def is_coco(file: Path) -> bool:
    """Whether the file is a JSON object with the parts of a COCO detection file.

    Raises UserError for one that has images, and annotations or categories alone.
    """
    try:
        content = _content(file) if begins_with(file, b"{") else None
    except (ValueError, RecursionError, OSError):  # whoever reads it next says what is wrong
        return False
    if not isinstance(content, dict):
        return False
    absent = [part for part in PARTS if not isinstance(content.get(part), list)]
    entries = content.get("images")
    are_images = isinstance(entries, list) and entries and isinstance(entries[0], dict)
    if (
        absent
        and are_images
        and "file_name" in entries[0]
        and not file.stem.startswith(OTHER_KINDS)
    ):
        raise UserError(
            f"{file}: a COCO file without {' and '.join(absent)}, so it does not say what is "
            f"where; train on the file that does, instances_train.json or the like"
        )
    if absent:
        return False
    # iNaturalist's files have images, annotations and categories, and say classes alone
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    return not entries or any("bbox" in each or "segmentation" in each for each in entries)


def begins_with(file: Path, mark: bytes) -> bool:
    """Whether the first character of a text file is `mark`, as b"{" or b"[" of JSON."""
    if files.fault(file):
        return False
    with file.open("rb") as start:
        return start.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark)


def _content(file: Path):
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # large ones take seconds, and are asked for more than once
def _parsed(file: Path, changed: int, size: int):  # read again once the file has changed
    return json.loads(files.read_text(file, files.TABLE))


def read(path: Path, split: str, sources: dict[str, Path], wording: Wording) -> SplitRows:
    """The rows of a split. path: the data set; sources: what `find` returned.

    Raises UserError as `rows_of`, or if no image is found.
    """
    file = sources[split]
    content, tried = _content(file), folders_of(file)
    names = [file_name(entry) for entry in content["images"] if isinstance(entry, dict)]
    folder, elsewhere, places = place_images(names, file, tried)
    if names and all(files.fault(elsewhere.get(name, folder / name)) for name in names[:20]):
        raise UserError(missing(names, file, tried))

    def placed(entry):
        at = elsewhere.get(file_name(entry)) if isinstance(entry, dict) else None
        return entry if at is None else entry | {"image": str(at.resolve())}

    content = content | {"images": [placed(entry) for entry in content["images"]]}

    def own_size(entry: dict) -> tuple[int, int]:
        return size_if_known(folder / (entry.get("image") or file_name(entry)))

    content, notes, corners = annotations.sound(content, own_size, wording.corners)
    rows = rows_of(content, file, wording)
    rows.folder, rows.corners = folder, corners
    rows.notes += [*places, *notes]
    return rows


def folders_of(file: Path) -> list[Path]:
    """The folders that may have the images of an annotation file: its own, one in it, or one beside
    it."""
    of_split = (file.stem.removeprefix("instances_"), split_name(file) or "")
    subfolders = ("", "images", "data", *of_split, *(f"images/{name}" for name in of_split))
    roots = (file.parent, file.parent.parent)
    return list(dict.fromkeys(root / folder for root in roots for folder in subfolders))
