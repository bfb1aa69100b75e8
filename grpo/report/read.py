"""What a run's folder holds, read while the run goes on or long after.

A last line that is cut (the run is writing it, or was killed) is left out. Anything else that is no
line of this trainer is a UserError that names the file and the line. Nothing here needs the data
set, and nothing is written.
"""

import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.errors import UserError

_GROUP = re.compile(rb'\{"step": (\d+), "prompt": (\d+), "sample": \d+, ')  # as folder.py writes it
_KINDS = {  # what stands under a name; a number that was not finite is None
    "step": int,
    "row": int,
    "truth": str,
    "answer": str | None,
    "completion": str,
    "rewards": dict,
    "reward": int | float | None,
    "advantage": int | float | None,
    "tokens": int,
}


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    config: flag -> value, config_text: the file itself. training: a line of metrics.jsonl per step.
    evaluations: a line per held-out evaluation. findings: (step, text) of diagnosis.txt. steps: how
    many the run wants, None if it did not say. frames: what coordinates in answers count
    (rewards/frames.py), and wording: how prompts were worded (data/wording.py); None if the run did
    not say. status: "finished", "running", "stopped", or "evaluated" where nothing was trained.
    """

    folder: Path
    config: dict
    config_text: str
    training: list[dict]
    evaluations: list[dict]
    findings: list[tuple[int, str]]
    steps: int | None
    frames: dict | None
    wording: dict | None
    status: str

    @property
    def name(self) -> str:
        return self.config.get("run_name") or self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last finished step; 0 before the first."""
        return self.training[-1]["step"] if self.training else 0

    def answers(self) -> list[tuple[int, dict[int, dict]]]:
        """(step, row -> record) of the first and the last evaluation whose answers are there; one
        or none if there are no two."""
        there = [
            line["step"]
            for line in self.evaluations
            if (self.folder / f"eval-{line['step']}.jsonl").is_file()
        ]
        needed = ("row", "truth", "answer", "completion", "rewards", "reward", "tokens")
        found = []
        for step in dict.fromkeys(there[:1] + there[-1:]):
            lines = read_lines(self.folder / f"eval-{step}.jsonl", needed)
            found.append((step, {line["row"]: line for line in lines}))
        return found


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`. Raises UserError if there is none, or a file of it is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not the folder of a run: it has no {name}")
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: holds no `flag: value` lines")
    lines = read_lines(folder / "metrics.jsonl", ("step",))
    evaluated = [any(name.startswith("eval/") for name in line) for line in lines]
    training = [line for line, held_out in zip(lines, evaluated, strict=True) if not held_out]
    about = _read_about(folder / "run.json")
    steps = about.get("steps") or config.get("max_steps")
    steps = steps if isinstance(steps, int) else None
    done = training[-1]["step"] if training else 0
    return RunRecord(
        folder,
        config,
        text,
        training,
        [line for line, held_out in zip(lines, evaluated, strict=True) if held_out],
        read_findings(folder / "diagnosis.txt"),
        steps,
        about.get("frames"),
        about.get("ask"),
        "evaluated" if config.get("eval_only") else _status(folder, done, steps),
    )


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, each with the names `needed`; without a last line that is cut.

    Raises UserError naming the file and the line for anything else.
    """
    found = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # what comes after the last newline is not written to its end
            break
        found.append(_object(line, needed, f"{path}, line {number}"))
    return found


def _object(line: bytes, needed: tuple[str, ...], where: str) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged, not JSON: {error}") from error
    if not isinstance(value, dict) or any(name not in value for name in needed):
        raise UserError(f"{where}: damaged, no object with {', '.join(needed)}")
    for name in needed:
        if not isinstance(value[name], _KINDS[name]):
            raise UserError(f"{where}: damaged, {name} is {str(value[name])[:80]!r}")
    return value


def read_findings(path: Path) -> list[tuple[int, str]]:
    """(step, text) of each finding in diagnosis.txt, in its order; none without the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^step (\d+): ", text, flags=re.MULTILINE)
    return [(int(step), body.strip()) for step, body in zip(parts[1::2], parts[2::2], strict=True)]


def _read_about(path: Path) -> dict:
    """run.json; nothing for a run of an older version, which has none."""
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    kinds = {"steps": int, "frames": dict | None}
    if not isinstance(about, dict) or any(
        not isinstance(about.get(name), kind) for name, kind in kinds.items()
    ):
        raise UserError(f"{path}: damaged, no object with {', '.join(kinds)}")
    return about


def _status(folder: Path, done: int, steps: int | None) -> str:
    if (folder / "final").is_dir() and done >= (steps or 0):
        return "finished"
    try:  # a run holds .lock while it lives
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except OSError:  # no such file, or a file system without locks
        pass
    return "stopped"


class Completions:
    """completions.jsonl by groups. It can be large: it is scanned once, and only the groups that
    are asked for are parsed."""

    def __init__(self, path: Path):
        self.path = path
        self._bytes: dict[tuple[int, int], tuple[int, int]] = {}  # (step, prompt) -> start, end
        if path.is_file():
            for group, start, end in self._scan():
                first = self._bytes.get(group, (start, end))[0]
                self._bytes[group] = (first, end)

    def _scan(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # cut
                    return
                found = _GROUP.match(line)
                if not found:
                    raise UserError(f"{self.path}, line {number}: damaged, not a completion")
                yield (int(found[1]), int(found[2])), start, start + len(line)
                start += len(line)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(step, prompt) of every group, in the order of the file."""
        return list(self._bytes)

    def group(self, step: int, prompt: int) -> list[dict]:
        """The completions of a group. Raises UserError for a damaged line."""
        start, end = self._bytes[step, prompt]
        with self.path.open("rb") as file:
            file.seek(start)
            lines = file.read(end - start).splitlines()
        needed = ("row", "truth", "answer", "completion", "rewards", "reward", "advantage")
        where = f"{self.path}, step {step}, prompt {prompt}"
        return [_object(line, needed, where) for line in lines]
