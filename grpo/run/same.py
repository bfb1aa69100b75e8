"""What each rank reads for itself must be the same on all: flags, code, model, data, task.

Nodes are started by hand and read their own disks, and ranks that differ train to the end without
an error, to a model that belongs to no settings. Paths may differ; what lies there may not. Not
here: which checkpoint is resumed, which the main rank decides (resume.py).
"""

import hashlib
import importlib.metadata
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import grpo
from data.errors import UserError
from data.files import MB
from data.rows import fingerprint
from grpo.engine.ranks import Ranks
from models.folder import PROCESSOR_FILES, weight_files
from models.lora import SETTINGS, WEIGHTS

# Flags that name places: what is read there is compared in their stead.
PLACES = ("model_name_or_path", "dataset_name", "aliases", "adapter_name_or_path", "output_dir")
PLACES += ("run_name", "report_to")  # the main rank alone has a use for them
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "safetensors")
ROOMS = ("grpo", "models", "rewards", "data")  # folders of our own sources
SHOWN = 12  # differences in a message
WHOLE = 64 * MB  # a file up to this size is compared whole
PATIENCE = 20.0  # seconds in which a folder shows up on another node's network disk
PIECES, PIECE = 256, 4096  # of a larger one, and bytes of each


def check_same(ranks: Ranks, what: str, read: Callable[[], dict[str, object]]) -> None:
    """Compares a table, name -> value, among ranks; every rank must call it.

    what: a name of this comparison, for the store. read: makes the table; of one rank it is not
    called. Raises the same UserError on every rank if
    values differ: each by its name, with the ranks that have it.
    """
    if ranks.world == 1:
        return
    with ranks.working():
        mine = {name: _short(value) for name, value in read().items()}
    tables = ranks.share(what, {"host": socket.gethostname(), "table": mine})
    names = dict.fromkeys(name for other in tables for name in other["table"])
    lines = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, other in enumerate(tables):
            holders.setdefault(other["table"].get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            hosts = [other["host"] for other in tables]
            parts = [f"{value} on {_ranks(held, hosts)}" for value, held in holders.items()]
            lines.append(f"  {name}: {', '.join(parts)}")
    if lines:
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise UserError(
            "the ranks of this run are not the same:\n"
            + "\n".join(lines[:SHOWN] + more)
            + "\nStart each node with the same command, code, packages, model and data; paths may "
            "differ, what lies there may not"
        )


def _short(value) -> str:
    """A value for a message; a long one by its beginning and a digest."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:72]}... ({_digest(text.encode())})"


def _ranks(held: Sequence[int], hosts: Sequence[str]) -> str:
    """rank 1 (node-b); ranks 8 to 15 (node-b)."""
    first, last = held[0], held[-1]
    if len(held) == 1:
        text = f"rank {first}"
    elif last - first == len(held) - 1:
        text = f"ranks {first} to {last}"
    else:
        text = f"ranks {', '.join(map(str, held[:8]))}{', ...' if len(held) > 8 else ''}"
    return f"{text} ({', '.join(sorted({hosts[rank] for rank in held})[:4])})"


def check_seen(folder: Path, ranks: Ranks) -> None:
    """Raises UserError on every rank if one does not see the run folder, which the main rank has
    opened: all of them write its checkpoints."""
    if ranks.world == 1:
        return
    ranks.wait()
    until = time.monotonic() + PATIENCE
    while not (seen := (folder / "config.yaml").is_file()) and time.monotonic() < until:
        time.sleep(0.5)
    table = ranks.gather([(seen, socket.gethostname(), str(folder))])
    blind = [f"rank {r} on {host}" for r, (seen, host, _) in enumerate(table) if not seen]
    if blind:
        raise UserError(
            f"--output_dir {table[0][2]} is not there for {', '.join(blind[:8])}: it must be on "
            f"storage that all ranks see, as all write its checkpoints"
        )


def own_settings(config, settings: Path | None) -> dict[str, object]:
    """Flags, versions and the project's own sources, before anything slow.

    settings: the YAML file that was read, None without one.
    """
    table: dict[str, object] = {}
    wanted = config.resume_from_checkpoint
    if wanted is not None:  # a rank that does not see the run's folder has other flags, too
        seen = settings is not None and settings.name == "config.yaml"
        table["config.yaml of the run to resume"] = "read" if seen else "not read"
    flags = asdict(config)
    flags["resume_from_checkpoint"] = wanted if wanted in (None, "auto") else "a folder"
    table |= {f"--{name}": value for name, value in flags.items() if name not in PLACES}
    table |= {name: _version(name) for name in PACKAGES}
    table["torch"] = torch.__version__  # with its build: +cpu, +cu128
    root = Path(grpo.__file__).resolve().parent.parent
    sources = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    sources = [path for path in sources if not path.name.startswith(".")]  # an editor's locks
    sources.append(Path(sys.modules[type(config).__module__].__file__))  # the script
    for path in sources:
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        table[str(name)] = _digest(path.read_bytes())
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # pillow has forks of other names
        return "not found"


def data_facts(data, task, dtype: torch.dtype, eval_only: bool) -> dict[str, str]:
    """What must be the same on all ranks, and when the run is resumed, by name."""
    trained = {} if eval_only else {"the data set": fingerprint(data.rows)}
    if len(data.sets) > 1:
        sizes = {name: f"{len(rows)} + {len(held)}" for name, (rows, held) in data.sets.items()}
        trained["the data sets"] = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return trained | {
        "the held-out rows": fingerprint(data.eval_rows),
        "what is paid for": repr(task),
        "the precision": str(dtype),
    }


def model_files(config, folder: Path) -> dict[str, str]:
    """A digest of each file of the model and of the adapter that are read.

    Of a large one: its size and pieces over all its length, which no other training leaves alike;
    reading it all would double the time that loading takes.
    """
    files = [folder / name for name in ("config.json", *PROCESSOR_FILES)]
    files = {f"{path.name} of the model": path for path in files if path.is_file()}
    files |= {f"{path.name} of the model": path for path in weight_files(folder)}
    if config.use_peft and config.adapter_name_or_path:
        adapter = Path(config.adapter_name_or_path)
        files |= {f"{name} of the adapter": adapter / name for name in (SETTINGS, WEIGHTS)}
    return {name: _sampled(path) for name, path in files.items()}


def _sampled(path: Path) -> str:
    """A digest of a file, or of a large one's size and PIECES pieces of it, evenly spaced."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        whole = size <= WHOLE
        digest = hashlib.sha256(str(size).encode())
        for start in range(0, size, WHOLE if whole else size // PIECES):
            file.seek(start)
            digest.update(file.read(WHOLE if whole else PIECE))
    return digest.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
