"""The flags of what a run reads and where it writes: model, data, prompts, run folder.

The first chapter of `--help`; the others are in config.py.
"""

from dataclasses import dataclass

from grpo.flags.parser import flag

TRACKERS = ("tensorboard", "wandb", "trackio")  # what each is: grpo/run/trackers.py


@dataclass
class InputConfig:
    """Model, data, prompts and the run folder."""

    model_name_or_path: str | None = flag(
        None, "checkpoint folder or hub name of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 model"
    )
    dataset_name: str | None = flag(
        None,
        "class folders of photographs, a COCO annotation file, conversations, or rows of image, "
        "problem and solution: JSON, JSONL, parquet, save_to_disk or a hub name",
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

    @property
    def trackers(self) -> list[str]:
        """--report_to without none."""
        return [name for name in self.report_to if name != "none"]
