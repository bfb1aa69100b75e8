"""Checkpoints in and out: safetensors with published names, one tensor at a time.

Reading is strict: a missing, unexpected or misshapen weight is an error that names it. Nothing is
read by pickle. A rank reads the rows that it will hold.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import QwenVLConfig, read_config
from models.qwen_vl import QwenVL

INDEX = "model.safetensors.index.json"
MOST_BYTES = 2_000_000_000  # of one weight file: saving holds a rank's part of one, twice

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


def empty_model(folder: Path, implementation: str = "sdpa", vision: bool = True) -> QwenVL:
    """The model of a checkpoint folder on the meta device: shapes, no memory.

    vision false leaves the vision tower out, for prompts that carry their images' features.
    Raises ValueError as `check_weights`.
    """
    with torch.device("meta"):
        model = QwenVL(read_config(folder), implementation)
    check_weights(folder, model)
    if not vision:
        model.visual = None
    return model


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str, implementation: str = "sdpa"
) -> QwenVL:
    """The model of a checkpoint folder, its weights cast to `dtype` on `device`.

    Reads model.safetensors or the shards of its index; the published names
    (`visual.*`, `model.layers.*`) and the newer (`model.visual.*`, `model.language_model.*`).
    Weights of any floating dtype. Raises ValueError as `check_weights`, and for unreadable files.
    """
    folder = Path(folder)
    model = empty_model(folder, implementation).to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    wanted = {name: (0, len(parameter)) for name, parameter in parameters.items()}
    for name, tensor in load_slices(weight_files(folder), wanted):
        parameters[name].data.copy_(tensor)
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


def load_slices(
    files: list[Path], wanted: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, rows) of the wanted tensors, one at a time: `count` rows from row `first` on of each.

    wanted: published name -> (first, count). What the files lack is not yielded. Raises ValueError
    where a file is damaged.
    """
    for path in files:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118
                if (place := wanted.get(published_name(key))) is None:
                    continue
                first, count = place
                if count:  # a rank beyond the last row has none
                    yield published_name(key), file.get_slice(key)[first : first + count]
                else:
                    yield published_name(key), torch.empty(0, *file.get_slice(key).get_shape()[1:])


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


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes tensors, sharded or not, as model.safetensors, or as numbered files of up to
    MOST_BYTES and their index. Every rank must call it.

    torch.distributed.checkpoint writes each rank's part, then joins the parts.
    """
    from torch.distributed import checkpoint, is_initialized

    file, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.itemsize
        if size and size + bytes_ > MOST_BYTES:
            file, size = file + 1, 0
        files[name], size = file, size + bytes_
    writer = checkpoint.HuggingFaceStorageWriter(
        str(folder), files, save_distributed=True, enable_consolidation=True
    )
    with warnings.catch_warnings():  # that one process saves alone
        warnings.simplefilter("ignore", UserWarning)
        checkpoint.save(tensors, storage_writer=writer, no_dist=not is_initialized())
    if not is_initialized() or torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "sharded")
        if file == 1:
            (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
            (folder / INDEX).unlink()


def save_model(
    weights: dict[str, Tensor],
    model: QwenVL,
    folder: Path,
    source: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a checkpoint that transformers loads as it is, in the published layout, from one
    process.

    weights: name -> tensor under the published names. source: see `save_config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: weight.detach().to(dtype) for name, weight in weights.items()}, folder)
    save_config(model, folder, source, dtype)


def save_config(model: QwenVL, folder: Path, source: Path, dtype: torch.dtype) -> None:
    """Writes config.json and copies the tokenizer's and the processors' files from `source`, byte
    for byte. One rank calls it."""
    config = model.config.to_dict(str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in PROCESSOR_FILES:
        if Path(source) != folder and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
