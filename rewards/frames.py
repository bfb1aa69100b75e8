"""Frames of box coordinates: thousandths of the image, pixels, or pixels of the resized image.

"Resized" is the image as the model sees it. A frame is (width, height), the coordinates of the
image's lower right corner; images are upright, as EXIF says. Solutions are converted from one frame
to another; a data set's own prompt is never changed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from data.errors import UserError
from rewards.boxes import (
    OUTSIDE,
    Box,
    grounding_text,
    position_text,
    read_boxes,
    read_grounding,
    solution_kind,
)
from rewards.guess import FRAMES, frames_of, guess_frame


@dataclass(frozen=True)
class Frames:
    """Which of FRAMES a data set's solutions are in, and which one answers must be in.

    taught: the one that the model was taught to answer in. resized: a function, (width, height) of
    an image in pixels -> (width, height) at which the model sees it. why: what the frame of
    solutions was guessed from, "" if --data_frame or the form of the data says it.
    """

    solutions: str
    answers: str
    taught: str = field(repr=False)
    resized: Callable = field(repr=False)
    why: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        converted = "" if self.solutions == self.answers else ", converted"
        return (
            f"solutions count {FRAMES[self.solutions]}{converted}; answers must count "
            f"{FRAMES[self.answers]} (this model was taught {FRAMES[self.taught]})"
            + f"\n          {self.why}"
            * bool(self.why)
        )

    def of(self, row) -> dict[str, tuple[float, float]]:
        """(width, height) of each of FRAMES, by name, for the row's image."""
        return frames_of(row.size, self.resized)

    def answer(self, row) -> tuple[float, float]:
        """(width, height) of the frame that an answer to the row must be in."""
        return self.of(row)[self.answers]

    def solution(self, row) -> str:
        """The row's solution, converted to the frame of answers. Raises UserError as
        `convert_solution`."""
        frames = self.of(row)
        try:
            return convert_solution(row.solution, frames[self.solutions], frames[self.answers])
        except UserError as error:
            why = f" ({self.why})" if self.why and OUTSIDE in str(error) else ""
            raise UserError(f"{error}{why}") from error

    def described(self, sizes: Iterable[tuple[int, int]]) -> dict:
        """What `frame_of` needs to know, for JSON.

        sizes: (width, height) of all images in pixels; read only if answers are in pixels of the
        resized image.
        """
        sizes = set(sizes) if self.answers == "resized" else ()
        resized = {f"{w}x{h}": list(self.resized(w, h)) for w, h in sorted(sizes)}
        return {"answers": self.answers, "resized": resized}


@dataclass(frozen=True)
class FramesOfSets:
    """The `Frames` of each of several data sets, by its name; a row's own are used."""

    sets: dict[str, Frames]

    def __str__(self) -> str:
        return "\nframes    ".join(f"{name}: {frames}" for name, frames in self.sets.items())

    def of(self, row) -> dict[str, tuple[float, float]]:
        """As `Frames.of`."""
        return self.sets[row.dataset].of(row)

    def answer(self, row) -> tuple[float, float]:
        """As `Frames.answer`."""
        return self.sets[row.dataset].answer(row)

    def solution(self, row) -> str:
        """As `Frames.solution`."""
        return self.sets[row.dataset].solution(row)

    def described(self, sizes: Iterable[tuple[int, int]]) -> dict:
        """What `Frames.described` returns, for each data set."""
        sizes = list(sizes)
        return {"sets": {name: frames.described(sizes) for name, frames in self.sets.items()}}


def frame_of(described: dict, size: tuple[int, int]) -> tuple[float, float] | None:
    """(width, height) of the frame of answers about an image of `size` (width, height in pixels),
    from what `Frames.described` returned; None if it does not say."""
    if described.get("answers") == "resized":
        resized = described.get("resized", {}).get(f"{size[0]}x{size[1]}")
        return (float(resized[0]), float(resized[1])) if resized else None
    frames = {"thousandths": (1000.0, 1000.0), "pixels": (float(size[0]), float(size[1]))}
    return frames.get(described.get("answers"))


def choose_frames(config, sets: Mapping[str, tuple], processor) -> Frames | FramesOfSets:
    """The frames of each data set, by itself. sets: name -> its rows to train on, and those held
    out. Raises UserError as `frames_of_set`, with the name of the data set if there are several."""
    if len(sets) == 1:
        return frames_of_set(config, next(iter(sets.values())), processor)
    found, stated = {}, [bool(rows.asked_frame) for rows, _ in sets.values()]
    for name, splits in sets.items():
        try:
            found[name] = frames_of_set(config, splits, processor, meant=not all(stated))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return FramesOfSets(found)


def frames_of_set(config, splits, processor, meant: bool = False) -> Frames:
    """The frames of the rows to train on and of those held out, by --data_frame and --box_frame.

    With "auto" the frame of solutions is guessed (rewards/guess.py), and answers are in the same
    frame, as that is what a data set's own prompts ask for. Prompts that are made here
    (data/wording.py) ask for rows.asked_frame, and their solutions are in pixels. meant: whether
    --data_frame may be meant for another data set, and has no effect here. Raises UserError if
    --data_frame says otherwise and is not, if --box_frame converts what is only guessed, or if the
    splits count differently.
    """
    train = splits[0]
    taught, resized = processor.answers_in, processor.resized
    if train.asked_frame:
        if config.data_frame not in ("auto", "pixels"):
            if not meant:
                raise UserError(f"--data_frame {config.data_frame}: {train.name} counts pixels")
            train.notes.append(f"--data_frame {config.data_frame} has no effect: it counts pixels")
        return Frames("pixels", train.asked_frame, taught, resized)
    frame, why = config.data_frame, ""
    if frame == "auto" and train.stated_frame:
        frame, why = train.stated_frame, f"{train.stated_frame}, as ms-swift's objects count"
    elif frame == "auto":
        guesses = [guess_frame(rows, resized) for rows in splits if len(rows)]
        guess, other = guesses[0] if guesses[0].reason else guesses[-1], guesses[-1]
        if guess.frame != other.frame and (other.sure or not guess.sure):
            raise UserError(
                f"the splits differ: boxes in {FRAMES[guess.frame]} to train on, in "
                f"{FRAMES[other.frame]} held out ({guess}; held out: {other}); say what both count "
                f"with --data_frame"
            )
        if config.box_frame not in ("auto", guess.frame) and guess.reason and not guess.sure:
            raise UserError(
                f"--box_frame {config.box_frame} converts solutions, and what they count is only "
                f"guessed ({guess}); say it: --data_frame {' or '.join(FRAMES)}"
            )
        frame, why = guess.frame, str(guess)
    answers = frame if config.box_frame == "auto" else config.box_frame
    return Frames(frame, answers, taught, resized, why)


@lru_cache(maxsize=4096)  # a solution is read once per completion and term
def convert_solution(
    solution: str, source: tuple[float, float], target: tuple[float, float]
) -> str:
    """A solution with its boxes converted from the frame `source` to the frame `target`: each
    coordinate times target / source along its axis, to 9 decimals.

    The same text if the frames are the same or it has no boxes. Raises UserError as `read_boxes`
    and `read_grounding`.
    """
    grounding = solution_kind(solution) == "grounding"
    boxes = [read_grounding(solution, source)] if grounding else read_boxes(solution, source)
    if source == target or not boxes:
        return solution
    across, down = target[0] / source[0], target[1] / source[1]

    def corners(box: Box) -> tuple[float, ...]:
        return box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down

    if grounding:
        return grounding_text(corners(boxes[0]))
    elements = [position_text(corners(box), box.confidence) for box in boxes]
    return f"<answer>[{', '.join(elements)}]</answer>"
