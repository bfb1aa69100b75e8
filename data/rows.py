"""The rows of a data set, whatever form it has: images, a problem, a solution.

tables.py, chat.py, labels.py, folders.py and coco.py each read one form and return `SplitRows`.
data/load.py tells the forms apart; data/check.py checks every row. Not here: what a solution means
(rewards/).
"""

import base64
import binascii
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from data.errors import ImageFault, UserError
from data.images import content_key, open_image, read_bytes

IMAGE_COLUMNS = ("image", "images", "image_path", "image_paths")
PLACEHOLDER = "<image>"  # in a problem: where an image stands; without one, images come first
PAUSES = (0.5, 2.0)  # seconds before the second and the third try to read an image again
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
class Row:
    """Row `index` of a split: images as file paths or encoded bytes, and the two texts as found.

    data/check.py checks that they are images and texts at all. fault: why no row could be made of
    what the file holds, "" if one could. coco: of a row from a COCO file, what belongs to it there:
    image_id, category_id, category (its name), annotations (COCO's own dicts, bbox in pixels), and
    size (width, height in pixels, as the file says). declared: the row's columns width and height,
    None if it has none. found: the solution as found, where it was read as another text. dataset:
    the short name of its data set, "" where there is only one.
    """

    index: int
    images: tuple
    problem: str
    solution: str
    fault: str = ""
    coco: dict | None = field(default=None, compare=False)
    declared: tuple | None = field(default=None, compare=False)
    found: str = field(default="", compare=False)
    dataset: str = field(default="", compare=False)

    @property
    def called(self) -> str:
        """row 3, or row 3 of flowers, for messages."""
        return f"row {self.index}{f' of {self.dataset}' * bool(self.dataset)}"

    @property
    def where(self) -> str:
        """The image file, for messages."""
        paths = [str(image) for image in self.images if isinstance(image, Path)]
        text = ", ".join(paths) or "image stored in the data set"
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """A content hash per image, equal for equal images. Raises ImageFault for one that cannot
        be read."""
        try:
            return tuple(content_key(image) for image in self.images)
        except UserError as error:
            raise ImageFault(f"{self.called} ({self.where}): {error}") from error

    def prompt(self, processor):
        """The row as a prompt for the model (models/processor.py). Raises ImageFault as
        `opened`."""
        keys, images = zip(*self.opened(self.images), strict=True) if self.images else ((), ())
        return processor.encode(self.problem, list(images), keys)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the first image in pixels, upright. Raises ImageFault as `opened`."""
        return self.opened(self.images[:1])[0][1].size

    def opened(self, images: tuple) -> list[tuple[str, Image.Image]]:
        """The content hash of each of these images, and the image.

        For a row that data/check.py has found good: there are three tries, as a network file system
        may not answer for a moment. Raises ImageFault that names the row and the file.
        """
        for pause in (*PAUSES, None):
            try:
                contents = [read_bytes(image) for image in images]
                return [(content_key(data), open_image(data)) for data in contents]
            except UserError as error:
                if pause is None:
                    raise ImageFault(
                        f"{self.called} ({self.where}): an image that could be read when the "
                        f"run began cannot be read now: {error}; put the file back as it was"
                    ) from error
            time.sleep(pause)


class SplitRows(Sequence):
    """The rows of a split, read lazily from a list of dicts or a `datasets.Dataset`.

    folder: what image paths are relative to. convert: turns a dict with other columns into one with
    those of the ViRFT schema.

    Set by whoever reads the form: notes, lines for the plan on what was decided while reading;
    has_our_prompts, whether the problems were worded here (data/wording.py) and not by the data
    set; asked_frame, the frame of boxes that such problems ask for (their solutions count pixels),
    None of other rows; stated_frame, the frame that the form's solutions count
    in, None if it does not say; corners, whether boxes were read as two corners; places, the files
    of images that are not where their names say (data/places.py).
    Set by data/load.py: name, the data set and the split, for messages; source, the data set as
    --dataset_name has it; wording, as `load` got it; unused, why a flag has no effect on it, by
    the flag.
    Set by data/check.py: sizes, (width, height) in pixels of each row's images; faults;
    image_keys, the content hashes of all images; solutions, by row those that were in another
    notation, in our own form; dataset, its short name where there are several data sets.
    """

    def __init__(self, rows, folder: Path, convert: Callable[[dict], dict] | None = None):
        self.rows, self.folder, self.convert = rows, folder, convert
        self.name, self.source, self.dataset, self.wording = "", "", "", None
        self.unused: dict[str, str] = {}
        self.notes, self.has_our_prompts, self.asked_frame, self.corners = [], False, None, None
        self.places: dict[str, Path] = {}
        self.stated_frame: str | None = None
        self.sizes: list[list[tuple[int, int]]] = []
        self.faults: list[Fault] = []
        self.solutions: dict[int, str] = {}
        self.image_keys: set[str] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        row = self.rows[index]
        if not isinstance(row, dict):  # a row of an arrow table
            row = row.to_pylist()[0]
        size = row.get("width"), row.get("height")
        declared = size if all(isinstance(side, int | float) for side in size) else None
        row = self.convert(row) if self.convert else row
        images = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), ())
        images = images if isinstance(images, list | tuple) else (images,)
        images = tuple(self._image(image) for image in images)
        solution = as_text(row.get("solution"))
        if isinstance(solution, str) and (thought := THOUGHT.match(solution)):
            solution = solution[thought.end() :]
        problem, fault, coco = row.get("problem"), row.get("fault", ""), row.get("coco")
        found, solution = solution, self.solutions.get(index, solution)
        return Row(
            index, images, problem, solution, fault, coco, declared, found, dataset=self.dataset
        )

    @property
    def parts(self) -> list["SplitRows"]:
        """The rows of each data set: these alone."""
        return [self]

    def first(self, count: int | None) -> list[Row]:
        """The first `count` rows; None or 0: all of them."""
        return [self[index] for index in range(min(len(self), count or len(self)))]

    @property
    def sound(self) -> list[Row]:
        """The rows without a fault."""
        bad = {fault.row for fault in self.faults}
        return [self[index] for index in range(len(self)) if index not in bad]

    def pick(self, indices: Sequence[int]) -> "SplitRows":
        """Some of the rows as rows of their own, numbered from 0, before any is checked."""
        picked = self.rows.select(indices) if hasattr(self.rows, "select") else None
        rows = SplitRows(picked or [self.rows[i] for i in indices], self.folder, self.convert)
        kept = ("name", "source", "unused", "wording", "places")
        for name in (*kept, "has_our_prompts", "asked_frame", "stated_frame"):
            setattr(rows, name, getattr(self, name))
        return rows

    def _image(self, image):
        """A path or bytes if it is one; anything else as it is, for data/check.py to report."""
        image = image() if callable(image) else image
        if isinstance(image, dict) and ("bytes" in image or "path" in image):
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, str):
            return image
        if image in self.places:
            return self.places[image]
        if image.startswith("data:"):
            return _decoded(image)
        if re.match(r"\w+://", image):
            return self.folder / image[7:] if image.startswith("file://") else image
        return self.folder / image


def as_text(value):
    """A solution that is a number, true or false, a list or an object, as JSON; 3.0 as 3.

    Anything else is returned as it is: None, NaN and the like are no answers.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if is_number or isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def _decoded(uri: str) -> bytes | str:
    """What a data: URI holds (RFC 2397, base64), or the text itself if it holds nothing."""
    head, _, body = uri.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else uri
    except binascii.Error:
        return uri


def fingerprint(rows: Sequence[Row]) -> str:
    """The same hexadecimal number for the same problems, solutions and images in the same order."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(repr((row.problem, row.solution, row.image_keys)).encode())
    return digest.hexdigest()
