"""report.html while a run goes on: `python -m grpo.report` as a process of its own.

It reads the run's folder and gets no data from here, so that a step waits for nothing. A report
that fails ends no run.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST = 300  # seconds that the end of a run waits for its report


class Reporter:
    """Writes the report of the run in `folder` every `every` steps (0: never) and at its end."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every
        self._process: subprocess.Popen | None = None
        self._errors = None  # what the process says, a file: a pipe could fill up and block it
        self._wrote = self._told = False

    def step(self, step: int) -> None:
        """Starts a report in the background, if one is due and the last is done. It runs when a
        core is idle, so that it takes none from the training."""
        if self.every and step % self.every == 0 and self._is_done():
            self._start(idle=True)

    def end(self) -> str:
        """Writes the report and waits for it. Returns a line that says where it is."""
        if not self._is_done():  # it does not know the last steps, and may wait for an idle core
            self._process.kill()
            self._process.wait()
        self._start(idle=False)
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LONGEST)
            if not self._is_done():
                self._process.kill()
                self._tell(f"not done after {LONGEST} seconds")
        if self._wrote:
            return f"report    {self.folder / 'report.html'}"
        return f"report    none written; try python -m grpo.report {self.folder}"

    def _start(self, idle: bool) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # -P: packages of the folder that the run was started in do not stand in for ours.
        command = [sys.executable, "-P", "-m", "grpo.report", str(self.folder)]
        self._process, self._wrote = None, False
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  `_is_done` closes it
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C is for the run. (In a session of its own the process would be its own group
                # for Linux's scheduler too, with as large a share as the training, idle or not.)
                process_group=0,
            )
        except OSError as error:
            return self._tell(str(error))
        if idle:
            with suppress(OSError):  # where it may not be set, or the process has ended already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
                if hasattr(os, "SCHED_IDLE"):  # Linux
                    os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))

    def _is_done(self) -> bool:
        """Whether no report is being written; says so if the last one failed."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        if code:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            self._tell(said[-1] if said else f"exit code {code}")
        self._process, self._wrote = None, not code
        self._errors.close()
        return True

    def _tell(self, why: str) -> None:
        """Once: a failure that repeats is no news."""
        if not self._told:
            text = f"note: report.html was not written: {why} (the run does not need it)"
            print(text, file=sys.stderr, flush=True)
        self._told = True


def about(steps: int, rows, held_out, task) -> dict:
    """What a report cannot tell from the flags: how many steps there will be, what coordinates in
    answers count, how prompts were worded."""
    sizes = chain((of_row[0] for of_row in rows.sizes), (row.size for row in held_out))
    frames = task.frames.described(sizes) if task.frames else None
    return {"steps": steps, "frames": frames, "ask": asdict(rows.ask)}
