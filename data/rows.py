"""Rows of a data set, whatever form it has: images, a problem, a solution.

A form (data/virft.py and its neighbours) makes `Rows`; data/load.py tells the forms apart, and
data/check.py looks at every row.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.images import content_key, open_image

IMAGE_COLUMNS = ("image", "images", "image_path", "image_paths")
PLACEHOLDER = "<image>"  # in a problem: where an image stands; without one, images come first
SHOWN = 120  # characters of a path in a message
# What a solution may have in front of its answer, as sets made for distillation do.
THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: its number, the file, what was found, what to do."""

    row: int
    where: str
    found: str
    todo: str


@dataclass(frozen=True)
class Example:
    """Row `index` of a split: images as file paths or encoded bytes, and the two texts as found.

    Whether they are texts and images at all is for data/check.py to say. fault: why the form cannot
    make an example of the row, "" if it can. place: of a COCO row, where it is in the annotation
    file: image_id, category_id, category, annotations.
    """

    index: int
    images: tuple
    problem: str
    solution: str
    fault: str = ""
    place: dict | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """The image file, for messages."""
        paths = [str(image) for image in self.images if isinstance(image, Path)]
        text = ", ".join(paths) or "image stored in the data set"
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A content hash per image, equal for equal images."""
        return tuple(content_key(image) for image in self.images)

    def prompt(self, processor):
        """The row as a prompt for the model (models/processor.py). Raises as `open_image`."""
        images = [open_image(image) for image in self.images]
        return processor.encode(self.problem, images, self.keys)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the first image in pixels, upright. Raises as `open_image`."""
        return open_image(self.images[0]).size


class Rows(Sequence):
    """Rows read lazily from a list of dicts or a `datasets.Dataset`; `folder` roots image paths.

    convert: makes a dict with the columns of the ViRFT schema of a row that has others. name: the
    data set and the split, for messages. said: what the plan prints of a form that leaves things
    open. worded: whether the prompts are ours (data/wording.py). asks_in: the frame of boxes that such
    prompts ask for, while the solutions count pixels; None of other rows. sizes: of each row's
    images, and faults: what was found, once checked. ask: as `load` was given it.
    """

    def __init__(self, rows, folder: Path, convert: Callable[[dict], dict] | None = None):
        self.rows, self.folder, self.convert = rows, folder, convert
        self.name, self.said, self.worded, self.asks_in = "", [], False, None
        self.sizes: list[list[tuple[int, int]]] = []
        self.faults: list[Fault] = []
        self.content: set[str] = set()  # keys of all images, once checked
        self.ask, self.corners = None, None  # corners: how boxes of `objects` were read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        row = self.rows[index]
        if not isinstance(row, dict):  # a row of an arrow table
            row = row.to_pylist()[0]
        row = self.convert(row) if self.convert else row
        images = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), ())
        images = images if isinstance(images, list | tuple) else (images,)
        images = tuple(self._image(image) for image in images)
        solution = row.get("solution")
        if isinstance(solution, list) and all(isinstance(n, int | float) for n in solution):
            solution = str(solution)  # a box, as some sets for grounding have it
        if isinstance(solution, str) and (thought := THOUGHT.match(solution)):
            solution = solution[thought.end() :]
        known = row.get("fault", ""), row.get("place")
        return Example(index, images, row.get("problem"), solution, *known)

    def first(self, count: int | None) -> list[Example]:
        """The first `count` rows; all without."""
        return [self[index] for index in range(min(len(self), count or len(self)))]

    @property
    def sound(self) -> list[Example]:
        """The rows without a fault."""
        bad = {fault.row for fault in self.faults}
        return [self[index] for index in range(len(self)) if index not in bad]

    def pick(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows as rows of their own, numbered from 0, before any is checked."""
        some = self.rows.select(indices) if hasattr(self.rows, "select") else None
        picked = Rows(some or [self.rows[i] for i in indices], self.folder, self.convert)
        for name in ("name", "worded", "asks_in", "ask"):
            setattr(picked, name, getattr(self, name))
        return picked

    def _image(self, image):
        """A path or bytes if it is one; anything else as it is, for data/check.py to report."""
        image = image() if callable(image) else image
        if isinstance(image, dict) and ("bytes" in image or "path" in image):
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, str):
            return image
        if image.startswith("data:"):
            return _decoded(image)
        if re.match(r"\w+://", image):
            return self.folder / image[7:] if image.startswith("file://") else image
        return self.folder / image


def _decoded(uri: str) -> bytes | str:
    """What a data: URI holds (RFC 2397, base64), or the text itself if it holds nothing."""
    head, _, body = uri.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else uri
    except binascii.Error:
        return uri


def fingerprint(examples: Sequence[Example]) -> str:
    """The same hexadecimal number for the same problems, solutions and images in the same order."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(repr((example.problem, example.solution, example.keys)).encode())
    return digest.hexdigest()
