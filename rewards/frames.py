"""What the coordinates of boxes count: thousandths of the image, its pixels, or those of the image
as it was resized for the model; and solutions from one of these frames to another.

A frame is (width, height): the coordinates of the image's lower right corner. Images are upright,
as EXIF says.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from data.errors import UserError
from rewards.boxes import POSITION, Box, read_boxes, read_grounding, solution_kind

FRAMES = {
    "thousandths": "thousandths of the image",
    "pixels": "pixels of the image",
    "resized": "pixels of the resized image",
}


@dataclass(frozen=True)
class Frames:
    """Which of FRAMES a data set's solutions count in, and the answers to it must.

    taught: what the model was taught to answer in. resized: (width, height) of an image in pixels
    -> that at which the model sees it.
    """

    solutions: str
    answers: str
    taught: str = field(repr=False)
    resized: Callable = field(repr=False)

    def __str__(self) -> str:
        converted = "" if self.solutions == self.answers else ", converted"
        return (
            f"solutions count {FRAMES[self.solutions]}{converted}; answers must count "
            f"{FRAMES[self.answers]} (this model was taught {FRAMES[self.taught]})"
        )

    def of(self, row) -> dict[str, tuple[float, float]]:
        """Each of FRAMES for the row's image."""
        sizes = ((1000, 1000), row.size, self.resized(*row.size))
        return {name: (float(w), float(h)) for name, (w, h) in zip(FRAMES, sizes, strict=True)}

    def answer(self, row) -> tuple[float, float]:
        """The frame that an answer to the row must count in."""
        return self.of(row)[self.answers]

    def solution(self, row) -> str:
        """The row's solution, in that frame. Raises UserError as `convert_solution`."""
        frames = self.of(row)
        return convert_solution(row.solution, frames[self.solutions], frames[self.answers])

    def described(self, sizes: Iterable[tuple[int, int]]) -> dict:
        """What `frame_of` needs to know, for JSON. sizes: (width, height) of the images, asked for
        only where answers count pixels of the resized image."""
        resized = set(sizes) if self.answers == "resized" else ()
        table = {f"{w}x{h}": list(self.resized(w, h)) for w, h in sorted(resized)}
        return {"answers": self.answers, "resized": table}


def frame_of(described: dict, size: tuple[int, int]) -> tuple[float, float] | None:
    """The frame that answers about an image of `size` (width, height) count in, from what
    `Frames.described` wrote; None if it does not say."""
    if described.get("answers") == "resized":
        found = described.get("resized", {}).get(f"{size[0]}x{size[1]}")
        return (float(found[0]), float(found[1])) if found else None
    known = {"thousandths": (1000.0, 1000.0), "pixels": (float(size[0]), float(size[1]))}
    return known.get(described.get("answers"))


def choose_frames(config, rows, processor) -> Frames:
    """By --data_frame and --box_frame. Where they say auto, solutions count what they look like,
    and answers what the solutions do: that is what a data set's own prompts ask for.

    Prompts that are made here (data/wording.py) ask for rows.asked_frame, and solutions count
    pixels. Raises UserError if --data_frame says otherwise.
    """
    if rows.asked_frame:
        if config.data_frame not in ("auto", "pixels"):
            raise UserError(f"--data_frame {config.data_frame}: {rows.name} counts pixels")
        return Frames("pixels", rows.asked_frame, processor.answers_in, processor.resized)
    data = config.data_frame
    if data == "auto":
        data = guess_frame(row.solution for row in rows.sound)
    answers = data if config.box_frame == "auto" else config.box_frame
    return Frames(data, answers, processor.answers_in, processor.resized)


def guess_frame(solutions: Iterable[str]) -> str:
    """ "pixels" if a coordinate in any of these solutions is above 1000, else "thousandths"."""
    largest = 0.0
    for text in solutions:
        positions = [p for part in re.split(r"[{}]", text) for p in POSITION.findall(part)]
        for numbers in positions or [text]:  # one box as (x1,y1),(x2,y2) has no key
            found = re.findall(r"\d+(?:\.\d+)?", numbers)
            largest = max(largest, *map(float, found), 0.0)
    return "pixels" if largest > 1000 else "thousandths"


@lru_cache(maxsize=4096)  # a solution is read once per completion and term
def convert_solution(
    solution: str, source: tuple[float, float], target: tuple[float, float]
) -> str:
    """A solution that counts in the frame `source` as it reads in the frame `target`: each
    coordinate times target / source along its axis, to 9 decimals.

    The same text if the frames are the same or it has no boxes. Raises UserError as `read_boxes`
    and `read_grounding`.
    """
    if source == target:
        return solution
    across, down = target[0] / source[0], target[1] / source[1]

    def corners(box: Box) -> list[str]:
        scaled = (box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down)
        return [f"{x:.9f}".rstrip("0").rstrip(".") for x in scaled]

    if solution_kind(solution) == "grounding":
        x1, y1, x2, y2 = corners(read_grounding(solution, source))
        return f"<answer>({x1},{y1}),({x2},{y2})</answer>"
    boxes = [
        f"{{'Position': [{', '.join(corners(box))}], 'Confidence': {box.confidence}}}"
        for box in read_boxes(solution, source)
    ]
    return f"<answer>[{', '.join(boxes)}]</answer>" if boxes else solution
