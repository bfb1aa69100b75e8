"""Where the images of a file are: labelling tools write paths of their own machine.

Not here: whether a file is an image (data/check.py).
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from data import files
from data.splits import is_layout

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
MOST = 500_000  # files that are looked through


def place_images(
    names: Iterable[str], file: Path, folders: Sequence[Path]
) -> tuple[Path, dict[str, Path], list[str]]:
    """The folder that the names are relative to, the files of names that are elsewhere, and a note
    for the plan if there are any.

    names: as `file` has them. folders: where they may be relative to; the one that has most of the
    first 20 is taken. If others are missing, and the last part of each (percent-decoded, parted by
    slashes or backslashes, in another case if need be) is exactly one file below, that one is it.
    What is not found stays as it is, for `missing` or data/check.py to report.
    """
    names = list(dict.fromkeys(names))
    counts = [sum(_is_there(folder, name) for name in names[:20]) for folder in folders]
    folder = folders[counts.index(max(counts))]
    elsewhere = [name for name in names if not _is_there(folder, name)]
    if not elsewhere:
        return folder, {}, []
    turned = {name: folder / name.replace("\\", "/") for name in elsewhere}
    found = {name: path for name, path in turned.items() if files.fault(path) == ""}
    others = [name for name in elsewhere if name not in found]
    if not others:
        return folder, found, []
    by_name, below = _files_below(root_of(file)), {}
    for name in others:
        last = last_part(name)
        alike = by_name.get(_as_one(last), [])
        candidates = [path for path in alike if path.name == last] or alike
        if len(candidates) != 1:
            return folder, found, []
        below[name] = candidates[0]
    name, path = next(iter(below.items()))
    note = f"{len(below)} images are found by the last part of their names below {root_of(file)}: "
    return folder, found | below, [f"{note}{name!r} is {path.relative_to(root_of(file))}"]


def missing(names: Sequence[str], file: Path, folders: Sequence[Path]) -> str:
    """The message for a file none of whose images is found: where they were looked for, what to do.

    names, file, folders: as `place_images` took them.
    """
    below = _files_below(root_of(file)).get(_as_one(last_part(names[0])), [])
    text = (
        f"{file}: its first image, {names[0][:200]!r}, is in none of {', '.join(map(str, folders))}"
    )
    if len(below) > 1:
        listed = ", ".join(str(path.relative_to(root_of(file))) for path in below[:3])
        return f"{text}; {len(below)} files below have its name ({listed}): write which one it is"
    if packed := [p for p in sorted(file.parent.iterdir()) if p.suffix.lower() in ARCHIVES]:
        return f"{text}. If they are in {packed[0].name}, unpack it"
    name = f"{file.parent.name}/{Path(last_part(names[0])).name}"
    return f"{text}. Put the images beside the file ({name}), or write paths that lead there"


def root_of(file: Path) -> Path:
    """The folder of the data set that a file belongs to: the file's own, or the one above if the
    file lies in annotations/ or the like."""
    folder = file.absolute().parent
    return folder.parent if is_layout(folder.name) else folder


def last_part(name: str) -> str:
    """What a path ends with, whatever machine wrote it."""
    return unquote(name.replace("\\", "/")).replace("\\", "/").rstrip("/").split("/")[-1]


def _as_one(name: str) -> str:
    """Equal for names that differ in capitals, or in how a letter with an accent is coded."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_there(folder: Path, name: str) -> bool:
    return files.fault(folder / name) == ""


def _files_below(root: Path) -> dict[str, list[Path]]:
    """Name as by `_as_one` -> the files below `root` that have it; hidden folders are left out."""
    by_name: dict[str, list[Path]] = {}
    count = 0
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in names:
            by_name.setdefault(_as_one(name), []).append(Path(folder, name))
        count += len(names)
        if count > MOST:
            return {}
    return by_name
