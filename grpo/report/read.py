"""Reads a run's folder, while the run goes on or long after.

A last line that is incomplete (the run is writing it, or was killed) is left out. Any other line
that this trainer cannot have written is a UserError that names the file and the line. Not here: the
data set (grpo/report/pictures.py); and nothing is written.
"""

import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from data import files
from data.errors import UserError, shown

_GROUP = re.compile(rb'\{"step": (\d+), "prompt": (\d+), "sample": \d+, ')  # as folder.py writes it
_TYPES = {  # of a record's values; a number that was not finite is None
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
    """A run as its folder shows it.

    config: flag -> value; config_text: the text of config.yaml. training, evaluations: the lines of
    metrics.jsonl for each step, and for each held-out evaluation. findings: (step, text) of
    diagnosis.txt. steps: how many the run is to have. frames: what coordinates in answers count, as
    `Frames.described` wrote it (rewards/frames.py). wording: how prompts were worded, a `Wording`
    as a dict (data/wording.py). The last three are None if the folder does not say. datasets: of
    several data sets, name -> --dataset_name; else empty. status: "finished", "running", "stopped",
    or "evaluated" if nothing was trained.
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
    datasets: dict[str, str]
    status: str

    @property
    def name(self) -> str:
        return self.config.get("run_name") or self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last finished step; 0 before the first."""
        return self.training[-1]["step"] if self.training else 0

    def answers(self) -> list[tuple[int, dict[tuple[str, int], dict]]]:
        """(step, (data set, row number) -> record) of the first and the last evaluation whose
        eval-<step>.jsonl exists; fewer if there are no two. The data set is "" if there is one."""
        steps = [
            line["step"]
            for line in self.evaluations
            if (self.folder / f"eval-{line['step']}.jsonl").is_file()
        ]
        needed = ("row", "truth", "answer", "completion", "rewards", "reward", "tokens")
        answers = []
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            lines = read_lines(self.folder / f"eval-{step}.jsonl", needed)
            rows = {(line.get("dataset") or "", line["row"]): line for line in lines}
            answers.append((step, rows))
        return answers


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`. Raises UserError if there is none, or a file of it is damaged."""
    if why := files.impossible(folder):
        raise UserError(f"{shown(str(folder))}: {why}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: not the folder of a run: it has no {name}")
    text = files.read_text(folder / "config.yaml")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = str(error)[: files.SHOWN]
        raise UserError(f"{folder / 'config.yaml'}: cannot be read: {what}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: holds no `flag: value` lines")
    training, evaluations = [], []
    for line in read_lines(folder / "metrics.jsonl", ("step",)):
        is_evaluation = any(name.startswith("eval/") for name in line)
        (evaluations if is_evaluation else training).append(line)
    about = _read_about(folder / "run.json")
    steps = about.get("steps") or config.get("max_steps")
    steps = steps if isinstance(steps, int) else None
    done = training[-1]["step"] if training else 0
    return RunRecord(
        folder=folder,
        config=config,
        config_text=text,
        training=training,
        evaluations=evaluations,
        findings=read_findings(folder / "diagnosis.txt"),
        steps=steps,
        frames=about.get("frames"),
        wording=about.get("ask"),
        datasets=about.get("datasets") or {},
        status="evaluated" if config.get("eval_only") else _status(folder, done, steps),
    )


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, each with the keys `needed`; without an incomplete last line.

    Raises UserError naming the file and the line for anything else.
    """
    objects = []
    try:
        lines = files.read_bytes(path, files.TABLE).split(b"\n")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # after the last newline: empty, or a line not yet complete
            break
        objects.append(_object(line, needed, f"{path}, line {number}"))
    return objects


def _object(line: bytes, needed: tuple[str, ...], where: str) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged, not JSON: {str(error)[: files.SHOWN]}") from error
    if not isinstance(value, dict) or any(name not in value for name in needed):
        raise UserError(f"{where}: damaged, no object with {', '.join(needed)}")
    for name in needed:
        if not isinstance(value[name], _TYPES[name]):
            raise UserError(f"{where}: damaged, {name} is {str(value[name])[:80]!r}")
    return value


def read_findings(path: Path) -> list[tuple[int, str]]:
    """(step, text) of each finding in diagnosis.txt, in its order; none without the file."""
    if not path.exists():
        return []
    try:
        text = files.read_bytes(path, files.IMAGE).decode("utf-8", errors="replace")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    parts = re.split(r"^step (\d+): ", text, flags=re.MULTILINE)
    return [(int(step), body.strip()) for step, body in zip(parts[1::2], parts[2::2], strict=True)]


def _read_about(path: Path) -> dict:
    """run.json; nothing for a run of an older version, which has none."""
    if not path.exists():
        return {}
    about = files.read_json(path)
    types = {"steps": int, "frames": dict | None, "datasets": dict | None}
    if not isinstance(about, dict) or any(
        not isinstance(about.get(name), type_) for name, type_ in types.items()
    ):
        raise UserError(f"{path}: damaged, no object with {', '.join(types)}")
    return about


def _status(folder: Path, done: int, steps: int | None) -> str:
    """done: steps so far; steps: how many the run is to have."""
    if (folder / "final").is_dir() and done >= (steps or 0):
        return "finished"
    try:  # a run holds .lock while it lives
        with files.regular(folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running"
    except (OSError, UserError):  # no such file, or a file system without locks
        pass
    return "stopped"


class Completions:
    """The groups of completions.jsonl. The file can be large: it is scanned once for where each
    group is, and only the groups that are asked for are parsed.

    Raises UserError for a line that is no completion.
    """

    def __init__(self, path: Path):
        self.path = path
        self._bytes: dict[tuple[int, int], tuple[int, int]] = {}  # (step, prompt) -> start, end
        if path.exists():
            files.regular(path)
            for group, start, end in self._scan():
                begin = self._bytes.get(group, (start, end))[0]
                self._bytes[group] = (begin, end)

    def _scan(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """((step, prompt), first byte, end) of each line."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # incomplete
                    return
                match = _GROUP.match(line)
                if not match:
                    raise UserError(f"{self.path}, line {number}: damaged, not a completion")
                yield (int(match[1]), int(match[2])), start, start + len(line)
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
