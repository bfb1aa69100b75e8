"""The trackers of --report_to: TensorBoard, Weights & Biases, Trackio.

Each has `log(metrics)`, `samples(step, table)` and `close()`. A resumed run continues its curves.
Not here: which steps are sent (grpo/run/run.py).
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.errors import UserError
from data.images import open_image
from grpo.reward import Record

SHOWN = 8  # completions of a table, all of one group
SIDE = 320  # pixels of its image


@dataclass(frozen=True)
class SampleTable:
    """Completions of one group: its problem, its image (None if it cannot be read), and for each
    completion a list of values, one for each of `columns`."""

    problem: str
    image: Image.Image | None
    columns: list[str]
    completions: list[list]


def sample_table(row, records: Sequence[Record], advantages: Sequence[float]) -> SampleTable:
    """The first completions of a group, with every reward. row: the group's data row."""
    try:
        image = open_image(row.images[0])
        image.thumbnail((SIDE, SIDE))
    except UserError:  # it was there when the prompt was encoded: a table is no reason to stop
        image = None
    columns = ["truth", "completion", *records[0].rewards, "reward", "advantage"]
    completions = [
        [r.truth, r.completion, *r.rewards.values(), r.reward, float(advantage)]
        for r, advantage in zip(records, advantages, strict=True)
    ]
    return SampleTable(row.problem, image, columns, completions[:SHOWN])


def verbatim(text: str) -> str:
    """A text as a block of code, which a tracker that renders Markdown shows unchanged."""
    lines = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    return "\n".join(f"    {line}" for line in lines.splitlines())


class TensorBoard:
    """Event files in the run's folder; samples as text and image."""

    def __init__(self, path: Path, name: str, resumed_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # points of steps that will be trained again are hidden
        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(path / "tensorboard" / name), purge_step=purge_step)

    def log(self, metrics: dict) -> None:
        for key, value in metrics.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, metrics["step"])

    def samples(self, step: int, table: SampleTable) -> None:
        parts = [verbatim(table.problem)]
        for values in table.completions:
            by_column = dict(zip(table.columns, values, strict=True))
            completion, truth = by_column.pop("completion"), by_column.pop("truth")
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in by_column.items())
            parts.append(f"{numbers}; truth:\n\n{verbatim(truth)}\n\n{verbatim(completion)}")
        self._writer.add_text("completions", "\n\n---\n\n".join(parts), step)
        if table.image is not None:
            import numpy as np

            pixels = np.asarray(table.image)
            self._writer.add_image("completions/image", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Service:
    """A run in Weights & Biases, or in Trackio, which has the same functions; samples as a table.

    module: "wandb", whose run id is kept in the run's folder, or "trackio", which stores on this
    machine unless its own variables say otherwise ($TRACKIO_PROJECT names the project).
    """

    def __init__(self, module: str, path: Path, name: str, config: dict, resumed_step: int | None):
        self._module, resumed = importlib.import_module(module), resumed_step is not None
        self._reads_markdown = module == "trackio"
        if module == "wandb":
            file = path / "wandb_id"
            run_id = file.read_text() if resumed and file.exists() else None
            self._run = self._module.init(
                name=name, dir=str(path), config=config, id=run_id, resume="allow"
            )
            file.write_text(self._run.id)
        else:
            project = os.environ.get("TRACKIO_PROJECT", "grpo-vlm")
            resume = "allow" if resumed else "never"
            self._run = self._module.init(
                project, name=name, config=config, resume=resume, embed=False
            )

    def log(self, metrics: dict) -> None:
        values = {k: v for k, v in metrics.items() if k != "step" and v is not None}
        self._run.log(values, step=metrics["step"])

    def samples(self, step: int, table: SampleTable) -> None:
        image = table.image and self._module.Image(table.image)
        lines = [[table.problem, *values] for values in table.completions]
        if self._reads_markdown:
            lines = [[verbatim(v) if isinstance(v, str) else v for v in line] for line in lines]
        columns, lines = ["image", "problem", *table.columns], [[image, *line] for line in lines]
        self._run.log({"completions": self._module.Table(columns=columns, data=lines)}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(names: list[str]) -> None:
    """Raises UserError for the first name of --report_to whose package is not installed."""
    for name in names:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: pip install {name}")


def open_trackers(
    names: list[str], path: Path, name: str, config: dict, resumed_step: int | None
) -> list:
    """The trackers of --report_to. path: the run's folder; name: the run's.

    resumed_step: the step that a run is resumed from; None for a new run.
    """
    trackers = []
    for tracker in names:
        if tracker == "tensorboard":
            trackers.append(TensorBoard(path, name, resumed_step))
        elif tracker != "none":
            trackers.append(Service(tracker, path, name, config, resumed_step))
    return trackers
