"""Prompts for data sets that have none: photographs in class folders, label columns, COCO files.

The model's family decides how boxes are asked for: in what coordinates, and in what form. Not here:
prompts that a data set brings along, which are never changed.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import UserError

LISTED = 50  # classes that fit a prompt

CLASS = (
    "What does this image show? {choice}{give} the answer alone, between <answer> and </answer>."
)
BOXES = (
    "Find every object of the category '{category}' in this image. Give the corners x1, y1, x2, y2 "
    "of each one's box in {coordinates}, and your confidence from 0 to 1. {give} the list alone, "
    "between <answer> and </answer>:\n"
    "{thought}<answer>{example}</answer>\n"
    "If there is none, answer <answer>No Objects</answer>."
)
# What --answer_format makes of both.
GIVE = {"think": "First think, between <think> and </think>. Then give", "answer": "Give"}
THOUGHT = {"think": "<think>...</think>", "answer": ""}
COORDINATES = {
    "thousandths": "thousandths of the image, from 0 to 1000",
    "pixels": "pixels of the image as it was taken",
    "resized": "pixels",
}
EXAMPLES = {
    "Position": "[{'Position': [x1, y1, x2, y2], 'Confidence': 0.9}, ...]",
    "bbox_2d": '[{"bbox_2d": [x1, y1, x2, y2], "label": "{category}", "confidence": 0.9}, ...]',
}


@dataclass(frozen=True)
class Wording:
    """How prompts are worded, and two choices that go with it for boxes.

    template: --prompt_template, in place of CLASS or BOXES; {classes} in it becomes the list of
    classes, {category} what to find, {coordinates} what a box's numbers count, {example} a list of
    boxes. frame: a key of COORDINATES. form: a key of EXAMPLES. absent_share: --absent_share, the
    share of rows that ask for a category which the image does not show. corners: whether boxes of a
    column `objects` are two corners; None guesses. answer_format: a key of GIVE, as
    `choose_answer_format` returns it; a template is not changed by it.
    """

    template: str | None = None
    frame: str = "thousandths"
    form: str = "Position"
    absent_share: float = 0.0
    corners: bool | None = None
    answer_format: str = "think"

    def class_problem(self, classes: Sequence[str]) -> str:
        """The question which of the classes an image shows; lists them if they are at most LISTED.

        Raises UserError for a template with a placeholder that is not filled.
        """
        names = ", ".join(classes)
        if self.template is not None:
            self._check_template({"classes"})
            return self.template.replace("{classes}", names)
        choice = f"Choose one of: {names}. " if len(classes) <= LISTED else ""
        return CLASS.replace("{give}", GIVE[self.answer_format]).replace("{choice}", choice)

    def boxes_problem(self, category: str) -> str:
        """The question where in an image objects of the category are.

        Raises UserError for a template without {category}, or with a placeholder that is not
        filled.
        """
        if self.template is not None:
            self._check_template({"category", "coordinates", "example"})
            if "{category}" not in self.template:
                raise UserError(
                    "--prompt_template: without {category} it does not say what to find"
                )
        text = self.template
        if text is None:
            text = BOXES.replace("{give}", GIVE[self.answer_format])
            text = text.replace("{thought}", THOUGHT[self.answer_format])
        text = text.replace("{example}", EXAMPLES[self.form])
        text = text.replace("{coordinates}", COORDINATES[self.frame])
        return text.replace("{category}", category)

    def _check_template(self, known: set[str]) -> None:
        """Raises UserError for an empty template, and for a placeholder that is not filled."""
        if not self.template.strip():
            raise UserError("--prompt_template is empty")
        other = set(re.findall(r"\{(\w+)\}", self.template)) - known
        if other:
            listed = ", ".join(f"{{{name}}}" for name in sorted(known))
            raise UserError(
                f"--prompt_template: {{{min(other)}}} is not filled; for this data set {listed} are"
            )


def choose_answer_format(answer_format: str | None, processor) -> str:
    """What the format reward pays for, "think" or "answer": --answer_format, by default "answer"
    where the prompt has closed the thought.

    processor: says where its chat template leaves the answer (thought). Raises UserError for
    "answer" where the prompt opens a thought: the answer could not come first.
    """
    if answer_format == "answer" and processor.thought == "opened":
        other = "--enable_thinking false or " if processor.can_switch else ""
        raise UserError(
            f"--answer_format answer: the chat template opens a thought ({processor.opened!r}), so "
            f"no completion is an answer alone; pass {other}--answer_format think"
        )
    return answer_format or ("answer" if processor.thought == "closed" else "think")


def check_names(names: Sequence[str], where: str) -> None:
    """Raises UserError if a class or category has no name, or if an answer could not tell two of
    them apart: case, spaces, dashes, underscores, quotes and a full stop make no difference, as in
    rewards/cls.py. where: the file or column, for the message."""
    seen: dict[str, str] = {}  # as compared -> as written
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        plain = re.sub(r"[\s_\-\u2010-\u2015]+", " ", plain).strip(" \"'").rstrip(".,;:!?\"' ")
        if not plain:
            raise UserError(f"{where}: {name!r} is no name")
        if plain in seen:
            raise UserError(
                f"{where}: {seen[plain]!r} and {name!r} count as one name; join or rename them"
            )
        seen[plain] = name
