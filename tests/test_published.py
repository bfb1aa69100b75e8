"""Stand-ins of published benchmarks in their own layouts become class folders that are read."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data import published as module
from data.load import read_splits
from data.published import FLOWERS, convert, main, published
from data.wording import Wording

ROOT = Path(__file__).resolve().parent.parent


def draw(root: Path, *names: str) -> None:
    """A drawing of its own in each file."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        color = tuple(random.Random(name).randbytes(3))
        Image.new("RGB", (8, 8), color).save(root / name)


def write(root: Path, name: str, *lines: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n")


def cells(*texts: str) -> np.ndarray:
    return np.array(texts, dtype=object)


# Each builds a benchmark's layout and returns split -> class as people write it -> its images.


def flowers(root: Path) -> dict:
    labels = [1, 1, 74, 74, 1, 74, 1]
    draw(root, *(f"jpg/image_{number:05d}.jpg" for number in range(1, 8)))
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    parts = {"trnid": [1, 3], "valid": [4, 2], "tstid": [7, 6, 5]}
    savemat(root / "setid.mat", {k: np.array([v], np.uint16) for k, v in parts.items()})
    images = {k: [f"jpg/image_0000{i}.jpg" for i in v] for k, v in enumerate(([1, 2], [3, 4]))}
    return {
        "train": {"pink primrose": images[0], "rose": images[1]},
        "test": {
            "pink primrose": ["jpg/image_00005.jpg", "jpg/image_00007.jpg"],
            "rose": ["jpg/image_00006.jpg"],
        },
    }


def pets(root: Path) -> dict:
    training = ["Abyssinian_100 1 1 1", "american_bulldog_2 2 2 1", "american_bulldog_10 2 2 1"]
    test = ["Abyssinian_3 1 1 1", "american_bulldog_4 2 2 1"]
    draw(root, *(f"images/{line.split()[0]}.jpg" for line in training + test))
    draw(root, "images/Abyssinian_999.jpg", "annotations/trimaps/Abyssinian_100.png")
    write(root, "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID", *training, *test)
    write(root, "annotations/trainval.txt", *training)
    write(root, "annotations/test.txt", *test)
    bulldogs = ["images/american_bulldog_10.jpg", "images/american_bulldog_2.jpg"]
    return {
        "train": {"Abyssinian": ["images/Abyssinian_100.jpg"], "american bulldog": bulldogs},
        "test": {
            "Abyssinian": ["images/Abyssinian_3.jpg"],
            "american bulldog": ["images/american_bulldog_4.jpg"],
        },
    }


def aircraft(root: Path, folder: str = "data/") -> dict:
    lists = {
        "train": ["0034309 Boeing 707-320", "0000001 F/A-18"],
        "val": ["0000002 F/A-18"],
        "test": ["0000003 Boeing 707-320", "0000004 F/A-18"],
    }
    lists["trainval"] = lists["train"] + lists["val"]
    for part, lines in lists.items():
        write(root, f"{folder}images_variant_{part}.txt", *lines)
        draw(root, *(f"{folder}images/{line.split()[0]}.jpg" for line in lines))
    boeings, hornets, *test = (
        [f"{folder}images/{number}.jpg" for number in numbers.split()]
        for numbers in ("0034309", "0000001 0000002", "0000003", "0000004")
    )
    return {
        "train": {"Boeing 707-320": boeings, "F/A-18": hornets},
        "test": {"Boeing 707-320": test[0], "F/A-18": test[1]},
    }


def aircraft_inside(root: Path) -> dict:
    """data/ itself, with the two parts of the training images and no list of both."""
    expected = aircraft(root, folder="")
    (root / "images_variant_trainval.txt").unlink()
    return expected


AUDI, RAM = "Audi TT RS Coupe 2012", "Ram C/V Cargo Van Minivan 2012"


def cars(root: Path) -> dict:
    def annotations(classes: list[int], *fields: str) -> dict:
        names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *fields)
        table = np.zeros((1, len(classes)), dtype=[(name, object) for name in names])
        for i, number in enumerate(classes):
            values = {"class": number, "fname": f"{i + 1:05d}.jpg"}
            table[0, i] = tuple(values.get(name, 1) for name in names)
        return {"annotations": table}

    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": cells(AUDI, RAM)})
    savemat(root / "devkit/cars_train_annos.mat", annotations([2, 1, 2], "class", "fname"))
    savemat(root / "devkit/cars_test_annos.mat", annotations([2, 1], "fname"))
    savemat(root / "cars_test_annos_withlabels.mat", annotations([2, 1], "class", "fname"))
    draw(root, *(f"cars_train/{i:05d}.jpg" for i in (1, 2, 3)))
    draw(root, *(f"cars_test/{i:05d}.jpg" for i in (1, 2)))
    return {
        "train": {AUDI: ["cars_train/00002.jpg"], RAM: [f"cars_train/0000{i}.jpg" for i in (1, 3)]},
        "test": {AUDI: ["cars_test/00002.jpg"], RAM: ["cars_test/00001.jpg"]},
    }


def cars_labels_inside(root: Path) -> dict:
    expected, name = cars(root), "cars_test_annos_withlabels.mat"
    (root / name).rename(root / "devkit" / name)
    return expected


def birds(root: Path) -> dict:
    files = [f"001.Laysan_Albatross/a_{i}.jpg" for i in (1, 2, 3)]
    files += ["002.Ovenbird/b_4.jpg", "002.Ovenbird/b_5.jpg"]
    draw(root, *(f"images/{file}" for file in files))
    write(root, "classes.txt", "1 001.Laysan_Albatross", "2 002.Ovenbird")
    write(root, "images.txt", *(f"{i} {file}" for i, file in enumerate(files, 1)))
    write(root, "image_class_labels.txt", "1 1", "2 1", "3 1", "4 2", "5 2")
    write(root, "train_test_split.txt", "1 0", "2 1", "3 1", "4 1", "5 0")
    write(root, "parts/parts.txt", "1 back")
    images = [f"images/{file}" for file in files]
    return {
        "train": {"Laysan Albatross": images[1:3], "Ovenbird": images[3:4]},
        "test": {"Laysan Albatross": images[:1], "Ovenbird": images[4:]},
    }


def dogs(root: Path) -> dict:
    folders = ["n02085620-Chihuahua", "n02095314-wire-haired_fox_terrier"]
    files = [f"{folder}/{folder[:9]}_{i}.jpg" for folder in folders for i in range(3)]
    draw(root, *(f"Images/{file}" for file in files))
    lists = {"file": files, "train": files[:2] + files[4:], "test": files[2:4]}
    for name, part in lists.items():
        savemat(root / f"{name}_list.mat", {"file_list": cells(*part)[:, None]})
    images = [f"Images/{file}" for file in files]
    return {
        "train": {"Chihuahua": images[:2], "wire-haired fox terrier": images[4:]},
        "test": {"Chihuahua": images[2:3], "wire-haired fox terrier": images[3:4]},
    }


def food(root: Path) -> dict:
    lists = {
        "train": ["apple_pie/1", "waffles/2", "waffles/30"],
        "test": ["apple_pie/4", "waffles/5"],
    }
    for part, images in lists.items():
        write(root, f"meta/{part}.txt", *images)
        draw(root, *(f"images/{image}.jpg" for image in images))
    write(root, "meta/classes.txt", "apple_pie", "waffles")
    waffles = ["images/waffles/2.jpg", "images/waffles/30.jpg"]
    return {
        "train": {"apple pie": ["images/apple_pie/1.jpg"], "waffles": waffles},
        "test": {"apple pie": ["images/apple_pie/4.jpg"], "waffles": ["images/waffles/5.jpg"]},
    }


NAMES = {
    flowers: "Oxford Flowers102",
    pets: "Oxford-IIIT Pets",
    aircraft: "FGVC-Aircraft",
    aircraft_inside: "FGVC-Aircraft",
    cars: "Stanford Cars196",
    cars_labels_inside: "Stanford Cars196",
    birds: "CUB-200-2011",
    dogs: "Stanford Dogs",
    food: "Food-101",
}


def read(folder: Path, source: Path) -> dict:
    """What train_cls.py reads, as a stand-in returns it."""
    found = {"train": {}, "test": {}}
    splits = read_splits(str(folder), "train", None, None, Wording())
    for of_class, rows in zip(found.values(), splits, strict=True):
        for row in rows:
            image = Path(os.path.realpath(row.images[0])).relative_to(source)
            of_class.setdefault(row.solution, []).append(str(image))
    return found


def tree(root: Path) -> dict:
    """Every file and folder below one, with its time and bytes."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [root, *root.rglob("*")]
    }


def command(monkeypatch, capsys, *argv) -> tuple[int, str]:
    """Exit code and text of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["published", *map(str, argv)])
    try:
        main()
        code = 0
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize("build", NAMES, ids=lambda build: build.__name__)
def test_class_folders_of_each_benchmark(build, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "source", tmp_path / "made" / "target"
    expected = build(source)
    before = tree(source)
    code, text = command(monkeypatch, capsys, source, target)
    train, test = (sum(map(len, of_class.values())) for of_class in expected.values())
    assert (code, text) == (
        0,
        f"{NAMES[build]}: 2 classes, {train} training and {test} test images\n",
    )
    assert read(target, source) == expected
    assert all(path.is_symlink() for path in target.rglob("*.jpg"))
    assert tree(source) == before


@pytest.mark.parametrize("build", NAMES, ids=lambda build: build.__name__)
def test_a_benchmark_is_known_without_scipy_and_without_all_of_its_files(
    build, tmp_path, monkeypatch
):
    build(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert published(tmp_path) == NAMES[build]
    kept = {
        flowers: ("jpg", "imagelabels.mat"),
        pets: ("images", "annotations/list.txt"),
        aircraft: ("data/images", "data/images_variant_test.txt"),
        aircraft_inside: ("images", "images_variant_test.txt"),
        cars: ("cars_train", "cars_test"),
        cars_labels_inside: ("devkit",),
        birds: ("images", "image_class_labels.txt"),
        dogs: ("Images", "test_list.mat"),
        food: ("images", "meta/train.txt"),
    }[build]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        if not str(path.relative_to(tmp_path)).startswith(kept):
            path.unlink()
    assert published(tmp_path) == NAMES[build]


OTHERS = {  # what looks like a benchmark at first sight
    "class folders": ["jpg/image_00001.jpg", "images/image_00001.jpg", "devkit/1.jpg"],
    "splits with a prefix": ["cars_train/bmw/00001.jpg", "cars_test/bmw/00001.jpg"],
    "splits": ["train/Images/1.jpg", "test/Images/2.jpg"],
    "YOLO": ["images/train/1.jpg", "labels/train/1.txt", "classes.txt", "images.txt"],
    "VOC": ["JPEGImages/1.jpg", "Annotations/1.xml", "ImageSets/Main/train.txt"],
    "VOC in lower case": ["images/a_1.jpg", "annotations/xmls/a_1.xml", "annotations/test.txt"],
    "COCO": ["images/1.jpg", "annotations/instances_train.json"],
    "lists of paths": ["images/cat/1.jpg", "meta/train.txt", "meta/test.txt"],
    "empty lists": ["images/cat/1.jpg", "annotations/list.txt", "meta/train.txt"],
    "lists that are no text": ["images/cat/1.jpg", "annotations/list.txt", "meta/train.txt"],
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_data_is_no_benchmark(form, tmp_path):
    content = {
        "VOC in lower case": "a_1 1\n",
        "lists of paths": "cat/1.jpg\n",
        "empty lists": "\n",
        "lists that are no text": "\xff\xfe",
    }.get(form, "1 1\n")
    for name in OTHERS[form]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="latin-1")
    assert published(tmp_path) is None
    assert published(tmp_path / OTHERS[form][0]) is None  # a file
    assert published(tmp_path / "nothing") is None


def test_shots_follow_from_the_seed_and_the_names_alone(tmp_path):
    names = [f"images/{kind}_{i}.jpg" for kind in ("Bombay", "pug", "boxer") for i in range(1, 13)]
    lines = [f"{Path(name).stem} 1 1 1" for name in names]

    def chosen(folder: str, seed: int, shots: int = 4) -> tuple[dict, dict]:
        source, target = tmp_path / folder / "pets", tmp_path / folder / f"{seed}-{shots}"
        if not source.exists():
            for name in names + ["images/Bombay_99.jpg", "images/pug_98.jpg"]:
                write(source, name, folder)  # other bytes in each folder
            order = lines if folder == "a" else lines[::-1]
            write(source, "annotations/trainval.txt", *order)
            write(source, "annotations/test.txt", "pug_98 1 1 1", "Bombay_99 1 1 1")
        convert(source, target, shots=shots, seed=seed)
        found = read(target, source)
        return found["train"], found["test"]

    train, test = chosen("a", seed=0)
    assert {name: len(files) for name, files in train.items()} == {
        "Bombay": 4,
        "boxer": 4,
        "pug": 4,
    }
    assert test == {"Bombay": ["images/Bombay_99.jpg"], "pug": ["images/pug_98.jpg"]}  # whole
    pugs = sorted(name for name in names if "pug" in name)
    assert train["pug"] == sorted(random.Random("0/pug").sample(pugs, 4))
    assert chosen("b", seed=0) == (train, test)  # whatever the order of the list, and the content
    assert chosen("a", seed=1)[0] != train
    assert sum(map(len, chosen("a", seed=0, shots=99)[0].values())) == len(names)


def test_too_few_images_for_the_shots_are_said(tmp_path, monkeypatch, capsys):
    food(tmp_path / "food")
    code, text = command(
        monkeypatch, capsys, tmp_path / "food", tmp_path / "new", "--shots", 2, "--seed", 3
    )
    assert (code, text.splitlines()[1:]) == (0, ["note: fewer than 2 training images: apple_pie"])


def delete(name: str):
    return lambda root: (root / name).unlink()


def append(name: str, *lines: str):
    return lambda root: (root / name).write_text((root / name).read_text() + "\n".join(lines))


def replace(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


def save(name: str, **arrays):
    return lambda root: savemat(root / name, arrays)


def a_pipe(root: Path) -> None:
    (root / "images/pug_1.jpg").unlink(missing_ok=True)
    os.mkfifo(root / "images/pug_1.jpg")
    append("annotations/test.txt", "pug_1 1 1 1")(root)


def twins(root: Path) -> None:
    draw(root, "Images/n1-pug/1.jpg", "Images/n2-pug/1.jpg")
    save("test_list.mat", file_list=cells("n1-pug/1.jpg", "n2-pug/1.jpg"))(root)


FAULTS = [
    (pets, delete("images/Abyssinian_3.jpg"), "images/Abyssinian_3.jpg: missing: .*1 of 5 listed"),
    (pets, a_pipe, r"pug_1.jpg: not a regular file but a pipe"),
    (pets, delete("annotations/trainval.txt"), "annotations/trainval.txt: missing"),
    (pets, replace("annotations/test.txt", b""), "no image for test"),
    (pets, replace("annotations/trainval.txt", b"\n# none\n"), "no image for train"),
    (pets, replace("annotations/test.txt", b"\xff 1 1 1"), "annotations/test.txt: not UTF-8"),
    (pets, append("annotations/test.txt", "Abyssinian_9"), "'Abyssinian_9' is not a new name and"),
    (pets, append("annotations/test.txt", "Abyssinian 1 1 1"), "'', the class of .*names no fol"),
    (
        pets,
        append("annotations/test.txt", "Abyssinian_100 1 1 1"),
        "Abyssinian_100.jpg twice, in train and in test",
    ),
    (pets, append("annotations/test.txt", "../../a_1 1 1 1"), "'images/../../a_1.jpg', no path"),
    (pets, append("annotations/test.txt", "/etc/a_1 1 1 1"), "images/etc/a_1.jpg: missing"),
    (pets, append("annotations/test.txt", "abyssinian_1 1 1 1"), "count as one name"),
    (pets, append("annotations/test.txt", ".a_1 1 1 1"), "'images/.a_1.jpg', no path"),
    (aircraft, append("data/images_variant_test.txt", "9 .."), "'..', the class of images/9.jpg"),
    (aircraft, append("data/images_variant_test.txt", "9 ../x"), "'../x', the class of images/9"),
    (flowers, replace("setid.mat", b"tiny"), "setid.mat: no MATLAB file with trnid"),
    (flowers, replace("imagelabels.mat", b""), "imagelabels.mat: no MATLAB file with labels"),
    (flowers, delete("setid.mat"), "setid.mat: missing"),
    (flowers, save("setid.mat", trnid=[1], valid=[2]), "setid.mat: no MATLAB file with tstid"),
    (flowers, save("setid.mat", trnid=[0], valid=[2], tstid=[3]), "holds the number 0, and.* 7"),
    (flowers, save("setid.mat", trnid=[1.5], valid=[2], tstid=[3]), "with trnid: not int"),
    (flowers, save("imagelabels.mat", labels=[103] * 7), "holds the number 103, and there are 102"),
    (cars, delete("devkit/cars_meta.mat"), "devkit/cars_meta.mat: missing"),
    (cars, delete("cars_test_annos_withlabels.mat"), "cars_test_annos_withlabels.mat: missing"),
    (
        cars,
        lambda root: (root / "devkit/cars_test_annos.mat").replace(
            root / "cars_test_annos_withlabels.mat"
        ),
        "cars_test_annos_withlabels.mat: no MATLAB file with annotations class",
    ),
    (birds, append("images.txt", "6 001.x/y.jpg"), r"image 6 \(001.x/y.jpg\): its lists lack '6'"),
    (birds, append("train_test_split.txt", "1 1"), "'1 1' is not a new name"),
    (birds, replace("train_test_split.txt", b"1 2\n2 1\n3 1\n4 1"), "its lists lack '2'"),
    (dogs, save("test_list.mat", file_list=[1, 2]), "test_list.mat: .*file_list: not str"),
    (dogs, save("test_list.mat", file_list=cells("/etc/passwd")), "'Images//etc/passwd', no path"),
    (dogs, twins, "two images of pug in test are called 1.jpg"),
    (food, append("meta/test.txt", "waffles/\x1b[2J"), r"waffles/\\x1b"),
]


@pytest.mark.parametrize("build, spoil, message", FAULTS, ids=[fault[2] for fault in FAULTS])
def test_what_is_wrong_is_named_and_nothing_is_written(
    build, spoil, message, tmp_path, monkeypatch, capsys
):
    build(tmp_path / "source")
    spoil(tmp_path / "source")
    code, text = command(monkeypatch, capsys, tmp_path / "source", tmp_path / "target")
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1
    assert re.search(message, text), text
    assert not (tmp_path / "target").exists()


def test_scipy_is_asked_for(tmp_path, monkeypatch, capsys):
    flowers(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    code, text = command(monkeypatch, capsys, tmp_path / "source", tmp_path / "target")
    assert code == 2 and "imagelabels.mat" in text and "pip install scipy" in text


def test_only_a_new_place_is_written_to(tmp_path, monkeypatch, capsys):
    source = tmp_path / "food"
    food(source)
    (tmp_path / "full").mkdir()
    write(tmp_path, "full/mine.txt", "mine")
    before = tree(tmp_path)
    for target, message in {
        "full": "is there and not an empty folder",
        "full/mine.txt": "is there and not an empty folder",
        "food": "is there and not an empty folder",
        "food/classes": "lies in",
        "full/../food/classes": "lies in",
    }.items():
        code, text = command(monkeypatch, capsys, source, tmp_path / target)
        assert code == 2 and message in text, target
    for wrong in ("full", "full/mine.txt", "nothing"):
        code, text = command(monkeypatch, capsys, tmp_path / wrong, tmp_path / "new")
        assert code == 2 and f"{tmp_path / wrong}: " in text and "Food-101" in text
    assert command(monkeypatch, capsys, source, tmp_path / "new", "--shots", "0")[0] == 2
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert command(monkeypatch, capsys, source, tmp_path / "empty")[0] == 0


def test_links_hold_when_both_folders_move(tmp_path):
    expected = food(tmp_path / "here" / "disk" / "food")
    (tmp_path / "here" / "disk" / "inner").mkdir()
    (tmp_path / "here" / "link").symlink_to("disk/inner")  # link/.. is not here but here/disk
    convert(tmp_path / "here" / "link" / ".." / "food", tmp_path / "here" / "made")
    (tmp_path / "here").rename(tmp_path / "there")
    assert read(tmp_path / "there" / "made", tmp_path / "there" / "disk" / "food") == expected


def test_images_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    food(tmp_path / "food")
    before = tree(tmp_path / "food")

    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    convert(tmp_path / "food", tmp_path / "made")
    made = tmp_path / "made/train/waffles/30.jpg"
    assert not made.is_symlink()
    assert made.read_bytes() == (tmp_path / "food/images/waffles/30.jpg").read_bytes()
    monkeypatch.undo()
    # A name that is taken after all is no reason to copy: the copy would follow the link.
    link = tmp_path / "link.jpg"
    link.symlink_to(tmp_path / "food/images/waffles/2.jpg")
    with pytest.raises(FileExistsError):
        module.link(tmp_path / "food/images/waffles/30.jpg", link)
    assert tree(tmp_path / "food") == before


def test_a_write_that_fails_leaves_no_half(tmp_path, monkeypatch, capsys):
    food(tmp_path / "food")
    link, calls = module.link, []

    def full(file, to):
        calls.append(to)
        if len(calls) == 5:  # in the test split
            raise OSError(28, "No space left on device", str(to))
        link(file, to)

    monkeypatch.setattr(module, "link", full)
    code, text = command(monkeypatch, capsys, tmp_path / "food", tmp_path / "made")
    assert code == 2 and "No space left on device" in text
    assert not list((tmp_path / "made").iterdir())
    monkeypatch.setattr(module, "link", link)
    assert command(monkeypatch, capsys, tmp_path / "food", tmp_path / "made")[0] == 0


def test_the_command(tmp_path):
    pets(tmp_path / "pets")
    argv = [sys.executable, "-m", "data.published", "pets", "made", "--shots", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "Oxford-IIIT Pets: 2 classes, 2 training and 2 test images\n"
    assert len(list((tmp_path / "made/train").rglob("*.jpg"))) == 2


def test_the_102_names_are_in_the_order_of_the_labels():
    assert len(set(FLOWERS)) == 102
    places = {1: "pink primrose", 32: "garden phlox", 60: "pink-yellow dahlia", 74: "rose"}
    assert {number: FLOWERS[number - 1] for number in places} == places
    assert FLOWERS[-1] == "blackberry lily"
