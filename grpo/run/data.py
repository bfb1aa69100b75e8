"""What a run reads before a weight is loaded: both splits, the model's processor and sizes.

Not here: the forms of data sets (data/load.py).
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.check import load_splits
from data.rows import Row, SplitRows
from data.sets import JoinedRows
from grpo.engine.ranks import Ranks
from grpo.run.dry import look_at_weights
from models.config import QwenVLConfig
from models.load import check_checkpoint, find_folder
from models.processor import Processor


@dataclass
class Data:
    """The data, and what the model's folder says without its weights.

    rows: to train on, of all data sets. held_out: to measure with, may be empty. folder: of
    the model. sizes: its config, and how many parameters it has in all and in the vision tower.
    eval_samples, stop: the flags. notes: further lines of the plan. lengths: tokens of each prompt
    of both splits, once the rows are checked.
    """

    rows: SplitRows | JoinedRows
    held_out: SplitRows | JoinedRows
    processor: Processor
    folder: Path
    sizes: tuple[QwenVLConfig, int, int]
    eval_samples: int | None
    stop: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def splits(self) -> list[SplitRows]:
        """Those to train on, one of each data set, then those held out in the same order."""
        return [*self.rows.parts, *self.held_out.parts]

    @property
    def sets(self) -> dict[str, tuple[SplitRows, SplitRows]]:
        """Each data set's rows to train on and held out, by its name; "" where there is one."""
        pairs = zip(self.rows.parts, self.held_out.parts, strict=True)
        return {train.dataset: (train, held_out) for train, held_out in pairs}

    @property
    def answer_format(self) -> str:
        """--answer_format, or what it is by default: "think" or "answer"."""
        return self.rows.wording.answer_format

    @cached_property
    def eval_rows(self) -> list[Row]:
        """The held-out rows that evaluations take: the first --eval_samples of each data set."""
        return self.held_out.first(self.eval_samples)


def load_data(config, ranks: Ranks) -> Data:
    """Finds the model's folder, reads its processor and both splits, and checks every image.

    A dry run looks at the weights, too (grpo/run/dry.py). Raises UserError as `find_folder`,
    `Processor`, `check_checkpoint` and `load_splits`; what is wrong with single rows is in
    `SplitRows.faults`.
    """
    folder = find_folder(config.model_name_or_path)
    processor = Processor(
        folder, config.min_pixels, config.max_pixels, enable_thinking=config.enable_thinking
    )
    sizes = check_checkpoint(folder)
    rows, held_out = load_splits(config, processor, ranks.progress)
    notes = look_at_weights(folder) if config.dry_run else []
    stop = tuple(config.stop or ())
    return Data(rows, held_out, processor, folder, sizes, config.eval_samples, stop, notes)
