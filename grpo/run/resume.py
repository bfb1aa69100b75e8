"""Resuming a run: which checkpoint, whether it fits, and loading it.

Not here: what a checkpoint holds and how it is written (checkpoint.py).
"""

import socket
import time
from dataclasses import fields
from pathlib import Path

from data.errors import UserError
from data.files import fault
from grpo.engine.optimizer import Optimizer
from grpo.engine.ranks import Ranks
from grpo.run.checkpoint import State, named_checkpoints
from grpo.run.seal import FILES, hashes, read_sealed
from models.folder import weight_files


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Renames checkpoints after `step` to abandoned-...: for a run that is resumed from an earlier
    one and will write others, be they whole or not. Nothing is deleted. Returns the new paths.
    """
    renamed = []
    for folder in named_checkpoints(output_dir):
        if int(folder.name[11:]) > step:
            aside = folder.with_name(f"abandoned-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            renamed.append(folder.rename(aside))
    return renamed


def find_checkpoint(
    wanted: str, output_dir: Path, ranks: Ranks
) -> tuple[Path | None, dict, list[str]]:
    """The checkpoint that --resume_from_checkpoint asks for. Every rank must call it: the main rank
    chooses, all look whether they see it, and share the work of comparing its checksums.

    wanted: its path, or "auto" for the newest in output_dir that is whole. Returns the folder, what
    its state.json holds, and lines to print; None for "auto" if the run was stopped before its
    first. Raises UserError on every rank: for a path that is no whole checkpoint, or one of another
    run than output_dir holds; if there are checkpoints and none is whole; if a rank does not see
    the main rank's.
    """
    with ranks.agree():
        names = _candidates(wanted, output_dir) if ranks.is_main else []
    names, notes = ranks.gather([names])[0], []
    for name in names:
        folder = output_dir / name if wanted == "auto" else Path(wanted)
        saved, problem = _check_whole(folder, ranks)
        if problem is None:
            if FILES not in saved:
                notes.append(f"unchecked {folder} was made before checkpoints had checksums")
            return folder, saved, notes
        notes.append(f"passed over {folder}: {problem}")
    if names and wanted != "auto":
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {problem}. Name an earlier checkpoint, or "
            f"--output_dir {output_dir} --resume_from_checkpoint auto for the newest whole one"
        )
    if names:
        raise UserError(
            f"{output_dir} has no whole checkpoint to resume from:\n  " + "\n  ".join(notes)
        )
    return None, {}, []


def _candidates(wanted: str, output_dir: Path) -> list[str]:
    """Names of checkpoint folders to try, the newest first. Raises as `find_checkpoint`."""
    if wanted == "auto":
        folders = named_checkpoints(output_dir)
        if not folders and (output_dir / "final").exists():
            raise UserError(f"{output_dir} holds a run that has ended and kept no checkpoint")
        return [folder.name for folder in reversed(folders)]
    folder = Path(wanted)
    if not fault(folder / "config.yaml"):
        raise UserError(
            f"--resume_from_checkpoint {wanted} is a run folder: name one of its checkpoints, or "
            f"--output_dir {wanted} --resume_from_checkpoint auto"
        )
    if fault(folder / "state.json"):
        raise UserError(
            f"--resume_from_checkpoint {wanted}: no state.json there, so it is not a checkpoint of "
            f"a run; to start from its weights use --model_name_or_path"
        )
    if folder.resolve().parent != output_dir.resolve() and (output_dir / "metrics.jsonl").exists():
        raise UserError(f"--output_dir {output_dir} holds another run than {folder} belongs to")
    return [folder.name]


def _check_whole(folder: Path, ranks: Ranks) -> tuple[dict, str | None]:
    """What state.json holds, and what is wrong with the checkpoint: None if nothing is. The same on
    every rank. Raises UserError on every rank if one does not see what the main rank sees."""
    saved, problem = {}, None
    if ranks.is_main:
        try:
            saved = read_sealed(folder)
        except UserError as error:
            problem = str(error)
    saved, problem = ranks.gather([(saved, problem)])[0]
    if problem is not None:
        return {}, problem
    seen = [(hashes(folder, ["state.json"])[0], socket.gethostname(), str(folder))]
    seen = ranks.gather(seen)
    (first, its_host, path), *_ = seen
    blind = [f"rank {r} on {host}" for r, (own, host, _) in enumerate(seen) if own != first]
    if blind:
        raise UserError(
            f"{path}: the main rank, on {its_host}, resumes from it, but it is not there for "
            f"{', '.join(blind[:8])}: is --output_dir on storage that all ranks see?"
        )
    files = saved.get(FILES, {})
    mine = ranks.mine(sorted(files))
    own = dict(zip(mine, hashes(folder, mine), strict=True))
    wrong = {name: one for name, one in own.items() if one != files[name]}
    for name, one in (item for of_rank in ranks.gather([wrong]) for item in of_rank.items()):
        if not one:  # it may be whole: nothing is decided without it
            raise UserError(
                f"{folder / name}: cannot be read: try again, or name another checkpoint with "
                f"--resume_from_checkpoint"
            )
        return {}, f"{folder / name}: not what was saved: its checksum differs"
    return saved, None


def read_state(folder: Path, saved: dict, config, steps: int, facts: dict[str, str]) -> State:
    """The state in a checkpoint, which must fit the run that resumes from it.

    saved: what state.json holds. config: today's flags (a dataclass of `flag`s). steps: of the
    complete run by today's flags. facts: what else must be the same, by name. Raises UserError if
    the state is not one, if flags differ that may not change when a run is resumed (naming each),
    if the run is at its end or would become shorter, and if a fact differs.
    """
    try:
        state = State(**{f.name: saved[f.name] for f in fields(State)})
        if not isinstance(state.config, dict) or not isinstance(state.facts, dict):
            raise TypeError("config and facts are not tables")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'}: not a readable run state: {error!r}") from error
    # a flag that was not there yet: by default a run is what it was without
    then = {f.name: state.config.get(f.name, f.default) for f in fields(config)}
    both = {name: (value, getattr(config, name)) for name, value in then.items()}
    both["dataset_name"] = tuple(map(_one, both["dataset_name"]))
    changed = [
        f"--{f.name}: {both[f.name][0]!r} then, {both[f.name][1]!r} now"
        for f in fields(config)
        if not f.metadata["may_change"] and both[f.name][0] != both[f.name][1]
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
    check_facts(folder, state, facts)
    return state


def _one(names: list[str] | str | None) -> list[str] | str | None:
    """--dataset_name as it was before there could be several: the name itself if there is one."""
    return names[0] if isinstance(names, list) and len(names) == 1 else names


def check_facts(folder: Path, state: State, facts: dict[str, str]) -> None:
    """Raises UserError if a fact is not what the checkpoint's run began with."""
    for name, value in facts.items():
        if state.facts.get(name) != value:
            raise UserError(f"{folder}: {name} is not what the run began with")


def resume(folder: Path, optimizer: Optimizer, updates: int) -> None:
    """Loads a checkpoint's weights and moments into the optimizer and its model.

    Any number of ranks may have written it. updates: as the checkpoint's state counts them. Raises
    UserError if a file is missing or damaged.
    """
    missing = optimizer.resume(updates, weight_files(folder), weight_files(folder / "optimizer"))
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} the first")
