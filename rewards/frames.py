"""Frames of box coordinates: thousandths of the image, pixels, or pixels of the resized image.

"Resized" is the image as the model sees it. A frame is (width, height), the coordinates of the
image's lower right corner; images are upright, as EXIF says. Solutions are converted from one frame
to another; a data set's own prompt is never changed.
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
    """Which of FRAMES a data set's solutions are in, and which one answers must be in.

    taught: the one that the model was taught to answer in. resized: a function, (width, height) of
    an image in pixels -> (width, height) at which the model sees it.
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
        """(width, height) of each of FRAMES, by name, for the row's image."""
        sizes = ((1000, 1000), row.size, self.resized(*row.size))
        return {name: (float(w), float(h)) for name, (w, h) in zip(FRAMES, sizes, strict=True)}

    def answer(self, row) -> tuple[float, float]:
        """(width, height) of the frame that an answer to the row must be in."""
        return self.of(row)[self.answers]

    def solution(self, row) -> str:
        """The row's solution, converted to the frame of answers. Raises UserError as
        `convert_solution`."""
        frames = self.of(row)
        return convert_solution(row.solution, frames[self.solutions], frames[self.answers])

    def described(self, sizes: Iterable[tuple[int, int]]) -> dict:
        """What `frame_of` needs to know, for JSON.

        sizes: (width, height) of all images in pixels; read only if answers are in pixels of the
        resized image.
        """
        sizes = set(sizes) if self.answers == "resized" else ()
        resized = {f"{w}x{h}": list(self.resized(w, h)) for w, h in sorted(sizes)}
        return {"answers": self.answers, "resized": resized}


def frame_of(described: dict, size: tuple[int, int]) -> tuple[float, float] | None:
    """(width, height) of the frame of answers about an image of `size` (width, height in pixels),
    from what `Frames.described` returned; None if it does not say."""
    if described.get("answers") == "resized":
        resized = described.get("resized", {}).get(f"{size[0]}x{size[1]}")
        return (float(resized[0]), float(resized[1])) if resized else None
    frames = {"thousandths": (1000.0, 1000.0), "pixels": (float(size[0]), float(size[1]))}
    return frames.get(described.get("answers"))


def choose_frames(config, rows, processor) -> Frames:
    """The frames by --data_frame and --box_frame.

    With "auto" the frame of solutions is guessed, and answers are in the same frame, as that is
    what a data set's own prompts ask for. Prompts that are made here (data/wording.py) ask for
    rows.asked_frame, and their solutions are in pixels. Raises UserError if --data_frame says
    otherwise.
    """
    if rows.asked_frame:
        if config.data_frame not in ("auto", "pixels"):
            raise UserError(f"--data_frame {config.data_frame}: {rows.name} counts pixels")
        return Frames("pixels", rows.asked_frame, processor.answers_in, processor.resized)
    solutions = config.data_frame
    if solutions == "auto":
        solutions = guess_frame(row.solution for row in rows.sound)
    answers = solutions if config.box_frame == "auto" else config.box_frame
    return Frames(solutions, answers, processor.answers_in, processor.resized)


def guess_frame(solutions: Iterable[str]) -> str:
    """ "pixels" if a coordinate in any of these solutions is above 1000, else "thousandths"."""
    largest = 0.0
    for text in solutions:
        positions = [p for part in re.split(r"[{}]", text) for p in POSITION.findall(part)]
        for position in positions or [text]:  # one box as (x1,y1),(x2,y2) has no key
            numbers = re.findall(r"\d+(?:\.\d+)?", position)
            largest = max(largest, *map(float, numbers), 0.0)
    return "pixels" if largest > 1000 else "thousandths"


@lru_cache(maxsize=4096)  # a solution is read once per completion and term
def convert_solution(
    solution: str, source: tuple[float, float], target: tuple[float, float]
) -> str:
    """A solution with its boxes converted from the frame `source` to the frame `target`: each
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
