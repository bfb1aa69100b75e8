"""What a dry run looks at besides: the weights' numbers, which a run sees when it loads them.

Not here: what every run checks before it loads weights (grpo/run/data.py, checks.py).
"""

from pathlib import Path

from models.folder import weight_files
from models.load import check_finite

LARGEST = 8e9  # bytes of weights that a dry run reads: half a minute from a slow disk


def look_at_weights(folder: Path) -> list[str]:
    """Lines for the plan. folder: the model's. Raises UserError for weights that are NaN or
    infinite."""
    lines, size = [], sum(file.stat().st_size for file in weight_files(folder))
    if size <= LARGEST:
        check_finite(folder)
    else:
        lines.append(
            f"model     its {size / 1e9:.0f} GB of weights were not read; a run refuses NaN in them"
        )
    return lines
