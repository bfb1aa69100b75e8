"""What the coordinates of a data set's solutions count, where --data_frame does not say it.

The problems' own words decide, if most rows say the same. Else the frame is taken in which the
boxes are the likeliest: in thousandths they lie all over 1000 x 1000, in pixels all over their
images, and one row in 1,000 has a slip. Clues weigh as much as odds of 1000 to 1: boxes that end
at the edge, and columns width and height that hold the image's size. Position and tags around
boxes, whose makers count thousandths, weigh 100 to 1. "Resized" must be 100 times likelier than
both others. A guess is sure at odds of 100, unless all boxes fit the other frame too and no clue
speaks for this one. Not here: what --box_frame makes of it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from data.errors import UserError
from rewards.boxes import corners_of, short

FRAMES = {
    "thousandths": "thousandths of the image",
    "pixels": "pixels of the image",
    "resized": "pixels of the resized image",
}
SLIP = 1e-3  # the share of boxes that reach out of their frame
CLUE = math.log(1000)
SURE = math.log(100)  # that much likelier than the next frame
AT_EDGE = 0.02  # of the rows; by chance, one in 300
SLACK = 1.1  # boxes seldom lie in the last tenth of an image, so that tells nothing

_WORDS = {
    "thousandths": re.compile(
        r"thousandth|per mille|\bnormali[sz]ed\b"
        r"|\b0\s*(?:-|–|to|and|,|\.\.+)\s*(?:1000|1,000|999)\b"
        r"|\b1000\s*[x×*]\s*1000\b",
        re.IGNORECASE,
    ),
    "resized": re.compile(r"\bresized\b", re.IGNORECASE),
    "pixels": re.compile(
        r"\bin (?:absolute )?pixels\b|\bpixel (?:coordinate|position|value|unit)|\bin px\b"
        r"|\bpixels of\b|\(pixels\)|\bcoordinates?\b[^.]{0,30}\bpixels\b|\babsolute coordinate",
        re.IGNORECASE,
    ),
}
_IN_THOUSANDTHS = re.compile(r"\bPosition\b|<box>|<\|box_start\|>|<\|det\|>")


@dataclass(frozen=True)
class Guess:
    """A key of FRAMES, whether it is sure, and a reason in words, "" if there are no boxes."""

    frame: str
    sure: bool
    reason: str = ""

    def __str__(self) -> str:
        how = "by" if self.sure else "guessed by"
        return f"{self.frame} {how} --data_frame auto: {self.reason}" if self.reason else ""


@dataclass(frozen=True)
class _Boxes:
    """A row's boxes, and (width, height) of each frame of its image."""

    row: int
    corners: list[tuple[float, ...]]
    frames: dict[str, tuple[float, float]]
    words: str  # the frame that its problem asks for, or ""
    columns: str  # the frame whose size its columns width and height hold, or ""
    form: str  # the frame that the solution's form is taught with, or ""

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The lower right corner of all boxes together."""
        return tuple(max(max(c[i::2]) for c in self.corners) for i in (0, 1))

    def outside(self, name: str) -> bool:
        """Whether a box reaches out of a frame."""
        return not self.lies_in(self.frames[name])

    def lies_in(self, size: tuple) -> bool:
        """Whether all boxes lie in an image of this (width, height)."""
        return self.reach[0] <= size[0] and self.reach[1] <= size[1]

    def at_edge(self, name: str) -> bool:
        """Whether the boxes end at the frame's right or lower edge, give or take 1."""
        (x, y), (w, h) = self.reach, self.frames[name]
        return not self.outside(name) and (w - x <= 1 or h - y <= 1)

    def log_likelihood(self, name: str, other: str) -> float:
        """Of whether the boxes lie inside each of two frames, if they count the first."""
        (w, h), (other_w, other_h) = self.frames[name], self.frames[other]
        both = min(1.0, SLACK * other_w / w) * min(1.0, SLACK * other_h / h)
        if self.outside(name):
            return math.log(SLIP)
        return math.log(max(1 - both, SLIP) if self.outside(other) else both)


def frames_of(size: tuple[int, int], resized: Callable) -> dict[str, tuple[float, float]]:
    """(width, height) of each of FRAMES, by name, of an image of `size` (width, height in pixels).
    resized: as of rewards/frames.py's Frames."""
    sizes = ((1000, 1000), size, resized(*size))
    return {name: (float(w), float(h)) for name, (w, h) in zip(FRAMES, sizes, strict=True)}


def guess_frame(rows, resized: Callable) -> Guess:
    """What the solutions of these rows count. rows: a data/rows.py SplitRows with its sizes.

    Raises UserError if boxes of most rows lie in images of the size that the columns width and
    height say, and the images have another.
    """
    found, other = [], []
    for row in rows.sound:
        if corners := corners_of(row.solution):
            size = rows.sizes[row.index][0] if rows.sizes else row.size
            frames = frames_of(size, resized)
            columns = next((n for n in ("pixels", "resized") if frames[n] == row.declared), "")
            form = "thousandths" if _IN_THOUSANDTHS.search(row.found) else ""
            words = asked_for(row.problem)
            found.append(_Boxes(row.index, corners, frames, words, columns, form))
            if row.declared and not columns and found[-1].lies_in(row.declared):
                other.append((row, size))
    if len(other) > len(found) / 2:
        row, (w, h) = other[0]
        raise UserError(
            f"{rows.name}: the columns width and height of {len(other)} rows are not the images': "
            f"row {row.index} ({row.where}) says {row.declared[0]:g} x {row.declared[1]:g}, and "
            f"the image has {w} x {h}. If boxes count pixels of the other size, scale them, or put "
            f"the images of that size in place; else say what they count with --data_frame"
        )
    return weigh(found)


def asked_for(problem: str) -> str:
    """The frame that a problem's words ask for, or "" if they do not say, or name two."""
    names = [name for name, words in _WORDS.items() if words.search(problem)]
    if names == ["resized", "pixels"]:
        return "resized"
    return names[0] if len(names) == 1 and names != ["resized"] else ""


def weigh(found: list[_Boxes]) -> Guess:
    """The frame of these rows' boxes."""
    if not found:
        return Guess("thousandths", sure=False)

    def most(what: str, name: str) -> bool:
        return sum(getattr(b, what) == name for b in found) > len(found) / 2

    clues = {name: _clues(found, name, columns=most("columns", name)) for name in FRAMES}
    likely = {name: CLUE * len(clues[name]) + SURE * most("form", name) for name in FRAMES}

    def fits(name: str, other: str) -> float:
        """How much likelier (log) the boxes are in one frame than in the other."""
        return sum(b.log_likelihood(name, other) - b.log_likelihood(other, name) for b in found)

    def margin(name: str, other: str) -> float:
        return fits(name, other) + likely[name] - likely[other]

    frame = "pixels" if margin("pixels", "thousandths") > 0 else "thousandths"
    rival = "thousandths" if frame == "pixels" else "pixels"
    if min(margin("resized", frame), margin("resized", rival)) >= SURE:
        frame, rival = "resized", frame
    if asked := [name for name in FRAMES if most("words", name)]:
        doubt = margin(frame, asked[0]) >= SURE
        reason = f"the problems say so{f', though boxes lie as {frame} would' * doubt}"
        return Guess(asked[0], sure=not doubt, reason=reason)
    out = [b for b in found if b.outside(rival) and not b.outside(frame)]
    sure = margin(frame, rival) >= SURE and bool(out or clues[frame])
    sure = sure and (frame == "resized" or margin("resized", frame) <= 0)
    reasons = [_outside(out, rival, len(found))] if out else []
    reasons += clues[frame]
    if most("form", frame):
        reasons.append("they are in a form that counts thousandths by origin")
    if not out:
        fit = sum(not b.outside(frame) for b in found)
        hardly = ", but would hardly all lie so" * (fits(frame, rival) >= SURE)
        both = f"boxes of {fit} of {len(found)} rows fit it, and {rival}, too{hardly}"
        reasons.append(both if fit else f"no row's boxes fit it, nor {rival}")
    return Guess(frame, sure, "; ".join(reasons))


def _clues(found: list[_Boxes], name: str, columns: bool) -> list[str]:
    """What speaks for a frame besides how the boxes lie. columns: most rows' columns width and
    height hold its size."""
    clues = ["the columns width and height hold its size"] if columns else []
    edges = [b.row for b in found if b.at_edge(name)]
    if len(edges) >= AT_EDGE * len(found):
        clues.append(f"boxes of {len(edges)} rows, first row {edges[0]}, end at the edge")
    return clues


def _outside(out: list[_Boxes], rival: str, rows: int) -> str:
    """That these rows, of so many, do not fit the rival frame; the first of them in full."""
    first, (w, h) = out[0], out[0].frames[rival]
    box = next(c for c in first.corners if max(c[::2]) > w or max(c[1::2]) > h)
    return (
        f"as {rival}, {len(out)} of {rows} rows reach out of {w:g} x {h:g}, first row {first.row} "
        f"with [{', '.join(map(short, box))}]"
    )
