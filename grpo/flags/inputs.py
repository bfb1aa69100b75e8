"""The flags of what a run reads and where it writes: model, data, prompts, run folder.

The first chapter of `--help`; the others are in config.py.
"""

import os
from dataclasses import dataclass

from data.errors import UserError
from grpo.flags.parser import flag

TRACKERS = ("tensorboard", "wandb", "trackio")  # what each is: grpo/run/trackers.py


@dataclass
class InputConfig:
    """Model, data, prompts and the run folder."""

    model_name_or_path: str | None = flag(
        None, "checkpoint folder or hub name of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 model"
    )
    dataset_name: list[str] | None = flag(
        None,
        "class folders of photographs, a COCO annotation file, conversations, or rows of image, "
        "problem and solution: JSON, JSONL, parquet, save_to_disk or a hub name; or several of "
        "them, which are trained on together",
    )
    dataset_weights: list[float] | None = flag(
        None,
        "of several data sets: how many prompts are taken from each, one number for each, in "
        "proportion; by default each row is taken once an epoch",
        least=0,
    )
    dataset_train_split: str = flag("train", "split to train on")
    dataset_test_split: str | None = flag(
        None, "held-out split to evaluate on; by default `test` if the data set has one"
    )
    test_share: float | None = flag(
        None,
        "share of the images to hold out where the data set has no test split; by default 0.2 of "
        "class folders, labels and COCO files, else 0",
        least=0,
        below=1,
    )
    prompt_template: str | None = flag(
        None,
        "prompt for data sets that have none; {classes} in it becomes the list of classes, "
        "{category} what to find, {coordinates} what a box's numbers count",
    )
    enable_thinking: bool | None = flag(
        None,
        "for chat templates that know it, as Qwen3.5's: whether the model thinks before it "
        "answers; by default the template's own choice",
    )
    answer_format: str | None = flag(
        None,
        "what the format reward pays for: a thought and an answer, or the answer alone; by "
        "default `answer` where the prompt has closed the thought, else `think`",
        choices=("think", "answer"),
    )
    output_dir: str | None = flag(
        None, "run folder; by default runs/<script>-<date and time>", may_change=True
    )
    run_name: str | None = flag(
        None, "name for --report_to; by default the run folder's", may_change=True
    )
    report_to: list[str] = flag(
        ("none",),
        "also send metrics, and samples of completions every --report_steps, to one or more",
        choices=("none", *TRACKERS),
        may_change=True,
    )

    def __post_init__(self):
        if isinstance(self.dataset_name, str):
            self.dataset_name = [self.dataset_name]

    def check_inputs(self) -> None:
        """Raises UserError if a model or a data set is missing, if one is named twice, or if
        weights do not fit the data sets."""
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is needed")
        if not self.dataset_name or not all(self.dataset_name):
            raise UserError("--dataset_name is needed")
        seen: dict[str, str] = {}  # as it is on the disk -> as it was typed
        for name in self.dataset_name:
            path = os.path.realpath(os.path.expanduser(name))
            if path in seen:
                both = name if name == seen[path] else f"{seen[path]} and {name}"
                raise UserError(f"--dataset_name names one data set twice, {both}: leave one out")
            seen[path] = name
        count, weights = len(self.dataset_name), self.dataset_weights
        if weights is None or count == 1:
            return
        if len(weights) != count:
            raise UserError(
                f"--dataset_weights takes a number for each of the {count} data sets, and has "
                f"{len(weights)}"
            )
        if 0 in weights:
            raise UserError(
                f"--dataset_weights is 0 for {self.dataset_name[weights.index(0)]}: leave that "
                f"data set out of --dataset_name"
            )

    @property
    def trackers(self) -> list[str]:
        """--report_to without none."""
        return [name for name in self.report_to if name != "none"]
