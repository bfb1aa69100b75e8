"""Reads a ViRFT data set: rows of image(s), problem and solution.

A data set is a `save_to_disk` folder, a file or folder of parquet, a file or folder of JSON or
JSONL with image paths relative to it, or a name on the Hugging Face hub. What makes it unreadable
as a whole is raised here; a row that is wrong in itself is kept as it is, for data/check.py to
report with all the others. Nothing is decoded here, and rows of arrow data stay on disk until they
are indexed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from data.images import content_key

IMAGE_COLUMNS = ("image", "images", "image_path", "image_paths")  # the first one present is read
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
FORMS = (
    "a data set is a save_to_disk folder, a file or folder of .parquet, .json or .jsonl, "
    "or a name on the Hugging Face hub"
)


@dataclass(frozen=True)
class Example:
    """One row. After check_rows found no fault, every field is of the type given here; before, a
    field holds whatever the row held.

    index: row number in its split, from 0. images: paths, or the bytes of image files.
    """

    index: int
    images: tuple[bytes | Path, ...]
    problem: str
    solution: str

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Content keys (sha256) of the images: equal images have equal keys.

        Raises ValueError where an image file is missing or cannot be read.
        """
        return tuple(content_key(image) for image in self.images)

    @property
    def where(self) -> str:
        """The row's image files by path; `row N (image bytes)` for images inside the data set."""
        return ", ".join(map(self.image_name, range(len(self.images)))) or f"row {self.index}"

    def image_name(self, place: int) -> str:
        """The path of one image, or `row N (image bytes)` where it has none."""
        image = self.images[place]
        if isinstance(image, Path):
            return str(image)
        which = "image" if len(self.images) == 1 else f"image {place}"
        return f"row {self.index} ({which}{' bytes' if isinstance(image, bytes) else ''})"


def load(dataset_name: str, split: str) -> Sequence[Example]:
    """The rows of one split, to be indexed and counted.

    `dataset_name`: a path or a hub name (see the module's docstring). A file has only the split
    "train". Where a row has several image columns, the first of image, images, image_path and
    image_paths is read.

    Raises ValueError where the data set or the split is missing or unreadable, a column is missing,
    or there are no rows.
    """
    found = _local_splits(dataset_name)
    if found is None:
        return _load_from_hub(dataset_name, split)
    if split not in found:
        raise _no_split(dataset_name, split, list(found))
    return found[split]()


def splits(dataset_name: str) -> list[str]:
    """The names of the splits of a data set.

    Raises ValueError where the data set is missing, or is no data set.
    """
    found = _local_splits(dataset_name)
    return _hub_splits(dataset_name) if found is None else list(found)


# ---- which splits lie where ---------------------------------------------------------------------


def _local_splits(dataset_name: str) -> dict[str, Callable[[], Sequence[Example]]] | None:
    """How to load each split of a local data set, by name; None for a hub name."""
    path = Path(dataset_name).expanduser()
    if path.is_file():
        if path.suffix in (".json", ".jsonl"):
            return {"train": lambda: _load_json(path)}
        if path.suffix == ".parquet":
            return {"train": lambda: _load_parquet([path], path.parent)}
        raise ValueError(f"{path}: not a data set; {FORMS}")
    if not path.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", dataset_name) and not path.suffix.startswith(
            (".json", ".parquet")
        ):
            return None
        raise ValueError(f"{path}: no such file or folder; correct --dataset_name")

    if (path / "dataset_dict.json").is_file():
        names = _read_json(path / "dataset_dict.json").get("splits", [])
        return {name: lambda name=name: _load_arrow(path / name) for name in names}
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return {"train": lambda: _load_arrow(path)}
    if parquet := _parquet_splits(path):
        return {
            name: lambda files=files: _load_parquet(files, path) for name, files in parquet.items()
        }
    files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if not files:
        raise ValueError(f"{path}: no data set in this folder; {FORMS}")
    twice = {file.stem for file in files if files.count(file.with_suffix(".jsonl"))} & {
        file.stem for file in files if file.suffix == ".json"
    }
    if twice:
        name = min(twice)
        raise ValueError(f"{path}: both {name}.json and {name}.jsonl are here; remove one of them")
    return {file.stem: lambda file=file: _load_json(file) for file in files}


def _parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split: [data/]{split}[-*].parquet and {split}/*.parquet.

    Where none of the names so found is usual for a split, all files are "train".
    """
    found: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]):
        named_by_file = file.parent in (folder, folder / "data")
        name = file.stem.split("-")[0] if named_by_file else file.parent.name
        found.setdefault(name, []).append(file)
    if found and not found.keys() & set(SPLIT_NAMES):
        return {"train": sorted(chain.from_iterable(found.values()))}
    return found


def _hub_splits(name: str) -> list[str]:
    import datasets

    try:
        return datasets.get_dataset_split_names(name)
    except _load_errors() as error:
        raise _not_on_hub(name, error) from error


def _no_split(dataset_name: str, split: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{dataset_name}: no split {split!r}; there are: {', '.join(names) or 'none'}. "
        "Choose with --dataset_train_split and --dataset_test_split"
    )


def _not_on_hub(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name}: neither a local path nor a data set reachable on the Hugging Face hub "
        f"({_reason(error)}); correct --dataset_name, or check the network"
    )


# ---- JSON and JSONL -----------------------------------------------------------------------------


def _load_json(file: Path) -> list[Example]:
    rows = []
    for index, (place, row) in enumerate(_json_rows(file)):
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}: row {index}{place} is {_kind(row)}, not an object with image, problem "
                "and solution"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: zero rows; nothing to train or evaluate on")
    _need_columns(str(file), list(dict.fromkeys(chain.from_iterable(rows))))
    return [_example(index, row, file.parent) for index, row in enumerate(rows)]


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a file, with ", line N" where it stands on a line of its own."""
    text = _read_text(file)
    if text.lstrip().startswith("["):
        yield from (("", row) for row in _parse(file, text, 1))
        return
    # A list of objects, or an object per line; the latter often ends in .json as well.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f", line {number},", _parse(file, line, number)


def _parse(file: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{file}: not JSON at line {line}, column {error.colno}: {error.msg}; the file must "
            "hold one list of objects, or one object per line"
        ) from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text at byte {error.start}; convert it") from error


def _read_json(file: Path) -> dict:
    content = _parse(file, _read_text(file), 1)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: {_kind(content)}, not an object; save the data set again")
    return content


# ---- arrow and parquet --------------------------------------------------------------------------


class _ArrowRows(Sequence):
    """Rows of a `datasets.Dataset`, each read from disk when it is indexed."""

    def __init__(self, table, where: str, folder: Path):
        names = _need_columns(where, table.column_names)
        if not len(table):
            raise ValueError(f"{where}: zero rows; nothing to train or evaluate on")
        # As arrow, an image column gives its stored bytes or path. (Casting it to
        # Image(decode=False) would too, but rewrites a column of image lists on disk.)
        self._table, self._folder = table.select_columns(names).with_format("arrow"), folder

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return _example(index, self._table[index].to_pylist()[0], self._folder)


def _load_arrow(folder: Path) -> Sequence[Example]:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except _load_errors() as error:
        raise ValueError(
            f"{folder}: not a folder that save_to_disk wrote whole ({_reason(error)}); "
            "save the data set again"
        ) from error
    return _ArrowRows(table, str(folder), folder)


def _load_parquet(files: list[Path], folder: Path) -> Sequence[Example]:
    import datasets
    from pyarrow import parquet

    where, filled = str(files[0]) if len(files) == 1 else str(folder), []
    for file in files:
        try:
            rows = parquet.read_metadata(file).num_rows
        except _load_errors() as error:
            raise ValueError(
                f"{file}: not a whole parquet file ({_reason(error)}); restore the file"
            ) from error
        if rows:  # `datasets` fails on a file without any
            filled.append(str(file))
    if not filled:
        raise ValueError(f"{where}: zero rows; nothing to train or evaluate on")
    try:
        table = datasets.Dataset.from_parquet(filled)
    except _load_errors() as error:
        raise ValueError(
            f"{where}: cannot be read as one table ({_reason(error)}); all parquet files of a "
            "split must be whole and have the same columns"
        ) from error
    return _ArrowRows(table, where, folder)


def _load_from_hub(name: str, split: str) -> Sequence[Example]:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except _load_errors() as error:
        # `datasets` says in a ValueError that it knows no such split.
        if isinstance(error, ValueError) and split not in (names := _hub_splits(name)):
            raise _no_split(name, split, names) from error
        raise _not_on_hub(name, error) from error
    return _ArrowRows(table, f"{name}, split {split}", Path())


def _load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` and pyarrow raise for data that is missing, unreachable or damaged."""
    import datasets

    return (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError)


def _reason(error: Exception) -> str:
    """The first line of what went wrong at the bottom: `datasets` wraps its errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- one row ------------------------------------------------------------------------------------


def _need_columns(where: str, columns: list[str]) -> list[str]:
    """The columns to read. Raises ValueError where one that is needed is missing."""
    image_columns = [name for name in IMAGE_COLUMNS if name in columns]
    missing = [name for name in ("problem", "solution") if name not in columns]
    if not image_columns:
        missing.insert(0, "|".join(IMAGE_COLUMNS))
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; the columns are: {', '.join(columns)}. "
            "A ViRFT data set has image (or images, image_path, image_paths), problem and solution"
        )
    return [image_columns[0], "problem", "solution"]


def _example(index: int, row: dict, folder: Path) -> Example:
    column = next((name for name in IMAGE_COLUMNS if name in row), None)
    images = row.get(column)
    if not isinstance(images, list):
        images = [] if images is None else [images]
    images = tuple(_image(image, folder) for image in images)
    return Example(index, images, row.get("problem"), row.get("solution"))


def _image(value: Any, folder: Path) -> Any:
    """Bytes or a path; what is neither is returned as it is, for check_rows to report."""
    if isinstance(value, dict):  # how `datasets` stores an image
        value = value.get("bytes") or value.get("path") or value.get("bytes")
    return folder / value if isinstance(value, str) and value else value


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
