"""Looks at every row and every image before a run spends anything on them.

Faults are collected, not raised one by one, so that a user sees all that is wrong at once. What a
solution must look like is the script's to say: only the types and that something is there are
checked here.
"""

import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.images import ImageError, content_key, open_image
from data.virft import Example

MAX_LENGTH = 200  # characters of a message's part: a row may hold anything, an image as text too


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a row: its number, the file, what was found there, what to do."""

    row: int
    where: str
    found: str
    todo: str


def check_rows(examples: Iterable[Example]) -> list[Fault]:
    """The rows whose problem, solution or images are missing, empty or of a wrong type."""
    faults = []
    for example in examples:
        row, where = example.index, example.where
        for name in ("problem", "solution"):
            text = getattr(example, name)
            if text is None or (isinstance(text, str) and not text.strip()):
                found = f"{name} is {'missing' if text is None else 'empty'}"
                faults.append(Fault(row, where, found, f"give the row a {name}"))
            elif not isinstance(text, str):
                found = f"{name} is {_kind(text)}, not text"
                faults.append(Fault(row, where, found, f"write the {name} as a string"))
        if not example.images:
            faults.append(Fault(row, where, "no image", "give the row an image"))
        for place, image in enumerate(example.images):
            if not isinstance(image, bytes | Path):
                found = f"image is {_kind(image)}, not a path or the bytes of a file"
                faults.append(Fault(row, example.image_name(place), found, "correct the image"))
    return faults


def check_images(
    examples: Sequence[Example], desc: str
) -> tuple[list[list[tuple[int, int]]], list[Fault]]:
    """Decodes every image that was not found whole before, equal ones once.

    Returns the size (width, height) in pixels, upright, of each image of each row, and the faults.
    Images at fault, and those that check_rows reports, are left out of the sizes. `desc` names the
    progress bar, which is shown while there is something to decode. Sizes are remembered by
    content in a file below the user's cache folder.
    """
    known = _SizeCache()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        # Rows are read in the threads: those of arrow data come from disk, all would fill memory.
        keys = list(pool.map(lambda row: _keys(examples[row]), range(len(examples))))
        unknown: dict[str, tuple[int, int]] = {}  # the first row and place of each content
        for row, places in enumerate(keys):
            for place, key in places.items():
                if isinstance(key, str) and key not in known.sizes:
                    unknown.setdefault(key, (row, place))
        decoded = pool.map(lambda at: _size(examples[at[0]].images[at[1]]), unknown.values())
        bad: dict[str, ImageError] = {}
        bar = tqdm(decoded, desc, len(unknown), disable=not unknown, unit="image", file=sys.stderr)
        for key, size in zip(unknown, bar, strict=True):
            if isinstance(size, ImageError):
                bad[key] = size
            else:
                known.add(key, size)
    known.close()

    sizes, faults = [], []
    for row, places in enumerate(keys):
        sizes.append([known.sizes[key] for key in places.values() if key in known.sizes])
        for place, key in places.items():
            error = key if isinstance(key, ImageError) else bad.get(key)
            if error:
                where = examples[row].image_name(place)
                faults.append(Fault(row, where, error.found, error.todo))
    return sizes, faults


def refuse(faults: Sequence[Fault], dataset_name: str, split: str, limit: int = 10) -> None:
    """Raises ValueError where there are faults: the first `limit`, by row, and how many more."""
    if not faults:
        return
    ordered = sorted(faults, key=lambda fault: fault.row)
    lines = [f"{dataset_name}, split {split}: {len({f.row for f in faults})} row(s) cannot be used"]
    for fault in ordered[:limit]:
        where, found = _brief(fault.where), _brief(fault.found)
        lines.append(f"  row {fault.row}: {where}: {found}; {fault.todo}")
    if len(faults) > limit:
        lines.append(f"  and {len(faults) - limit} more")
    raise ValueError("\n".join(lines))


def _keys(example: Example) -> dict[int, str | ImageError]:
    """Of each image by its place: its content key, or why it has none."""
    keys: dict[int, str | ImageError] = {}
    for place, image in enumerate(example.images):
        if isinstance(image, bytes | Path):
            try:
                keys[place] = content_key(image)
            except ImageError as error:
                keys[place] = error
    return keys


def _size(image: bytes | Path) -> tuple[int, int] | ImageError:
    try:
        return open_image(image).size
    except ImageError as error:
        return error


def _kind(value: object) -> str:
    return f"{type(value).__name__} {_brief(repr(value))}"


def _brief(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + "..."


class _SizeCache:
    """Sizes of images found whole, by content, kept in a text file: `sha256 width height` lines.

    Only ever appended to, a line at a time, so that an interrupted check is not lost and several
    runs may share it. A line that is not whole is ignored. Where the file cannot be read or written
    the run goes on without, and says so once.
    """

    LINE = re.compile(r"([0-9a-f]{64}) ([1-9]\d{0,8}) ([1-9]\d{0,8})\n", re.ASCII)

    def __init__(self):
        self.sizes: dict[str, tuple[int, int]] = {}
        self._file = None
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            path = Path(home) / "grpo-vlm" / "checked-images-v1.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="ascii", errors="replace")  # noqa: SIM115
            self._file.seek(0)
            for line in self._file:
                if whole := self.LINE.fullmatch(line):
                    self.sizes[whole[1]] = int(whole[2]), int(whole[3])
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
            self._give_up(error)

    def add(self, key: str, size: tuple[int, int]) -> None:
        self.sizes[key] = size
        if self._file:
            try:
                self._file.write(f"{key} {size[0]} {size[1]}\n")
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _give_up(self, error: Exception) -> None:
        self._file = None
        _say_once(f"note: checked images are not remembered for the next run: {error}")


@functools.cache
def _say_once(note: str) -> None:
    print(note, file=sys.stderr)
