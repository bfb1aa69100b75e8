"""COCO detection files: `instances_*.json` with its images beside it or above.

Not here: rows and prompts (data/detection.py); segmentations and keypoints.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from data.detection import file_name, rows_of
from data.errors import UserError
from data.folders import SPLITS
from data.rows import SplitRows
from data.wording import Wording

OTHER_KINDS = ("captions", "person_keypoints", "stuff", "panoptic")  # files of the same images
PARTS = ("images", "annotations", "categories")


def find(path: Path) -> dict[str, Path]:
    """Name of a split -> its annotation file; nothing if `path` has none.

    Raises UserError if several files hold one split.
    """
    if path.is_file():
        return {"train": path} if path.suffix == ".json" and is_coco(path) else {}
    files = sorted(path.glob("*.json"))
    for folder in sorted(path.iterdir()) if path.is_dir() else []:
        if folder.name == "annotations" or folder.name.lower() in SPLITS:
            files += sorted(folder.glob("*.json"))
    files = [file for file in files if is_coco(file)]
    if any(file.stem.startswith("instances") for file in files):
        files = [file for file in files if not file.stem.startswith(OTHER_KINDS)]
    splits: dict[str, Path] = {}
    for file in files:
        split = split_name(file) if len(files) > 1 else "train"
        if split is None or split in splits:
            other = splits.get(split) or next(f for f in files if f != file)
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
        words = re.findall(r"[a-z]+", text.lower())
        names = [SPLITS[word] for word in words if word in SPLITS]
        if names:
            return names[0]
    return None


def is_coco(file: Path) -> bool:
    """Whether the file is a JSON object with the parts of a COCO detection file."""
    try:
        content = _content(file) if begins_with(file, b"{") else None
    except (ValueError, RecursionError, OSError):  # whoever reads it next says what is wrong
        return False
    return content is not None and all(isinstance(content.get(part), list) for part in PARTS)


def begins_with(file: Path, mark: bytes) -> bool:
    """Whether the first character of a text file is `mark`, as b"{" or b"[" of JSON."""
    if not file.is_file():
        return False
    with file.open("rb") as start:
        return start.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(mark)


def _content(file: Path) -> dict:
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # large ones take seconds, and are asked for more than once
def _parsed(file: Path, changed: int, size: int) -> dict:  # read again once the file has changed
    return json.loads(file.read_text(encoding="utf-8-sig"))


def read(file: Path, wording: Wording) -> SplitRows:
    """The rows of an annotation file. Raises UserError as `rows_of`, or if no image is found."""
    content = _content(file)
    rows = rows_of(content, file, wording)
    rows.folder = image_folder(content, file)
    return rows


def image_folder(content: dict, file: Path) -> Path:
    """The folder that has most of the first 20 images: the file's own, one in it, or one beside it.

    Raises UserError naming the folders that were tried.
    """
    names = [file_name(entry) for entry in content["images"][:20]]
    of_split = (file.stem.removeprefix("instances_"), split_name(file) or "")
    subfolders = ("", "images", "data", *of_split, *(f"images/{name}" for name in of_split))
    roots = (file.parent, file.parent.parent)
    tried = list(dict.fromkeys(root / folder for root in roots for folder in subfolders))
    counts = [sum((folder / name).is_file() for name in names) for folder in tried]
    if not any(counts):
        listed = ", ".join(map(str, tried))
        raise UserError(f"{file}: its first image, {names[0]!r}, is in none of {listed}")
    return tried[counts.index(max(counts))]
