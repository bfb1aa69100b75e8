"""Class folders of published benchmarks in their own layouts: links to the images, nothing copied.

python -m data.published SOURCE TARGET [--shots K] [--seed S]

TARGET/train and TARGET/test then hold a folder for each class, which train_cls.py reads. Where a
benchmark parts training from validation images, both are in train. Not here: downloading, and other
splits than the benchmark's own.
"""

import argparse
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.errors import UserError
from data.files import SETTINGS, SHOWN, fault, read_text, regular
from data.folders import SLASH, is_photograph
from data.wording import check_names

Listed = tuple[str, str, str]  # an image: "train" or "test", its class, its path below SOURCE
Splits = dict[str, dict[str, list[Path]]]  # "train" and "test" -> class folder -> sorted images


class Layout(NamedTuple):
    """How a benchmark is known: a folder, one of the lists, the form of that list's first line."""

    name: str
    folder: str
    lists: Sequence[str]
    images: Callable[[Path], Iterable[Listed]]
    form: str = ""


def published(path: Path) -> str | None:
    """Name of the benchmark that a folder holds in its own layout, complete or not; else None."""
    return getattr(_find(path)[0], "name", None)


def _find(path: Path) -> tuple[Layout | None, Path]:
    """The layout of a folder, or of data/ in it (FGVC-Aircraft's archive), and where it is."""
    for base in (path, path / "data"):
        for layout in LAYOUTS:
            lists = [base / name for name in layout.lists if os.path.isfile(base / name)]
            if os.path.isdir(base / layout.folder) and any(_begins(f, layout.form) for f in lists):
                return layout, base
    return None, path


def _begins(path: Path, form: str) -> bool:
    try:
        return not form or re.match(form, _lines(path)[0]) is not None
    except (UserError, IndexError):  # no text, or an empty one
        return False


def convert(source: Path, target: Path, shots: int | None = None, seed: int = 0) -> Splits:
    """Makes class folders of links in target, a new or empty folder; nothing in source changes.

    shots: how many training images of each class to keep, chosen by seed and class; None keeps all.
    Returns what is linked. Raises UserError, before anything is written, if source has none of
    LAYOUTS or not all that its lists name; OSError if target cannot be written.
    """
    if shots is not None and shots < 1:
        raise UserError(f"--shots {shots}: at least 1")
    layout, base = _find(source)
    if layout is None:
        known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise UserError(f"{source}: no folder that holds one of these, unpacked: {known}")
    target = Path(os.path.realpath(target))
    if Path(os.path.realpath(source)) in target.parents:
        raise UserError(f"{target}: lies in {source}, where nothing is changed; choose another")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there and not an empty folder; give a new one")
    base = Path(os.path.realpath(base))
    splits = _check(base, layout.images(base))
    for folder, files in splits["train"].items() if shots else ():
        kept = random.Random(f"{seed}/{folder}").sample(files, min(shots, len(files)))
        splits["train"][folder] = sorted(kept)
    _write(splits, target)
    return splits


def _check(source: Path, listed: Iterable[Listed]) -> Splits:
    """The images by split and class. Raises UserError for what is not there or cannot be right."""
    splits = {"train": defaultdict(dict), "test": defaultdict(dict)}  # folder -> file name -> path
    split_of: dict[PurePosixPath, str] = {}
    for split, label, name in listed:
        file = PurePosixPath(name)
        sound = name.isprintable() and ".." not in file.parts and not file.name.startswith(".")
        if not sound or not is_photograph(file):
            raise UserError(f"{source}: lists {name[:SHOWN]!r}, no path of a photograph inside it")
        folder = label.strip().replace("/", SLASH)
        if folder[:1] in ("", ".") or not folder.isprintable():
            raise UserError(f"{source}: {label[:SHOWN]!r}, the class of {file}, names no folder")
        if file in split_of:
            raise UserError(f"{source}: lists {file} twice, in {split_of[file]} and in {split}")
        if file.name in splits[split][folder]:
            raise UserError(f"{source}: two images of {label} in {split} are called {file.name}")
        splits[split][folder][file.name] = source / file
        split_of[file] = split
    for split, by_class in splits.items():
        if not by_class:
            raise UserError(f"{source}: its lists hold no image for {split}")
        splits[split] = {folder: sorted(by_class[folder].values()) for folder in sorted(by_class)}
    check_names(sorted({*splits["train"], *splits["test"]}), f"{source}: the classes")
    missing = [source / file for file in split_of if fault(source / file)]
    if missing:
        count = f"{len(missing):,} of {len(split_of):,} listed images cannot be read"
        raise UserError(f"{missing[0]}: {fault(missing[0])} ({count}); unpack all images")
    return splits


def _write(splits: Splits, target: Path) -> None:
    """The links. A split gets its name when all are there, so that nobody trains on half of one."""
    partial_names = {split: target / f".{split}" for split in splits}
    try:
        for split, by_class in splits.items():
            for name, files in by_class.items():
                folder = partial_names[split] / name
                folder.mkdir(parents=True)
                for file in files:
                    link(file, folder / file.name)
        for split, folder in partial_names.items():
            folder.rename(target / split)
    except BaseException:
        for folder in partial_names.values():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def link(file: Path, link: Path) -> None:
    """A relative link, so that both folders may move together; a copy where there are no links."""
    try:
        link.symlink_to(os.path.relpath(file, link.parent))
    except OSError:
        if os.path.lexists(link):  # two names that are one on this disk: a copy would follow it
            raise
        shutil.copyfile(file, link)


def _lines(path: Path) -> list[str]:
    """The lines of a list, stripped, without comments and empty ones."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _table(path: Path) -> dict[str, str]:
    """First word of a line -> the rest."""
    rows: dict[str, str] = {}
    for line in _lines(path):
        key, *rest = line.split(maxsplit=1)
        if not rest or key in rows:
            raise UserError(f"{path}: {line[:SHOWN]!r} is not a new name and its value")
        rows[key] = rest[0]
    return rows


def _mat(path: Path, name: str, field: str = "", kind: type = str) -> list:
    """Texts (kind str) or whole numbers (int): an array of a MATLAB file, or its structs' field."""
    try:
        import numpy
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: read by scipy, which is not there: pip install scipy") from error
    regular(path, SETTINGS)
    try:
        values = numpy.atleast_1d(loadmat(path, squeeze_me=True)[name])
        values = values[field] if field else values
        if any(kind(value) != value for value in values):
            raise ValueError(f"not {kind.__name__}")
        return [kind(value) for value in values]
    except Exception as error:  # a dozen kinds, of scipy for a damaged file, of numpy for another
        what = f"{name} {field}".strip()
        raise UserError(f"{path}: no MATLAB file with {what}: {str(error)[:SHOWN]}") from error


def _pick(values: Sequence[str | int], number: int, where: Path):
    """The value with a number, counted from 1."""
    if not 1 <= number <= len(values):
        raise UserError(f"{where}: holds the number {number}, and there are {len(values):,}")
    return values[number - 1]


def _flowers(source: Path) -> Iterator[Listed]:
    of_labels, of_parts = source / "imagelabels.mat", source / "setid.mat"
    labels = _mat(of_labels, "labels", kind=int)
    for part, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        for number in _mat(of_parts, part, kind=int):
            label = _pick(FLOWERS, _pick(labels, number, of_parts), of_labels)
            yield split, label, f"jpg/image_{number:05d}.jpg"


def _pets(source: Path) -> Iterator[Listed]:
    for part, split in (("trainval", "train"), ("test", "test")):
        for image in _table(source / f"annotations/{part}.txt"):
            yield split, image.rpartition("_")[0], f"images/{image}.jpg"


def _aircraft(source: Path) -> Iterator[Listed]:
    whole = os.path.isfile(source / "images_variant_trainval.txt")
    for part in ("trainval", "test") if whole else ("train", "val", "test"):
        for image, label in _table(source / f"images_variant_{part}.txt").items():
            yield "test" if part == "test" else "train", label, f"images/{image}.jpg"


def _cars(source: Path) -> Iterator[Listed]:
    labels = _mat(source / "devkit/cars_meta.mat", "class_names")
    test = "cars_test_annos_withlabels.mat"  # devkit/cars_test_annos.mat has no classes
    test = f"devkit/{test}" if os.path.isfile(source / "devkit" / test) else test
    for split, name in (("train", "devkit/cars_train_annos.mat"), ("test", test)):
        numbers = _mat(source / name, "annotations", "class", kind=int)
        files = _mat(source / name, "annotations", "fname")
        for number, file in zip(numbers, files, strict=True):
            yield split, _pick(labels, number, source / name), f"cars_{split}/{file}"


def _birds(source: Path) -> Iterator[Listed]:
    names = ("images", "image_class_labels", "train_test_split", "classes")
    files, numbers, training, labels = (_table(source / f"{name}.txt") for name in names)
    for image, file in files.items():
        try:
            split, label = {"1": "train", "0": "test"}[training[image]], labels[numbers[image]]
        except KeyError as error:
            raise UserError(f"{source}: image {image} ({file}): its lists lack {error}") from error
        yield split, re.sub(r"^\d+\.", "", label), f"images/{file}"


def _dogs(source: Path) -> Iterator[Listed]:
    for split in ("train", "test"):
        for file in _mat(source / f"{split}_list.mat", "file_list"):
            yield split, file.split("/")[0].partition("-")[2], f"Images/{file}"


def _food(source: Path) -> Iterator[Listed]:
    for split in ("train", "test"):
        for image in _lines(source / f"meta/{split}.txt"):
            yield split, image.partition("/")[0], f"images/{image}.jpg"


PET = r"\S+_\d+ \d+ [12] \d+$"  # image, class, cat or dog, breed
LAYOUTS = (
    Layout("Oxford Flowers102", "jpg", ("imagelabels.mat", "setid.mat"), _flowers),
    Layout(
        "Oxford-IIIT Pets", "images", ("annotations/list.txt", "annotations/test.txt"), _pets, PET
    ),
    Layout("FGVC-Aircraft", "images", ("images_variant_test.txt",), _aircraft),
    Layout("Stanford Cars196", "devkit", ("devkit/cars_meta.mat",), _cars),
    Layout("Stanford Cars196", "cars_test", ("cars_train/00001.jpg",), _cars),
    Layout("CUB-200-2011", "images", ("image_class_labels.txt",), _birds),
    Layout("Stanford Dogs", "Images", ("train_list.mat", "test_list.mat"), _dogs),
    Layout("Food-101", "images", ("meta/train.txt", "meta/test.txt"), _food, r"[a-z_]+/\d+$"),
)
# In the order of the labels, of which imagelabels.mat has the numbers alone.
FLOWERS = """pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english
marigold, tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's
foot, king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily,
balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion,
petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange
dahlia, pink-yellow dahlia, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania,
azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium,
frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen,
watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia,
mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily"""
FLOWERS = FLOWERS.replace("\n", " ").split(", ")


def main() -> None:
    parser = argparse.ArgumentParser("python -m data.published", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the benchmark's folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new or empty folder")
    parser.add_argument("--shots", type=int, metavar="K", help="training images of each class")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses them; default 0")
    arguments = parser.parse_args()
    try:
        splits = convert(**vars(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    train, test = (sum(map(len, folders.values())) for folders in splits.values())
    name, classes = published(arguments.source), len({*splits["train"], *splits["test"]})
    print(f"{name}: {classes} classes, {train:,} training and {test:,} test images")
    shots = arguments.shots or 0
    if fewer := [name for name, files in splits["train"].items() if len(files) < shots]:
        print(f"note: fewer than {shots} training images: {', '.join(fewer)}")


if __name__ == "__main__":
    main()
