"""report.html of a run, written by `python -m grpo.report` in a process of its own.

A report that fails, or takes too long, does not end the run. Not here: the page (grpo/report/).
"""

import os
import subprocess
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST = 60  # seconds that a run waits for its report: less than other ranks wait for this one


def write_report(folder: Path) -> str:
    """Writes report.html of the run in `folder`, and waits for it.

    Returns "" if it was written, else a note that says why not.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            # -P: packages in the current folder must not take the place of ours
            [sys.executable, "-P", "-m", "grpo.report", str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LONGEST,
            process_group=0,  # Ctrl-C is for the run
        )
    except subprocess.TimeoutExpired:
        why = f"not done after {LONGEST} seconds"
    except OSError as error:
        why = str(error)
    else:
        if not done.returncode:
            return ""
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        why = errors[-1] if errors else f"exit code {done.returncode}"
    return f"note: report.html was not written: {why}; try python -m grpo.report {folder}"


def about(steps: int, rows, held_out, task) -> dict:
    """What a report cannot tell from the flags, for run.json: how many steps there will be, what
    coordinates in answers count, how prompts were worded, and the names of several data sets."""
    sizes = chain((of_row[0] for of_row in rows.sizes), (row.size for row in held_out))
    frames = task.frames.described(sizes) if task.frames else None
    found = {"steps": steps, "frames": frames, "ask": asdict(rows.wording)}
    if len(rows.parts) > 1:
        found["datasets"] = {part.dataset: part.source for part in rows.parts}
    return found
