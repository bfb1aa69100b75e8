"""Checkpoints in and out: safetensors with published names, one tensor at a time.

Reading is strict: a missing, unexpected or misshapen weight is an error that names it. Nothing is
read by pickle. Loading in several ranks at once reads the files once per rank.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import QwenVLConfig, read_config
from models.qwen_vl import QwenVL

INDEX = "model.safetensors.index.json"

# Everything beside the weights that makes a folder a checkpoint for transformers.
PROCESSOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
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


def find_folder(model_name_or_path: str) -> Path:
    """The checkpoint's folder: a local one, or the hub's snapshot in the local cache.

    Raises ValueError where it is neither.
    """
    folder = Path(model_name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or model_name_or_path.startswith((".", "/", "~")):
        raise ValueError(f"--model_name_or_path {model_name_or_path}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = [*PROCESSOR_FILES, "config.json", "*.safetensors", INDEX]
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=patterns))
    except Exception as error:  # the hub's client has a dozen kinds; the user needs one message
        raise ValueError(
            f"--model_name_or_path {model_name_or_path}: neither a local folder nor a model that "
            f"the hub delivers ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str, implementation: str = "sdpa"
) -> QwenVL:
    """The model of a checkpoint folder, its weights cast to `dtype` on `device`.

    Reads model.safetensors or the shards of its index; the published names
    (`visual.*`, `model.layers.*`) and the newer (`model.visual.*`, `model.language_model.*`).
    Weights of any floating dtype. Raises ValueError as `check_weights`, and for unreadable files.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = QwenVL(config, implementation)
    check_weights(folder, model)
    model = model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, tensor in read_weights(folder):
        if (parameter := parameters.get(published_name(name))) is not None:
            parameter.data.copy_(tensor)
    return model


def check_checkpoint(folder: Path) -> tuple[QwenVLConfig, int, int]:
    """The config of a checkpoint folder, its number of parameters, and how many of them are the
    vision tower's; reads headers only.

    Raises ValueError where config and weights do not agree, as `load_model` would.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = QwenVL(config)
    check_weights(folder, model)
    return config, *(sum(p.numel() for p in m.parameters()) for m in (model, model.visual))


def check_weights(folder: Path, model: QwenVL) -> None:
    """Compares names, shapes and dtypes in the files' headers with the model's; reads no weight.

    Raises ValueError naming every weight that is missing, unexpected, misshapen or not floating
    point (the first ten of them).
    """
    missing = dict(model.named_parameters())
    faults = []
    for path in weight_files(folder):
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                name, header = published_name(key), file.get_slice(key)
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    continue  # some tools write the tied head a second time
                found = tuple(header.get_shape())
                parameter = missing.pop(name, None)
                if parameter is None:
                    faults.append(f"{name}: unexpected")
                elif found != tuple(parameter.shape):
                    wanted = tuple(parameter.shape)
                    faults.append(f"{name}: shape {found}, config.json needs {wanted}")
                elif not header.get_dtype().startswith(("F", "BF")):
                    faults.append(f"{name}: {header.get_dtype()} is not a floating dtype")
    faults += [f"{name}: missing" for name in missing]
    if faults:
        shown = "\n  ".join(faults[:10])
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"{folder}: weights and config.json do not agree:\n  {shown}{more}")


def published_name(name: str) -> str:
    """A weight's name in the published layout: `model.visual.x` -> `visual.x` and so on."""
    for newer, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(newer):
            return published + name.removeprefix(newer)
    return name


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in `folder`, read one at a time.

    Raises ValueError where files are missing or damaged.
    """
    for path in weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


@contextmanager
def _open(path: Path):
    """A safetensors file; ValueError names it where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint. Raises ValueError where one is absent."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle and is not read)" if pickled else ""
        raise ValueError(f"{folder}: neither model.safetensors nor {INDEX}{hint}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a weight index: {error}") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder}: {len(absent)} of {len(names)} shards are missing: {absent[0]}")
    return [folder / name for name in names]


def save_model(
    weights: dict[str, Tensor],
    model: QwenVL,
    folder: Path,
    source: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a checkpoint that transformers loads as it is, in the published layout.

    weights: name -> tensor under the published names (the model's own, or its float32 masters).
    The tokenizer's and the processors' files are copied from `source` byte for byte.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: w.detach().to("cpu", dtype).contiguous() for k, w in weights.items()}
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it private, unlike all other files
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = model.config.to_dict(str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in PROCESSOR_FILES:
        if Path(source) != folder and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
