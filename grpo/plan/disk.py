"""Room on the disk: what a checkpoint takes, what writing it takes, what a whole run takes.

Parts of a file lie beside the file that they are joined to, so that writing takes more than what is
kept (models/load.py's `save_tensors`). Not here: memory (memory.py).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from grpo.engine.adamw import MOMENT_BYTES
from grpo.flags.config import TrainingConfig
from grpo.plan.memory import Estimate
from grpo.plan.sizes import Facts

DEFAULT = "runs"  # where a run without --output_dir writes


@dataclass(frozen=True)
class Disk:
    """Bytes. weights, moments: of a checkpoint. final: of final/. count: how many checkpoints the
    run makes. best: whether one more is kept, by its evaluation."""

    weights: float
    moments: float
    final: float
    count: int
    best: bool

    @property
    def checkpoint(self) -> float:
        return self.weights + self.moments

    @property
    def writing(self) -> float:
        """A checkpoint's weights, then its moments, each beside its parts."""
        return max(2 * self.weights, self.weights + 2 * self.moments)

    @property
    def certain(self) -> float:
        """The least that must be free."""
        return max(self.checkpoint * (self.count > 0), self.final)

    def at_most(self, limit: int | None) -> float:
        """What the run takes with --save_total_limit."""
        kept = min(self.count, limit + self.best) if limit else self.count
        last_save = min(self.count - 1, kept) * self.checkpoint + self.writing
        return max(last_save * (self.count > 0), kept * self.checkpoint + 2 * self.final)


def disk_of(config: TrainingConfig, facts: Facts, steps: int, untrained: int) -> Disk:
    """What the run will write. untrained: numbers of the model's that final/ gets unchanged."""
    estimate = Estimate(config, facts)
    counts, size = estimate.counts, estimate.size
    padding = counts.padding * (config.optim == "adamw_8bit")
    weights = counts.adapters if estimate.lora else counts.whole
    return Disk(
        weights=weights * (size if estimate.light else 4),
        moments=(estimate.trained + padding) * MOMENT_BYTES.get(config.optim, 8),
        final=counts.whole * size + counts.adapters * 4 + untrained * size,
        count=steps // config.save_steps if config.save_steps else 0,
        best=bool(config.eval_steps),
    )


def room(config: TrainingConfig, disk: Disk) -> list[str]:
    """The plan's lines. Raises UserError if the run cannot be saved for certain."""
    if config.eval_only:
        return []
    parts = [f"final/ {_gb(disk.final)}"]
    if disk.count:
        parts = [f"a checkpoint {_gb(disk.checkpoint)} ({_gb(disk.writing)} to write it)", *parts]
    limit = config.save_total_limit
    folder = Path(config.output_dir or DEFAULT)
    line = f"disk      {', '.join(parts)}; at most {_gb(disk.at_most(limit))} for the whole run"
    parent = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), None)
    if config.gpu_memory or parent is None:  # planned for another machine
        return [line]
    own, left_behind = _written(folder, "checkpoint-*"), _written(folder, ".*.partial")
    free = shutil.disk_usage(parent).free + left_behind
    line += f", {_gb(free)} free"
    # of a run that is resumed, some checkpoints may be there, and final/ alone be left to write
    certain = disk.final if config.resume_from_checkpoint else disk.certain
    if free < certain:
        raise UserError(
            f"--output_dir {folder}: {_gb(free)} are free on the disk of {parent}, and at the "
            f"least {_gb(certain)} are needed ({', '.join(parts)}): free space, or name a "
            f"folder on another disk"
        )
    if free + own < disk.at_most(limit):
        line += ", which is not enough"
        if limit != 1 and free + own >= disk.at_most(1):
            most = next(n for n in range(disk.count, 0, -1) if free + own >= disk.at_most(n))
            line += f": --save_total_limit {most} would take {_gb(disk.at_most(most))}"
    return [line]


def _written(folder: Path, names: str) -> int:
    """Bytes of the files in the subfolders of these names."""
    files = [path for place in folder.glob(names) for path in place.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
