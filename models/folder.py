"""What a model's folder lacks, with the way out: other tools leave folders that only look complete.

Not here: reading what is there (families.py, load.py, processor.py).
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from data import files
from data.errors import UserError, shown

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

# Everything besides the weights that makes a folder a checkpoint for transformers.
PROCESSOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)

# A pickle is read by code that it may name itself, so transformers has to do it.
CONVERT = (
    'python -c "from transformers import AutoModelForImageTextToText as M; '
    "M.from_pretrained({old!r}, dtype='auto').save_pretrained({new!r})\""
)


def no_config(folder: Path) -> str:
    """Why a folder without config.json is no model's, and which one is meant."""
    if (folder / ADAPTER).is_file():
        return (
            "an adapter, not a model: name its base as --model_name_or_path and this folder as "
            "--adapter_name_or_path, with --use_peft"
        )
    if inner := _inner_model(folder):
        return f"no config.json here, but in folders below: give {inner}"
    if list(folder.glob("*.gguf")):
        return "GGUF weights, which cannot be trained: take the checkpoint in safetensors"
    return "no config.json: this is not a model folder"


def _inner_model(folder: Path) -> Path | None:
    """The model folder that is meant by one that holds several: final/, else the newest."""

    def number(path: Path) -> tuple[int, float]:
        digits = re.findall(r"\d+\Z", path.name)
        return (int(digits[0]) if digits else -1, path.stat().st_mtime)

    found = [path.parent for path in folder.glob("*/config.json")]
    found = found or [path.parent for path in folder.glob("snapshots/*/config.json")]
    finals = [path for path in found if path.name == "final"]
    return max(finals or found, key=number, default=None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model, or else an adapter. Without an index, shards that
    are all there are read too. Raises UserError if a file is absent."""
    single, index = folder / "model.safetensors", folder / INDEX
    if os.path.lexists(single):  # whoever opens it says what else it is than a file
        return [single]
    if os.path.lexists(index):
        names = _named_in(index)
    else:
        found = [re.match(r"(model-\d+-of-(\d+))\.safetensors\Z", p.name) for p in _tensors(folder)]
        totals = {int(match[2]) for match in found if match}
        if len(totals) != 1:
            adapter = folder / "adapter_model.safetensors"
            if adapter.is_file():
                return [adapter]
            raise UserError(f"{folder}: {no_weights(folder)}")
        (total,) = totals
        if total > files.MB:
            raise UserError(f"{folder}: no {INDEX}, and file names that count {total} parts")
        width = len(next(match[2] for match in found if match))
        numbers = [str(number).zfill(width) for number in range(1, total + 1)]
        names = [f"model-{number}-of-{numbers[-1]}.safetensors" for number in numbers]
    absent = [name for name in names if not os.path.lexists(folder / name)]
    if absent:
        todo = "copy them from where the model came from"
        raise UserError(
            f"{folder}: {len(absent)} of {len(names)} shards are missing: {absent[0]}; {todo}"
        )
    return [folder / name for name in names]


def _tensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


def _named_in(index: Path) -> list[str]:
    """The files that a weight index names. Raises UserError."""
    raw = files.read_json(index)
    table = raw.get("weight_map") if isinstance(raw, dict) else None
    values = list(table.values()) if isinstance(table, dict) else []
    names = {value for value in values if isinstance(value, str)}
    if not values or len(names) < len(set(map(repr, values))):
        raise UserError(f"{index}: not a weight index: weight_map is {shown(table)}")
    if odd := [name for name in names if "/" in name or files.impossible(index.parent / name)]:
        raise UserError(f"{index}: not a weight index: {shown(odd[0])} is no file of its folder")
    return sorted(names)


def no_weights(folder: Path) -> str:
    """Why a folder has no weights that are read, and what makes them readable."""
    found = f"neither model.safetensors nor {INDEX}"
    if (folder / "zero_to_fp32.py").is_file() or list(folder.glob("global_step*")):
        return (
            f"{found}: DeepSpeed left each rank's part of the weights. In that folder run\n"
            f"  python zero_to_fp32.py . . --safe_serialization"
        )
    if list(folder.glob("*fsdp*")) or list(folder.glob("*.distcp")):
        return (
            f"{found}: FSDP left each rank's part of the weights. Join them by\n"
            f"  accelerate merge-weights PARTS {folder}"
        )
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        new = f"{folder}-safetensors"
        return (
            f"{found} ({pickles[0]} is a pickle and is not read). Convert it, then copy the other "
            f"files of {folder} beside it:\n  {CONVERT.format(old=str(folder), new=new)}"
        )
    if inner := _inner_model(folder):
        return f"{found}, but there is a model in {inner}"
    others = [path.name for path in _tensors(folder)] + [p.name for p in folder.glob("*.gguf")]
    return found + (f" ({shown(others[0])} has another name or kind)" if others else "")


def check_processor_files(folder: Path) -> None:
    """Raises UserError naming the files of the tokenizer and the image processor that are missing
    in a model's folder, and where they come from; or one that is no regular file."""

    def absent(*names: str) -> list[str]:
        return [name for name in names if not os.path.lexists(folder / name)]

    for name in PROCESSOR_FILES:
        if os.path.lexists(folder / name):
            files.regular(folder / name, files.IMAGE)
    missing = absent("tokenizer_config.json")
    if absent("tokenizer.json") and absent("vocab.json", "merges.txt"):
        missing.append("tokenizer.json")
    if absent("preprocessor_config.json") and not _has_image_processor(folder):
        missing.append("preprocessor_config.json")
    if missing:
        raise UserError(
            f"{folder}: no {' and no '.join(missing)}. A trainer that saves only the model leaves "
            f"them out; they do not change in training, so copy them from the folder of the model "
            f"that it began with{_base(folder)}, with chat_template.json or chat_template.jinja"
        )


def _has_image_processor(folder: Path) -> bool:
    """Whether transformers 5's one file for all processors has the image processor."""
    path = folder / "processor_config.json"
    raw = files.read_json(path) if path.exists() else {}
    return isinstance(raw, dict) and raw.get("image_processor") is not None


def _base(folder: Path) -> str:
    """ " (its name)" if config.json says which model this one began with."""
    name = files.read_json(folder / "config.json").get("_name_or_path")
    return f" ({name[:200]})" if isinstance(name, str) and name else ""


def refuse_not_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Raises UserError if a number of a weight is NaN or infinite."""
    if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
        raise UserError(
            f"{folder}: the weight {name} holds NaN or infinity: the model has diverged, or the "
            f"file is damaged; take an earlier checkpoint, or copy it again"
        )
