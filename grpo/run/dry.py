"""What a dry run looks at besides: the weights' numbers, and the checkpoint to resume from.

Not here: what every run checks before it loads weights (grpo/run/data.py, checks.py).
"""

from pathlib import Path

from grpo.engine.ranks import Ranks
from grpo.plan.plan import total_steps
from grpo.run.resume import find_checkpoint, read_state
from models.folder import weight_files
from models.load import check_finite

LARGEST = 8e9  # bytes of weights that a dry run reads: half a minute from a slow disk


def look_further(config, folder: Path, rows: int, device) -> list[str]:
    """Lines for the plan. folder: the model's. rows: to train on.

    Raises UserError for weights that are NaN or infinite, and for a checkpoint that is none or does
    not fit these flags. (Whether its rows and its reference are today's is seen when it resumes.)
    """
    lines, size = [], sum(file.stat().st_size for file in weight_files(folder))
    if size <= LARGEST:
        check_finite(folder)
    else:
        lines.append(
            f"model     its {size / 1e9:.0f} GB of weights were not read; a run refuses NaN in them"
        )
    if config.resume_from_checkpoint:
        output = Path(config.output_dir)
        alone = Ranks(rank=0, world=1, device=device)  # each rank looks in its own time
        checkpoint, saved, notes = find_checkpoint(config.resume_from_checkpoint, output, alone)
        lines += notes
        if checkpoint is None:
            return [*lines, f"run       {output} has no checkpoint to resume from yet"]
        state = read_state(checkpoint, saved, config, total_steps(config, rows), facts={})
        lines.append(f"run       resumes {checkpoint}, step {state.step}")
    return lines
