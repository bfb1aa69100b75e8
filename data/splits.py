"""What the names of files and folders say: which split they are, or that they are no class.

Not here: what the folders hold (data/folders.py).
"""

import re
from collections.abc import Iterable

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
# Words that may stand beside a split in its name: training_set, train_images, test-data-2017.
BESIDE = set(["set", "split", "folder", "files", "samples", "part", "new", "all", "raw", "resized"])
# Folders that belong to a data set's layout. The singular of some (mask, photo) may be a class.
LAYOUT = set(
    ["image", "images", "img", "imgs", "jpg", "jpgs", "jpeg", "jpegs", "jpegimages", "png", "pngs", "pics", "pictures", "photos", "photographs", "annotation", "annotations", "annot", "annots", "anno", "annos", "anns", "labels", "labeltxt", "lbl", "masks", "trimaps", "bbox", "bboxes", "boundingboxes", "xml", "xmls", "csv", "json", "txt", "imagesets", "segmentation", "segmentations", "depth", "segmentationclass", "segmentationobject", "groundtruth", "gt", "devkit", "attributes", "thumbnails", "data", "dataset", "datasets", "metadata", "meta", "lists", "splits", "macosx"]
)


def words_of(name: str) -> list[str]:
    """The words of a name in small letters: "Train_Set2017" -> train, set."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", spaced.lower())
    parts = [re.fullmatch(r"(\w+?)(set|data|images|imgs)", word) for word in words]
    pairs = zip(parts, words, strict=True)
    apart = [part.groups() if part and part[1] in SPLITS else (word,) for part, word in pairs]
    return [word for group in apart for word in group]


def split_of(name: str) -> str | None:
    """ "train", "test" or "validation" if a name says nothing but that; a year or a number, and
    words such as "set" may stand beside it. None for any other name."""
    words = words_of(name)
    found = {SPLITS[word] for word in words if word in SPLITS}
    alone = all(word in SPLITS or word in BESIDE or word in LAYOUT for word in words)
    return found.pop() if len(found) == 1 and alone else None


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Name -> split, of those names that are splits: by themselves, or as they differ in nothing
    but the split's word (cars_train, cars_test)."""
    names = list(names)
    found = {name: split for name in names if (split := split_of(name))}
    by_rest: dict[tuple, list[str]] = {}
    for name in names:
        words = words_of(name)
        if name not in found and sum(word in SPLITS for word in words) == 1:
            by_rest.setdefault(tuple(w for w in words if w not in SPLITS), []).append(name)
    for alike in by_rest.values():
        words = [next(w for w in words_of(name) if w in SPLITS) for name in alike]
        if len({SPLITS[word] for word in words}) == len(alike) > 1:
            found |= {name: SPLITS[word] for name, word in zip(alike, words, strict=True)}
    return found


def is_layout(name: str) -> bool:
    """Whether a folder's name belongs to a data set's layout (images, annotations, train_masks),
    so that it is no class."""
    words = words_of(name)
    if "".join(words) in LAYOUT:  # ground_truth, image_sets
        return True
    says = any(word in LAYOUT or word in SPLITS for word in words)
    return says and all(word in LAYOUT or word in BESIDE or word in SPLITS for word in words)
