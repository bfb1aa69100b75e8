"""A checkpoint knows its bytes: the SHA-256 of each of its tensor files, kept in state.json.

SHA-256 and not a CRC, as it also tells the files of another step or seed apart for certain, and the
processors have instructions for it: with a thread a file, disks are slower. Not here: what else a
checkpoint must be to be resumed (resume.py).
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import UserError
from data.files import TABLE, read_json
from data.rows import PAUSES
from models.folder import INDEX, weight_files
from models.load import load_slices

FILES, OWN = "files", "sha256"  # keys of state.json beside those of `State`
MODEL, MOMENTS = "", "optimizer"  # subfolders with tensors


def sealed(content: dict, folder: Path) -> str:
    """The text of state.json: `content`, the hashes of the folder's tensor files, and one of all
    that."""
    names = [str(path.relative_to(folder)) for path in _tensor_files(folder)]
    content = content | {FILES: dict(zip(names, hashes(folder, names), strict=True))}
    return json.dumps(content | {OWN: _hash_of(content)}, indent=2) + "\n"


def read_sealed(folder: Path) -> dict:
    """What state.json holds; without FILES if the checkpoint was made before there were hashes.

    Raises UserError if state.json is missing, damaged or of another step, or if a file is missing.
    """
    where = folder / "state.json"
    content = read_json(where, TABLE)
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a readable run state")
    if FILES in content or OWN in content:
        own = content.pop(OWN, None)
        if own != _hash_of(content):
            raise UserError(f"{where}: not what was saved: its checksum differs")
        present = {str(path.relative_to(folder)) for path in _tensor_files(folder)}
        if missing := sorted(content[FILES].keys() - present):
            raise UserError(f"{folder / missing[0]} is missing")
        if more := sorted(present - content[FILES].keys()):  # it might be read in another's place
            raise UserError(f"{folder / more[0]} is not of this checkpoint")
    else:
        for part in (MODEL, MOMENTS):  # opens each file, which finds one that was cut short
            list(load_slices(weight_files(folder / part), {}))
    step, named = content.get("step"), folder.name.removeprefix("checkpoint-")
    if named.isdigit() and step != int(named):
        raise UserError(f"{where}: of step {step!r}, not {named}")
    return content


def hashes(folder: Path, names: Iterable[str]) -> list[str]:
    """The SHA-256 of each file, in hexadecimal; "" of one that cannot be read in three tries."""

    def hash_of(name: str) -> str:
        for pause in (*PAUSES, None):
            try:
                with (folder / name).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                if pause is not None:
                    time.sleep(pause)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing frees the GIL
        return list(threads.map(hash_of, names))


def _tensor_files(folder: Path) -> list[Path]:
    """What a resumed run reads: weights or adapters, moments, their indexes."""
    found = []
    for part in (folder, folder / MOMENTS):
        found += [*sorted(part.glob("*.safetensors")), *part.glob(INDEX)]
    return [path for path in found if not path.name.startswith(".")]  # macOS leaves ._ files


def _hash_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
