"""Saving a run so that it can go on, and taking it up again.

checkpoint-N/ is a Hugging Face checkpoint in float32 (the master weights), loadable by transformers
as it is, plus the optimizer's moments (optimizer.safetensors) and the run's counters (state.json).
Random numbers need no saving: every sample's follow from (seed, step, prompt, sample). Nothing is
pickled. A checkpoint is written under a temporary name and renamed when whole.
"""

import json
import os
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.dist import Optimizer
from models.load import published_name, read_weights, save_model
from models.qwen_vl import QwenVL


def save_checkpoint(
    output_dir: Path,
    source: Path,
    model: QwenVL,
    optimizer: Optimizer,
    state: dict,
    save_total_limit: int | None = None,
) -> Path:
    """Writes output_dir/checkpoint-{state["step"]} and removes all but the newest few.

    state: JSON-able counters, "step" among them. source: the folder whose tokenizer and processor
    files are copied. Call it on one rank. Returns the folder.
    """
    folder = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model({**dict(model.named_parameters()), **optimizer.masters}, model, partial, source)
    moments = {name: value.cpu().contiguous() for name, value in optimizer.state().items()}
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if save_total_limit:
        for old in checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(old)
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


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


def find_checkpoint(wanted: str, output_dir: Path) -> Path:
    """The folder that `--resume_from_checkpoint` names; "auto" is the newest of the run.

    Raises ValueError where there is none or it cannot be resumed from.
    """
    if wanted == "auto":
        found = checkpoints(output_dir)
        if not found:
            raise ValueError(
                f"--resume_from_checkpoint auto: no checkpoint-N in {output_dir}; "
                f"leave the flag out to start afresh"
            )
        return found[-1]
    folder = Path(wanted)
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no state.json there, so it is not a checkpoint of "
            f"a run; to start from its weights use --model_name_or_path"
        )
    return folder


# A resumed run may change these; any other flag would make it a different run.
HARMLESS = {
    "output_dir", "run_name", "report_to", "max_steps", "num_train_epochs", "tokens_per_pack",
    "gradient_checkpointing", "attn_implementation", "logging_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "eval_steps", "eval_samples", "dry_run",
}  # fmt: skip


def read_state(folder: Path, config: dict) -> dict:
    """The counters in a checkpoint.

    Raises ValueError where the file is damaged, and where `config` (flag -> value) differs from the
    run's in a flag that is not harmless, naming each.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        assert isinstance(state["step"], int)
        assert state.keys() >= {"num_tokens", "stream", "before", "watch"}
        saved = state["config"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, AssertionError) as error:
        raise ValueError(f"{folder / 'state.json'}: not a readable run state: {error}") from error
    changed = [
        f"--{name}: {saved.get(name)!r} then, {value!r} now"
        for name, value in config.items()
        if name not in HARMLESS and saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} belongs to a run with other settings:\n  " + "\n  ".join(changed)
        )
    return state


def resume(folder: Path, optimizer: Optimizer) -> None:
    """Loads a checkpoint's weights and moments into the optimizer and its model.

    Raises ValueError where a file is missing or damaged.
    """
    masters = {published_name(name): tensor for name, tensor in read_weights(folder)}
    try:
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / 'optimizer.safetensors'}: cannot be read: {error}") from error
    missing = [name for name in optimizer.masters if name not in masters]
    stepped = any(name.startswith("step.") for name in moments)
    missing += [n for n in optimizer.masters if stepped and f"exp_avg_sq.{n}" not in moments]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} the first")
    optimizer.load(masters, moments)


def save_final(output_dir: Path, source: Path, model: QwenVL, optimizer: Optimizer) -> Path:
    """Writes output_dir/final, the trained checkpoint in the dtype that was trained with."""
    folder, partial = output_dir / "final", output_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    weights = {**dict(model.named_parameters()), **optimizer.masters}
    save_model(weights, model, partial, source, model.dtype)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
