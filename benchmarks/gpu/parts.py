"""Parts of a benchmark, each in processes of its own with a time limit.

A part that fails, hangs or takes its process with it is reported, and the next one begins. What it
had found until then is kept.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = Path(__file__).resolve().parent / "child.py"


@dataclass(frozen=True)
class Part:
    """function: "module:name", called in a process of its own as function(settings, report), where
    report(name, value) keeps a finding (JSON). groups: what --parts may call it by, besides `name`.
    limit: seconds that it may take of ten minutes; more minutes raise it. settings: for the
    function. where: "device", "ranks" (a process for each device) or "cpu"."""

    name: str
    groups: tuple[str, ...]
    function: str
    limit: float
    settings: dict
    where: str = "device"


class Starts(NamedTuple):
    """What starts a script, by where a part wants to run: the words before the script's path."""

    device: Sequence[str]
    ranks: Sequence[str]
    cpu: Sequence[str] = (sys.executable,)


def run(part: Part, starts: Starts, folder: Path, seconds: float) -> dict:
    """Runs a part for at most `seconds`. Returns status ("done", "failed", "out of time", "stopped"
    by Ctrl-C), seconds, found (name -> value), and for a part that is not done `why`."""
    began = time.monotonic()
    process = begin(part, starts, folder)
    try:
        status = "failed" if process.wait(seconds) else "done"
    except subprocess.TimeoutExpired:
        status = "out of time"
    except KeyboardInterrupt:
        status = "stopped"
    finally:
        end(process)
    row = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    row["found"] = read(folder / f"{part.name}.jsonl")
    if status == "failed":
        said = last_words(folder / f"{part.name}.log")
        row["why"] = f"exit code {process.returncode}: {said}"
    elif status == "out of time":
        row["why"] = f"not finished after {seconds:.0f} s"
    elif status == "stopped":
        row["why"] = "by a signal"
    return row


def begin(part: Part, starts: Starts, folder: Path) -> subprocess.Popen:
    """Starts a part. What it reports goes to folder/NAME.jsonl, what it prints to NAME.log."""
    found = folder / f"{part.name}.jsonl"
    found.unlink(missing_ok=True)
    shutil.rmtree(folder / part.name, ignore_errors=True)  # of an earlier time
    settings = json.dumps({"folder": str(folder), "name": part.name} | part.settings)
    command = [*getattr(starts, part.where), str(CHILD), part.function, settings, str(found)]
    environment = os.environ | {"PYTHONPATH": path_of(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    if part.where == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / f"{part.name}.log").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def path_of(root: Path) -> str:
    """PYTHONPATH with this checkout first, so that a child imports nothing else by its name."""
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


def end(process: subprocess.Popen) -> None:
    """Ends a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(path: Path) -> dict:
    """What a part has reported so far. A line that its end cut short is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found |= json.loads(line)
        except ValueError:
            continue
    return found


def last_words(log: Path) -> str:
    """The last lines that a part printed, without those of the emulated device and of torchrun."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith("rehearsal:")]
    errors = [line for line in said if "Error" in line and not line.startswith("torch.distributed")]
    return (errors or said or ["it printed nothing"])[-1][-400:]
