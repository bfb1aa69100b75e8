"""Data sets in the ViRFT schema: columns image (or images), problem, solution.

They come as a folder written by `save_to_disk`, a parquet file or folder, a JSON or JSONL file (or
a folder of them) with image paths relative to it, a hub name, or an embedded demo ("demo:flowers").
Reading finds what is wrong with the set as a whole; data/check.py looks at every row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path

from data import flowers, scenes
from data.images import content_key, open_image

IMAGE_COLUMNS = ("image", "images", "image_path", "image_paths")
DEMOS = {"demo:flowers": flowers.rows, "demo:scenes": scenes.rows}
DEMO_ROWS = {"train": 480, "test": 180}


@dataclass(frozen=True)
class Example:
    """Row `index` of a split: images as file paths or encoded bytes, and the two texts as found.

    Whether they are texts and images at all is for data/check.py to say.
    """

    index: int
    images: tuple
    problem: str
    solution: str

    @property
    def where(self) -> str:
        """The image file, for messages."""
        paths = [str(image) for image in self.images if isinstance(image, Path)]
        return ", ".join(paths) or "image stored in the data set"

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A content hash per image: equal where the image is."""
        return tuple(content_key(image) for image in self.images)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the first image in pixels, upright. Raises as `open_image`."""
        return open_image(self.images[0]).size


class Rows(Sequence):
    """Rows read lazily from a list of dicts or a `datasets.Dataset`; `folder` roots image paths."""

    def __init__(self, rows, folder: Path):
        self.rows, self.folder = rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        row = self.rows[index]
        if not isinstance(row, dict):  # a row of an arrow table
            row = row.to_pylist()[0]
        images = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), ())
        images = images if isinstance(images, list | tuple) else (images,)
        images = tuple(self._image(image) for image in images)
        return Example(index, images, row.get("problem"), row.get("solution"))

    def _image(self, image):
        """A path or bytes, where it is one; anything else as it is, for data/check.py to name."""
        if isinstance(image, dict) and ("bytes" in image or "path" in image):
            image = image.get("bytes") or image.get("path")
        return self.folder / image if isinstance(image, str) else image


def load(dataset_name: str, split: str) -> Sequence[Example]:
    """The rows of a split.

    Raises ValueError where the data set or the split does not exist (naming the splits there are),
    a file cannot be read, a column is missing, or there is no row.
    """
    if dataset_name in DEMOS:
        rows = _demo(dataset_name, split)
    else:
        path = Path(dataset_name).expanduser()
        rows = _read_local(path, split) if _is_local(path) else _read_hub(dataset_name, split)
    where = f"{dataset_name}, split {split!r}"
    if not len(rows):
        raise ValueError(f"{where}: no rows")
    columns = getattr(rows.rows, "column_names", None)
    columns = columns or sorted({key for row in rows.rows for key in row})
    missing = [name for name in ("problem", "solution") if name not in columns]
    if not set(IMAGE_COLUMNS) & set(columns):
        missing.insert(0, "image")
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(columns)}. "
            f"A ViRFT data set has image (or images), problem and solution"
        )
    return rows


def fingerprint(examples: Sequence[Example]) -> str:
    """The same hexadecimal number for the same problems, solutions and images in the same order."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(repr((example.problem, example.solution, example.keys)).encode())
    return digest.hexdigest()


def splits(dataset_name: str) -> list[str]:
    """Names of the splits. Raises ValueError where the data set does not exist."""
    if dataset_name in DEMOS:
        return list(DEMO_ROWS)
    path = Path(dataset_name).expanduser()
    if _is_local(path):
        return list(_local_files(path))
    import datasets

    return _on_hub(dataset_name, lambda: datasets.get_dataset_split_names(dataset_name))


def _is_local(path: Path) -> bool:
    """Whether a name means a file or folder and no data set on the hub, which is "owner/name".

    Raises ValueError for what can only be a path and does not exist.
    """
    if path.exists():
        return True
    if path.is_absolute() or len(path.parts) > 2 or path.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"--dataset_name {path}: no such file or folder")
    return False


@cache
def _demo(dataset_name: str, split: str) -> Rows:
    _need_split(dataset_name, split, list(DEMO_ROWS))
    rows = DEMOS[dataset_name](split, DEMO_ROWS[split])
    for row in rows:
        buffer = BytesIO()
        row["image"].save(buffer, "PNG")
        row["image"] = {"bytes": buffer.getvalue()}
    return Rows(rows, Path())


def _need_split(dataset_name, split: str, found: list[str]) -> None:
    if split not in found:
        raise ValueError(
            f"{dataset_name}: no split {split!r}; there is {', '.join(found) or 'none'} "
            f"(--dataset_train_split and --dataset_test_split choose)"
        )


def _local_files(path: Path) -> dict[str, list[Path]]:
    """Split name -> what holds it. Raises ValueError where `path` is no data set."""
    if path.is_file():
        if path.suffix not in (".json", ".jsonl", ".parquet"):
            raise ValueError(f"{path}: not a .json, .jsonl or .parquet file")
        return {"train": [path]}
    if (path / "dataset_dict.json").is_file():
        content = _read_json(path / "dataset_dict.json")
        if not isinstance(content, dict) or "splits" not in content:
            raise ValueError(f"{path / 'dataset_dict.json'}: names no splits; save the set again")
        names = content["splits"]
        return {name: [path / name] for name in names}
    if (path / "state.json").is_file():
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.json")) + sorted(path.glob("*.jsonl")):
        found.setdefault(file.stem, []).append(file)
    parquet = sorted(path.glob("*.parquet")) + sorted(path.glob("*/*.parquet"))
    for file in parquet:
        # train.parquet, train-00000-of-00002.parquet, data/train-....parquet, train/....parquet
        own = file.parent != path and file.parent.name != "data"
        name = file.parent.name if own else file.stem.split("-")[0]
        found.setdefault(name, []).append(file)
    if parquet and not {"train", "test", "validation"} & found.keys():
        return {"train": parquet}
    if not found:
        raise ValueError(
            f"{path}: no data set here: neither a save_to_disk folder nor parquet, JSON or JSONL"
        )
    return found


def _read_local(path: Path, split: str) -> Rows:
    files = _local_files(path)
    _need_split(path, split, list(files))
    first = files[split][0]
    if len(files[split]) > 1 and any(file.suffix != ".parquet" for file in files[split]):
        names = ", ".join(file.name for file in files[split])
        raise ValueError(f"{path}, split {split!r}: several files hold it: {names}; keep one")
    if first.suffix in (".json", ".jsonl"):
        return Rows(_read_rows(first), first.parent)
    import datasets

    try:
        if first.is_dir():
            table = datasets.load_from_disk(str(first))
        else:
            from pyarrow.parquet import read_metadata

            # `datasets` fails on a file without rows
            filled = [str(file) for file in files[split] if read_metadata(file).num_rows]
            if not filled:
                return Rows([], path)
            table = datasets.Dataset.from_parquet(filled)
    except Exception as error:  # arrow and datasets raise many kinds for a damaged file
        raise ValueError(f"{first}: cannot be read: {type(error).__name__}: {error}") from error
    return Rows(_undecoded(table), path)


def _read_hub(dataset_name: str, split: str) -> Rows:
    import datasets

    table = _on_hub(dataset_name, lambda: datasets.load_dataset(dataset_name, split=split))
    return Rows(_undecoded(table), Path())


def _on_hub(dataset_name: str, ask):
    try:
        return ask()
    except Exception as error:  # the hub's client has a dozen kinds; the user needs one message
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"--dataset_name {dataset_name}: neither a local path nor a data set that the hub "
            f"delivers ({type(error).__name__}: {reason[0]})"
        ) from error


def _undecoded(table):
    """The table with images left as stored, bytes or path: they are decoded, and judged, by us.

    (Casting to Image(decode=False) would do too, but writes a list column anew beside the data.)
    """
    return table.with_format("arrow")


def _read_rows(file: Path) -> list[dict]:
    """The objects of a JSON list or of JSONL lines. Raises ValueError naming the row or line."""
    if file.suffix == ".json":
        rows = _read_json(file)
        if not isinstance(rows, list):
            raise ValueError(f"{file}: holds no list of rows")
        numbered = [(f"row {i}", row) for i, row in enumerate(rows)]
    else:
        numbered = []
        for number, line in enumerate(_read_text(file).split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
    for name, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{file}, {name}: {str(row)[:80]!r} is not an object with columns")
    return [row for _, row in numbered]


def _read_json(file: Path):
    try:
        return json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
