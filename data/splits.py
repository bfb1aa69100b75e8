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
# Words that may stand beside a split in its name: training_set, raw_images, test-part-2.
BESIDE = re.compile(
    r"set|split|folder|files|samples|part|new|all|mini|subset|raw|resized|original|augmented|zip"
)
# Folders that belong to a data set's layout. The singular of some (mask, photo) may be a class.
LAYOUT = re.compile(
    r"images?|imgs?|jpe?gs?|jpegimages|pngs?|pics|pictures|photos|photographs|thumbnails|data|"
    r"annotations?|annots?|annos?|anns|labels|labeltxt|lbl|masks|trimaps|segmentations?|depth|"
    r"segmentation(class|object)|groundtruth|gt|bbox(es)?|boundingboxes|xmls?|csv|json|txt|lists|"
    r"imagesets|splits|datasets?|devkit|attributes|meta(data)?|(un)?labell?ed"
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
    return found.pop() if len(found) == 1 and all(map(_says_nothing, words)) else None


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
    if LAYOUT.fullmatch("".join(words)):  # ground_truth, image_sets
        return True
    says = any(word in SPLITS or LAYOUT.fullmatch(word) for word in words)
    return says and all(map(_says_nothing, words))


def says_nothing(name: str) -> bool:
    """Whether a name has words, and none that a class could have."""
    words = words_of(name)
    return bool(words) and all(map(_says_nothing, words))


def _says_nothing(word: str) -> bool:
    """Whether a word is no class's."""
    return bool(word in SPLITS or BESIDE.fullmatch(word) or LAYOUT.fullmatch(word))
