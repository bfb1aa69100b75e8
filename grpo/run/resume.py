"""Resuming a run: which checkpoint, whether it fits, and loading it.

Not here: what a checkpoint holds and how it is written (checkpoint.py).
"""

import json
import time
from dataclasses import fields
from pathlib import Path

from data.errors import UserError
from grpo.engine.optimizer import Optimizer
from grpo.run.checkpoint import State, checkpoints
from models.folder import weight_files


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Renames checkpoints after `step` to abandoned-...: for a run that is resumed from an earlier
    one and will write others. Nothing is deleted. Returns the new paths.
    """
    renamed = []
    for folder in checkpoints(output_dir):
        if int(folder.name[11:]) > step:
            aside = folder.with_name(f"abandoned-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            renamed.append(folder.rename(aside))
    return renamed


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The checkpoint folder that --resume_from_checkpoint asks for.

    wanted: its path, or "auto" for the newest in output_dir. Returns None for "auto" if the run was
    stopped before its first. Raises UserError for a path that is no checkpoint, or one of another
    run than output_dir holds.
    """
    if wanted == "auto":
        folders = checkpoints(output_dir)
        if not folders and (output_dir / "final").exists():
            raise UserError(f"{output_dir} holds a run that has ended and kept no checkpoint")
        return folders[-1] if folders else None
    folder = Path(wanted)
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"--resume_from_checkpoint {wanted} is a run folder: name one of its checkpoints, or "
            f"--output_dir {wanted} --resume_from_checkpoint auto"
        )
    if not (folder / "state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {wanted}: no state.json there, so it is not a checkpoint of "
            f"a run; to start from its weights use --model_name_or_path"
        )
    if folder.resolve().parent != output_dir.resolve() and (output_dir / "metrics.jsonl").exists():
        raise UserError(f"--output_dir {output_dir} holds another run than {folder} belongs to")
    return folder


def read_state(folder: Path, config, steps: int, facts: dict[str, str]) -> State:
    """The state in a checkpoint, which must fit the run that resumes from it.

    config: today's flags (a dataclass of `flag`s). steps: of the complete run by today's flags.
    facts: what else must be the same, by name. Raises UserError if the file is damaged, if flags
    differ that may not change when a run is resumed (naming each), if the run is at its end or
    would become shorter, and if a fact differs.
    """
    try:
        saved = json.loads((folder / "state.json").read_text())
        if missing := [f.name for f in fields(State) if f.name not in saved]:
            raise KeyError(*missing)
        state = State(**{f.name: saved[f.name] for f in fields(State)})
        if not isinstance(state.config, dict) or not isinstance(state.facts, dict):
            raise TypeError("config and facts are not tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'}: not a readable run state: {error!r}") from error
    changed = [
        f"--{f.name}: {state.config.get(f.name)!r} then, {getattr(config, f.name)!r} now"
        for f in fields(config)
        if not f.metadata["may_change"] and state.config.get(f.name) != getattr(config, f.name)
    ]
    if changed:
        raise UserError(
            f"{folder} belongs to a run with other settings:\n  " + "\n  ".join(changed)
        )
    ended = (folder.parent / "final").exists()  # else what is left is to write it
    if state.step > steps or (state.step == steps and ended):
        raise UserError(f"the run is at its end, step {state.step}: raise --max_steps to continue")
    if steps < state.steps:
        raise UserError(
            f"{folder} belongs to a run of {state.steps} steps, now {steps} are asked for: "
            f"--max_steps may go up, not down"
        )
    for name, value in facts.items():
        if state.facts.get(name) != value:
            raise UserError(f"{folder}: {name} is not what the run began with")
    return state


def resume(folder: Path, optimizer: Optimizer, updates: int) -> None:
    """Loads a checkpoint's weights and moments into the optimizer and its model.

    Any number of ranks may have written it. updates: as the checkpoint's state counts them. Raises
    UserError if a file is missing or damaged.
    """
    missing = optimizer.resume(updates, weight_files(folder), weight_files(folder / "optimizer"))
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} the first")
