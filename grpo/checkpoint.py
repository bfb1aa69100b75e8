"""Saving a run so that it can go on, and taking it up again.

checkpoint-N/ is a Hugging Face checkpoint in float32 (the master weights), loadable by transformers
as it is, plus AdamW's moments (optimizer/) and the run's counters (state.json). Random numbers need
no saving: every sample's follow from (seed, step, prompt, sample). Nothing is pickled, and nothing
in it depends on the number of ranks. It is written under a temporary name, flushed to the disk and
then renamed, so that whatever is called checkpoint-N is whole.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from grpo.dist import Optimizer, Ranks
from models.load import save_config, save_tensors, weight_files
from models.qwen_vl import QwenVL


def save_checkpoint(
    output_dir: Path,
    source: Path,
    model: QwenVL,
    optimizer: Optimizer,
    state: dict,
    ranks: Ranks,
    save_total_limit: int | None = None,
) -> Path:
    """Writes output_dir/checkpoint-{state["step"]}; then removes all but the newest
    save_total_limit, and the best by evaluation, of the run's checkpoints.

    state: JSON-able counters, "step" among them; "held_out", where not None, ranks checkpoints.
    source: the folder whose tokenizer and processor files are copied. Every rank must call it.
    Returns the folder. Raises ValueError where it cannot be written; older ones are kept then.
    """
    folder = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{folder.name}.partial"
    # a run that stopped where it was taken up
    if ranks.any(ranks.is_main and (folder / "state.json").is_file()):
        return folder

    def write_state() -> None:
        save_config(model, partial, source, torch.float32)
        counters = {**state, "updates": optimizer.updates}
        (partial / "state.json").write_text(json.dumps(counters, indent=2) + "\n")

    # float32: a frozen tower of a bfloat16 model too
    weights = {name: weight.float() for name, weight in _weights(model, optimizer).items()}
    tensors = {partial: weights, partial / "optimizer": optimizer.moments()}
    _write_whole(folder, partial, tensors, write_state, ranks)
    problem = _attempt(lambda: _remove_old(output_dir, save_total_limit), ranks, ranks.is_main)
    if problem:
        raise ValueError(f"{folder} is saved, but older ones could not be removed: {problem}")
    return folder


def save_final(
    output_dir: Path,
    source: Path,
    model: QwenVL,
    optimizer: Optimizer,
    ranks: Ranks,
    dtype: torch.dtype,
) -> Path:
    """Writes output_dir/final, the trained checkpoint in the dtype that was trained with.

    Every rank must call it. Raises ValueError where it cannot be written.
    """
    folder, partial = output_dir / "final", output_dir / ".final.partial"
    weights = {name: weight.to(dtype) for name, weight in _weights(model, optimizer).items()}

    def write_config() -> None:
        save_config(model, partial, source, dtype)

    _write_whole(folder, partial, {partial: weights}, write_config, ranks)
    return folder


def _weights(model: QwenVL, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """All weights by name, the masters of those that are trained."""
    found = {**dict(model.named_parameters()), **optimizer.masters}
    return {name: weight.detach() for name, weight in found.items()}


def _write_whole(
    folder: Path,
    partial: Path,
    tensors: dict[Path, dict[str, torch.Tensor]],
    write_rest: Callable[[], None],
    ranks: Ranks,
) -> None:
    """Writes tensors (folder -> name -> tensor) on all ranks and the rest on the main one into
    `partial`, then gives it its name."""

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        write_rest()
        _flush(partial)
        if folder.exists():  # final/ of a run that was made longer
            shutil.rmtree(folder)
        partial.rename(folder)
        _flush(folder.parent, deep=False)

    # After each part the ranks agree on whether it was written: none may go on alone.
    problem = _attempt(begin, ranks, ranks.is_main)
    for place, contents in tensors.items():
        problem = problem or _attempt(lambda p=place, c=contents: save_tensors(c, p), ranks)
    problem = problem or _attempt(finish, ranks, ranks.is_main)
    if problem:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in checkpoints(folder.parent)]
        raise ValueError(
            f"{folder} could not be written: {problem}. Kept: "
            f"{', '.join(kept) or 'no checkpoint'}. Free space, then go on with "
            f"--output_dir {folder.parent} --resume_from_checkpoint auto"
        )


def _attempt(write: Callable[[], None], ranks: Ranks, mine: bool = True) -> str | None:
    """Calls write() where it is `mine` to do; what went wrong on any rank, on every rank."""
    problem = None
    try:
        if mine:
            write()
    except (OSError, SafetensorError, CheckpointException) as error:
        causes = getattr(error, "failures", {0: (error,)})
        problem = "; ".join(str(cause[0]) for cause in causes.values())
    return ranks.first(problem)


def _flush(folder: Path, deep: bool = True) -> None:
    """Has the disk hold the files of `folder` and its subfolders, and their names."""
    for path in [*(folder.rglob("*") if deep else []), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old(output_dir: Path, limit: int | None) -> None:
    """All but the newest `limit` and the best, and what a kill left behind."""
    found = checkpoints(output_dir)
    scores = {folder: score for folder in found if (score := _held_out(folder)) is not None}
    best = max(reversed(scores), key=scores.get, default=None)  # the newest of equals
    for old in found[:-limit] if limit else []:
        if old != best:  # renamed first: half a checkpoint must not look like one
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
    for left in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(left)


def _held_out(folder: Path) -> float | None:
    try:
        return json.loads((folder / "state.json").read_text()).get("held_out")
    except (ValueError, AttributeError):  # damaged: it cannot be the best
        return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path.parent for path in output_dir.glob("checkpoint-*/state.json")]
    found = [folder for folder in found if folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Renames checkpoints after `step` to abandoned-..., when a run goes on from an earlier one.

    Returns their new names. They belong to a branch that is left; nothing is deleted.
    """
    moved = []
    for folder in checkpoints(output_dir):
        if int(folder.name[11:]) > step:
            aside = folder.with_name(f"abandoned-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            moved.append(folder.rename(aside))
    return moved


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; "auto" is the newest of the run, or None
    where the run was stopped before its first.

    Raises ValueError where it cannot be resumed from, or not into this output_dir.
    """
    if wanted == "auto":
        found = checkpoints(output_dir)
        if not found and (output_dir / "final").exists():
            raise ValueError(f"{output_dir} holds a run that has ended and kept no checkpoint")
        return found[-1] if found else None
    folder = Path(wanted)
    if (folder / "config.yaml").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is a run folder: name one of its checkpoints, or "
            f"--output_dir {wanted} --resume_from_checkpoint auto"
        )
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no state.json there, so it is not a checkpoint of "
            f"a run; to start from its weights use --model_name_or_path"
        )
    if folder.resolve().parent != output_dir.resolve() and (output_dir / "metrics.jsonl").exists():
        raise ValueError(f"--output_dir {output_dir} holds another run than {folder} belongs to")
    return folder


# A resumed run may change these; any other flag would make it a different run.
HARMLESS = {
    "output_dir", "run_name", "report_to", "max_steps", "num_train_epochs", "tokens_per_pack",
    "gradient_checkpointing", "attn_implementation", "logging_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "eval_steps", "dry_run",
    "shard_size", "reshard_after_forward", "cpu_offload", "timeout", "max_bad_steps", "kl_alarm",
}  # fmt: skip


def read_state(folder: Path, config: dict, steps: int, facts: dict) -> dict:
    """The counters in a checkpoint.

    steps: of the whole run as it is asked for now. facts: what else must not have changed, by name.
    Raises ValueError where the file is damaged; where `config` (flag -> value) differs from the
    run's in a flag that is not harmless, naming each; where the run would become shorter; and where
    a fact differs.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        saved = state["config"]
        needed = {"step", "steps", "num_tokens", "stream", "watch", "before", "after"}
        if missing := (needed | {"skipped", "bad_steps", "updates", "facts"}) - state.keys():
            raise KeyError(*missing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'}: not a readable run state: {error!r}") from error
    changed = [
        f"--{name}: {saved.get(name)!r} then, {value!r} now"
        for name, value in config.items()
        if name not in HARMLESS and saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} belongs to a run with other settings:\n  " + "\n  ".join(changed)
        )
    ended = (folder.parent / "final").exists()  # else what is left is to write it
    if state["step"] > steps or (state["step"] == steps and ended):
        raise ValueError(f"the run is at its end, step {state['step']}: raise --max_steps to go on")
    if steps < state["steps"]:
        raise ValueError(
            f"{folder} belongs to a run of {state['steps']} steps, now {steps} are asked for: "
            f"--max_steps may go up, not down"
        )
    for name, value in facts.items():
        if state["facts"].get(name) != value:
            raise ValueError(f"{folder}: {name} is not what the run began with")
    return state


def resume(folder: Path, optimizer: Optimizer, updates: int) -> None:
    """Loads a checkpoint's weights and moments into the optimizer and its model, whatever the
    number of ranks that wrote it.

    updates: how many the checkpoint's state counts. Raises ValueError where a file is missing or
    damaged.
    """
    missing = optimizer.resume(updates, weight_files(folder), weight_files(folder / "optimizer"))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} the first")
