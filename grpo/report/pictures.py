"""The images of a run's data set as thumbnails, and boxes on them.

If the data set is gone, or an image cannot be read, there is no picture, and `Album.notes` says
why.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data.errors import UserError
from data.images import open_image
from data.load import read_splits
from data.rows import Row
from data.wording import Wording
from rewards.boxes import Box, four_numbers, parse_boxes, solution_kind
from rewards.coco import category
from rewards.frames import frame_of

LONGEST_SIDE = 320  # pixels of a thumbnail
BYTES = 2_500_000  # of all thumbnails of a report, as data URIs


@dataclass(frozen=True)
class Picture:
    """A thumbnail.

    uri: a data URI. width, height: pixels at which it is shown; the longer is LONGEST_SIDE, for a
    smaller image too. size: (width, height) of the original image, pixels.
    """

    uri: str
    width: int
    height: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Drawn:
    """A box on a thumbnail, in pixels of its `width` and `height`.

    kind: "truth", "before", "after", "up" or "down" (by the advantage). label: what is written on
    it.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str


class Album:
    """The rows of a run's data sets and their thumbnails.

    config: the run's flags. wording: how its prompts were worded (`Wording` as a dict), None if it
    did not say. datasets: as of `RunRecord`. limit: bytes of all data URIs at most. notes: why rows
    or images are missing, each reason once.
    """

    def __init__(
        self,
        config: dict,
        wording: dict | None = None,
        datasets: dict[str, str] | None = None,
        limit: int = BYTES,
    ):
        self.config, self.left, self.notes = config, limit, []
        self.wording = Wording(**wording) if wording else Wording()
        one = config.get("dataset_name")  # a text in runs of before there could be several
        self.sources = datasets or {"": str(one[0] if isinstance(one, list) and one else one)}
        self._splits: dict[str, tuple[Sequence[Row], Sequence[Row]]] = {}
        self._pictures: dict[tuple[bool, str, int], Picture | None] = {}

    def row(self, held_out: bool, dataset: str, index: int) -> Row | None:
        """A held-out row of a data set, or one to train on, by its index; None if there is none."""
        if dataset not in self._splits:
            flag = self.config.get
            try:
                self._splits[dataset] = read_splits(
                    dataset_name=str(self.sources.get(dataset)),
                    train_split=flag("dataset_train_split") or "train",
                    test_split=flag("dataset_test_split"),
                    test_share=flag("test_share"),
                    wording=self.wording,
                    several=len(self.sources) > 1,
                )
                for rows in self._splits[dataset]:
                    rows.dataset = dataset
            except UserError as error:
                self._splits[dataset] = ((), ())
                self._note(f"no images and problems: the data set cannot be read now: {error}")
        rows = self._splits[dataset][held_out]
        if 0 <= index < len(rows):
            return rows[index]
        if len(rows):
            whose = f" {dataset}" * bool(dataset)
            self._note(f"rows are missing: the data set{whose} has fewer of them now")
        return None

    def picture(self, held_out: bool, dataset: str, index: int) -> Picture | None:
        """The thumbnail of a row's first image; None if there is none, or no room for it."""
        place = held_out, dataset, index
        if place not in self._pictures:
            self._pictures[place] = self._thumbnail(self.row(held_out, dataset, index))
        return self._pictures[place]

    def _thumbnail(self, row: Row | None) -> Picture | None:
        if row is None or not row.images:
            return None
        try:
            image = open_image(row.images[0])
        except (UserError, TypeError) as error:
            self._note(f"an image is missing: {row.called}, {row.where}: {error}")
            return None
        size, scale = image.size, LONGEST_SIDE / max(image.size)
        shown = [max(1, round(side * scale)) for side in size]
        if scale < 1:
            image = image.resize(shown, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) > self.left:
            self._note("some images are left out, to keep this file small")
            return None
        self.left -= len(uri)
        return Picture(uri, width=shown[0], height=shown[1], size=size)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def read_answer(text: str | None, frame: tuple[float, float]) -> tuple[Box, ...]:
    """The legal boxes of an answer or a truth, of detection or of grounding. frame: (width, height)
    that its numbers count in."""
    boxes = parse_boxes(text or "", frame).boxes
    numbers = None if boxes else four_numbers(text or "")
    if numbers:
        x1, y1, x2, y2 = numbers
        boxes = (Box(x1, y1, x2, y2),) if x1 < x2 and y1 < y2 else ()
    return boxes


def draw(
    kind: str, text: str | None, picture: Picture | None, frames: dict | None, label: str | None
) -> list[Drawn]:
    """The boxes of an answer on a thumbnail; none without a picture or frames.

    kind: as in `Drawn`. frames: as `RunRecord.frames`. label: written on each box; None writes its
    confidence.
    """
    frame = picture and frames and frame_of(frames, picture.size)
    if not frame:
        return []
    across, down = picture.width / frame[0], picture.height / frame[1]
    return [
        Drawn(
            kind,
            x=round(box.x1 * across, 1),
            y=round(box.y1 * down, 1),
            width=round((box.x2 - box.x1) * across, 1),
            height=round((box.y2 - box.y1) * down, 1),
            label=f"{box.confidence:.2f}" if label is None else label,
        )
        for box in read_answer(text, frame)
    ]


def class_of(record: dict, row: Row | None, boxes: bool) -> str:
    """What a row asks about: the true class, or for boxes the category in the problem."""
    if not boxes:
        return record["truth"]
    return category(row.problem) if row else ""


def has_boxes(truth: str) -> bool:
    """Whether a true answer is boxes, of detection or of grounding."""
    return solution_kind(truth) != "class"
