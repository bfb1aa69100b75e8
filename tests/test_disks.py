"""Data as it lies on disks: what labelling tools, archives and other trainers leave behind.

Each case is built here by hand, from the descriptions of the forms. docs/data.md's first table
names these cases.
"""

import json
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image

import train_cls
import train_det
from data.check import load_splits
from data.load import load
from data.splits import is_layout, split_of, splits_among
from models.processor import Processor
from tests.runs import CHECKPOINT, ROOT

DETECTION = CHECKPOINT.parent.parent / "demo_det" / "checkpoint"
W, H = 64, 48
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "width": W, "height": H} for i in range(4)]
CATEGORIES = [{"id": 1, "name": "cup"}, {"id": 2, "name": "vase"}]
BOX = "{'Position': [4, 5, 24, 29], 'Confidence': 1.0}"  # of [4, 5, 20, 24], everywhere below


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photo(path: Path, number: int = 0, size=(W, H)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 37 % 256, number // 7 * 50 % 256, 90)).save(path)


def tree(folder: Path, text: str) -> Path:
    """Makes the files that a text lists; each photograph is another, each other file is empty."""
    for number, name in enumerate(text.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            photo(path, number)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text("")
    return folder


def write(path: Path, content, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(content if isinstance(content, str) else text)
    return path


def photos(folder: Path, count: int = 4, below: str = "") -> Path:
    for i in range(count):
        photo(folder / below / f"{i}.jpg", i)
    return folder


def annotations(**changes) -> list[dict]:
    entries = [{"id": i, "image_id": i, "category_id": 1 + i % 2} for i in range(4)]
    return [e | {"bbox": [4, 5, 20, 24], "area": 480, "iscrowd": 0} | changes for e in entries]


def coco(folder: Path, images=IMAGES, boxes=None, below="", **others) -> Path:
    photos(folder, below=below)
    boxes = annotations() if boxes is None else boxes
    content = {"images": images, "annotations": boxes, "categories": CATEGORIES}
    return write(folder / "instances.json", content | others)


def without(entries: list[dict], *names: str) -> list[dict]:
    return [{k: v for k, v in entry.items() if k not in names} for entry in entries]


def named(names: list[str]) -> list[dict]:
    return [entry | {"file_name": name} for entry, name in zip(IMAGES, names, strict=True)]


def table(folder: Path, name: str, rows: list[dict], lines: bool = False) -> Path:
    photos(folder)
    return write(folder / name, rows, lines)


def rows_with(**columns) -> list[dict]:
    """Four rows; a column's value is the same for all, or a list of four."""
    values = {k: v if isinstance(v, list) and len(v) == 4 else [v] * 4 for k, v in columns.items()}
    return [{k: v[i] for k, v in values.items()} for i in range(4)]


FILES = ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
KINDS = ["cup", "vase", "cup", "vase"]
ASKED = {"image": FILES, "problem": "Which?"}


def yolo(folder: Path, images: str, labels: str, line="0 0.21875 0.354166667 0.3125 0.5") -> None:
    """Four photographs with a text file each; the box is BOX."""
    for i in range(4):
        photo(folder / images / f"{i}.jpg", i)
        write(folder / labels / f"{i}.txt", line + "\n")


def yolo_apart(folder: Path) -> Path:
    yolo(folder, "images/train", "labels/train")
    yolo(folder, "images/val", "labels/val", "1 0.5 0.5 1 1")
    write(folder / "data.yaml", "train: images/train\nval: images/val\nnames: [cup, vase]\n")
    return folder


def yolo_roboflow(folder: Path) -> Path:
    for split in ("train", "valid"):
        yolo(folder, f"{split}/images", f"{split}/labels")
    write(folder / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: {0: cup}\n")
    return folder


def yolo_beside(folder: Path) -> Path:
    yolo(folder, ".", ".")
    write(folder / "classes.txt", "cup\nvase\n")
    return folder


def voc_xml(name: str, size: str, things: str) -> str:
    return f"<annotation><filename>{name}</filename>{size}{things}</annotation>"


THING = (
    "<object><name>cup</name><difficult>0</difficult><bndbox><xmin>4</xmin><ymin>5</ymin>"
    "<xmax>24</xmax><ymax>29</ymax></bndbox><part><name>ear</name></part></object>"
)
SIZE = f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size>"


def voc(folder: Path, images="JPEGImages", xmls="Annotations", size=SIZE, thing=THING) -> Path:
    photos(folder, below=images)
    for i in range(4):
        write(folder / xmls / f"{i}.xml", voc_xml(f"{i}.jpg", size, thing))
    return folder


def voc_lists(folder: Path) -> Path:
    voc(folder / "VOC2007")
    write(folder / "VOC2007/ImageSets/Main/train.txt", "0\n1\n")
    write(folder / "VOC2007/ImageSets/Main/val.txt", "2\n")
    write(folder / "VOC2007/ImageSets/Main/cup_train.txt", "0 1\n1 -1\n")
    return folder


def metadata(folder: Path) -> Path:
    for split in ("train", "test"):
        photos(folder, below=split)
        names = [f"{name},{kind}" for name, kind in zip(FILES, ["NA", "007"] * 2, strict=True)]
        write(folder / split / "metadata.csv", "\n".join(["file_name,label", *names]))
    return folder


def csv(folder: Path, text: str, name="rows.csv") -> Path:
    photos(folder)
    return write(folder / name, text)


def parquet(folder: Path, kinds: dict | None = None, **columns) -> Path:
    """kinds: column -> what `datasets` knows of it."""
    photos(folder)
    data = {"image": [{"bytes": (folder / name).read_bytes()} for name in FILES]}
    rows = datasets.Dataset.from_dict(data | columns)
    for name, kind in (kinds or {}).items():
        rows = rows.cast_column(name, kind)
    rows.to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


CLASS_TREE = " ".join(f"{kind}/{i}.jpg" for kind in ("cup", "red_vase") for i in range(3))


def classes(folder: Path, *places: str) -> Path:
    return tree(
        folder, " ".join(f"{place}/{name}" for place in places for name in CLASS_TREE.split())
    )


CLS, DET = train_cls, train_det
FOUND, REDS, TWO = {f"<answer>[{BOX}]</answer>"}, {"cup", "red vase"}, {"cup", "vase"}
# name -> (how it is built, the script, every solution to train on, rows held out, a note or None)
READ = {
    "class folders": (lambda f: classes(f, "."), CLS, REDS, 2, "2 classes, 6"),
    "class folders in folders of splits": (
        lambda f: classes(f, "train", "val"), CLS, REDS, 6, None),
    "splits called otherwise: training_set/, cars_train/": (
        lambda f: classes(f, "cars_train", "cars_test"), CLS, REDS, 6, None),
    "training_set": (
        lambda f: classes(f, "training_set", "test_set"), CLS, REDS, 6, None),
    "class folders one level deeper": (
        lambda f: classes(f, "photos/images"), CLS, REDS, 2,
        "class folders are those in"),
    "class folders among files of a benchmark": (
        lambda f: tree(classes(f, "images"), "list.txt attributes/a.txt"), CLS, REDS, 2,
        "not used: attributes, list.txt"),
    "numbered class folders": (
        lambda f: tree(f, "001.Grey_heron/0.jpg 001.Grey_heron/1.jpg 002.Barn_owl/2.jpg"), CLS,
        {"Grey heron", "Barn owl"}, 1, "numbers before the classes' names are left out"),
    "more classes than a prompt lists": (
        lambda f: tree(f, " ".join(f"kind{i:02}/{j}.jpg" for i in range(51) for j in (0, 1))), CLS,
        {f"kind{i:02}" for i in range(51)}, 51, "does not list the classes"),
    "a class in the test split alone": (
        lambda f: tree(classes(f, "train", "test"), "test/jug/0.jpg"), CLS, REDS, 7,
        "never trained on, as test alone has them: jug"),
    "YOLO, images/train and labels/train": (
        yolo_apart, DET, FOUND, 4, "read as YOLO"),
    "YOLO, train/images and train/labels": (
        yolo_roboflow, DET, FOUND, 4, "read as YOLO"),
    "YOLO, text files beside the photographs": (
        yolo_beside, DET, FOUND, 1, "read as YOLO"),
    "YOLO, its data.yaml": (
        lambda f: yolo_apart(f) / "data.yaml", DET, FOUND, 4, "read as YOLO"),
    "YOLO polygons": (
        lambda f: (yolo_beside(f), yolo(f, ".", ".", "0 .0625 .1041667 .375 .2 .2 .6041667"))[0],
        DET, FOUND, 1, None),
    "Pascal VOC": (voc_lists, DET, FOUND, 1, "1 XML files are in none of"),
    "Pascal VOC, images/ and annotations/": (
        lambda f: voc(f, "images", "annotations", ""), DET, FOUND, 1, None),
    "Pascal VOC, XML files beside the photographs": (
        lambda f: voc(voc(f, "train", "train"), "valid", "valid"), DET, FOUND,
        4, "read as Pascal VOC"),
    "COCO": (coco, DET, FOUND, 1, "4 images, 2 categories"),
    "COCO without sizes": (
        lambda f: coco(f, without(IMAGES, "width", "height")), DET, FOUND, 1,
        None),
    "COCO with sizes as text": (
        lambda f: coco(f, [e | {"width": "64", "height": "48.0"} for e in IMAGES]), DET,
        FOUND, 1, None),
    "COCO with 1.0 for 1": (
        lambda f: coco(f, boxes=[a | {"image_id": float(a["image_id"])} for a in annotations()]),
        DET, FOUND, 1, None),
    "COCO with corners": (
        lambda f: coco(f, boxes=annotations(bbox=[30, 20, 60, 46])), DET,
        {"<answer>[{'Position': [30, 20, 60, 46], 'Confidence': 1.0}]</answer>"}, 1,
        "boxes are read as two corners"),
    "COCO with polygons alone": (
        lambda f: coco(f, boxes=annotations(bbox=[], segmentation=[[4, 5, 24, 5, 24, 29, 4, 29]])),
        DET, FOUND, 1, "4 boxes are those of their segmentations"),
    "COCO with run-length masks alone": (
        lambda f: coco(f, boxes=annotations(bbox=None, segmentation={
            "size": [H, W], "counts": [4 * H + 5] + [24, H - 24] * 19 + [24, 40 * H - 29]})),
        DET, FOUND, 1, "4 boxes are those of their segmentations"),
    'COCO with "iscrowd": "0"': (
        lambda f: coco(f, boxes=annotations(iscrowd="0")), DET, FOUND, 1, None),
    "COCO with paths of another machine": (
        lambda f: coco(f, named([f"/home/a b/{name}" for name in FILES]), below="pictures/of me"),
        DET, FOUND, 1, "4 images are found by the last part of their names"),
    "COCO with Label Studio's paths": (
        lambda f: coco(f, named([f"data/local-files/?d=shelf/{n}" for n in FILES]), below="images"),
        DET, FOUND, 1, "found by the last part"),
    "COCO with backslashes and another case": (
        lambda f: coco(f, named([f"images\\1\\{n.upper()}" for n in FILES]), below="a"), DET,
        FOUND, 1, "found by the last part"),
    "CSV with image and label": (
        lambda f: csv(f, "image;label\n0.jpg;NA\n1.jpg;007\n2.jpg;NA\n"), CLS, {"NA", "007"}, 1,
        "2 classes, 3 photographs"),
    "CSV with image, problem and solution": (
        lambda f: csv(f, 'image,problem,solution\n0.jpg,"Which, of all?",a cup\n'), CLS, {"a cup"},
        0, None),
    "CSV with a box on each line": (
        lambda f: csv(f, "filename,width,class,xmin,ymin,xmax,ymax\n0.jpg,64,cup,4,5,24,29\n"),
        DET, FOUND, 0, "boxes are two corners"),
    "a folder of photographs with metadata.csv": (
        metadata, CLS, {"NA", "007"}, 4, "the column file_name is read as image"),
    "JSON with image, problem and solution (ViRFT)": (
        lambda f: table(f, "train.json", rows_with(**ASKED, solution=KINDS)), CLS, TWO, 0, None),
    "a save_to_disk folder": (
        lambda f: (datasets.Dataset.from_dict({"image": [str(photos(f) / n) for n in FILES],
                   "problem": ["?"] * 4, "solution": KINDS}).save_to_disk(f / "s"), f / "s")[1],
        CLS, TWO, 0, None),
    "parquet with image and a ClassLabel": (
        lambda f: parquet(f, {"label": datasets.ClassLabel(names=["cup", "vase"])},
                          label=[0, 1, 0, 1]), CLS, TWO, 2, "2 classes, 4 photographs: cup, vase"),
    "parquet with image and objects": (
        lambda f: parquet(f, objects=[{"bbox": [[4, 5, 20, 24]], "category": [7]}] * 4), DET,
        FOUND, 1, "boxes are taken to be x, y, width, height"),
    "conversations: messages (LLaMA-Factory)": (
        lambda f: table(f, "rows.json", rows_with(images=[[n] for n in FILES], messages=[
            [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": k}]
            for k in KINDS])), CLS, TWO, 0, None),
    "conversations: from and value (VLM-R1)": (
        lambda f: table(f, "rows.jsonl", rows_with(image=FILES, conversations=[
            [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": k}]
            for k in KINDS]), True), CLS, TWO, 0, None),
    "JSONL with image and label": (
        lambda f: table(f, "rows.jsonl", rows_with(image=FILES, label=KINDS), True), CLS,
        TWO, 2, "2 classes"),
    "JSONL with image and objects": (
        lambda f: table(f, "rows.jsonl", rows_with(
            image=FILES, objects={"bbox": [[4, 5, 20, 24]], "category": ["cup"]}), True), DET,
        FOUND, 1, "1 categories: cup"),
    "parquet with labels that are numbers": (
        lambda f: parquet(f, label=[0, 1, 0, 1]), CLS, {"0", "1"}, 2, "numbers for names"),
    "parquet with problem and answer (EasyR1)": (
        lambda f: parquet(f, problem=["<image>Which?"] * 4, answer=KINDS), CLS, TWO, 0,
        "the column answer is read as solution"),
    "prompt with messages (TRL)": (
        lambda f: table(f, "rows.jsonl", rows_with(
            image=FILES, prompt=[[{"role": "user", "content": "?"}]] * 4, solution=KINDS), True),
        CLS, TWO, 0, None),
    "messages with objects (ms-swift)": (
        lambda f: table(f, "rows.jsonl", rows_with(
            images=[[name] for name in FILES],
            messages=[[{"role": "user", "content": "<image>Find <ref-object>"},
                       {"role": "assistant", "content": "<bbox>"}]] * 4,
            objects={"ref": ["cup"], "bbox": [[4, 5, 24, 30]]}), True),
        DET, {"[4, 5, 24, 30]"}, 0, None),
    "image and choice (Label Studio's JSON-MIN)": (
        lambda f: table(f, "ls.json", rows_with(image=FILES, choice=KINDS, id=[1, 2, 3, 4])), CLS,
        TWO, 2, "2 classes"),
    "JSON lines in a .json file": (
        lambda f: table(f, "rows.json", rows_with(**ASKED, solution=KINDS), True), CLS,
        TWO, 0, None),
    "a JSON list in a .jsonl file": (
        lambda f: table(f, "rows.jsonl", rows_with(**ASKED, solution=KINDS)), CLS, TWO, 0,
        None),
    "an object that holds the list of rows": (
        lambda f: table(f, "rows.json", {"version": 1, "data": rows_with(**ASKED, solution=KINDS)}),
        CLS, TWO, 0, None),
    "val.jsonl beside train.jsonl": (
        lambda f: (table(f, "train.jsonl", rows_with(**ASKED, solution=KINDS), True),
                   table(f, "val.jsonl", rows_with(**ASKED, solution=KINDS)[:3], True))[0].parent,
        CLS, TWO, 3, None),
    "paths with backslashes": (
        lambda f: (photos(f, below="img"), write(f / "rows.json", rows_with(
            image=[f"img\\{name}" for name in FILES], problem="Which?", solution=KINDS)))[1],
        CLS, TWO, 0, None),
}  # fmt: skip


# As READ; what docs/data.md need not name.
ALSO = {
    "what systems leave behind": (
        lambda f: tree(classes(f, "."), "@eaDir/0.jpg cup/@eaDir/1.jpg __MACOSX/cup/._0.jpg"), CLS,
        REDS, 2, "2 classes, 6 photographs"),
    "a folder images in each class": (
        lambda f: tree(f, "cup/images/0.jpg jug/images/1.jpg"), CLS, {"cup", "jug"}, 0, None),
    "seg_train/seg_train": (
        lambda f: classes(f, "seg_train/seg_train", "seg_test/seg_test"), CLS, REDS, 6, None),
    "WordNet ids before the names": (
        lambda f: tree(f, "Images/n02085620-Chihuahua/0.jpg Images/n02085782-Pug/1.jpg"), CLS,
        {"Chihuahua", "Pug"}, 0, None),
    "COCO files for classes beside class folders": (
        lambda f: write(classes(f, "train") / "train.json", {
            "images": IMAGES, "categories": CATEGORIES, "annotations": [
                {"id": 1, "image_id": 0, "category_id": 1}]}).parent, CLS, REDS, 2, None),
    "COCO with zeros for a box, and polygons": (
        lambda f: coco(f, boxes=annotations(bbox=[0, 0, 0, 0], segmentation=[
            [4, 5, 24, 5, 24, 29, 4, 29]])), DET, FOUND, 1, "those of their segmentations"),
    "COCO with accents in two codings": (
        lambda f: (photo(f / "u/Ku\u0308che.jpg"), write(f / "instances.json", {
            "images": [IMAGES[0] | {"file_name": "K\u00fcche.jpg"}], "categories": CATEGORIES,
            "annotations": annotations()[:1]}))[1], DET, FOUND, 0, "found by the last part"),
    "YOLO in a folder of its own name": (
        lambda f: yolo_apart(f / "a" / "a") and f / "a", DET, FOUND, 4, "read as YOLO"),
    "YOLO, splits by train.txt": (
        lambda f: (yolo_beside(f), write(f / "train.txt", "data/x/0.jpg\ndata/x/1.jpg\n"),
                   write(f / "valid.txt", "data/x/2.jpg\n"))[0], DET, FOUND, 1, "2 photographs"),
    "Pascal VOC, annotations/train": (
        lambda f: voc(voc(f, "images/train", "annotations/train"), "images/val", "annotations/val"),
        DET, FOUND, 4, None),
    "boxes of a CSV file, photographs below": (
        lambda f: (photos(f, below="images/train"), write(f / "train.csv",
                   "filename,class,xmin,ymin,xmax,ymax\n0.jpg,cup,4,5,24,29\n"))[1], DET, FOUND, 0,
        "found by the last part"),
    "objects of JSON lines, photographs below": (
        lambda f: (photos(f, below="pix"), write(f / "rows.jsonl", rows_with(
            image=FILES, objects={"bbox": [[4, 5, 20, 24]], "category": ["cup"]}), True))[1], DET,
        FOUND, 1, "found by the last part"),
    "_annotations.csv in folders of splits": (
        lambda f: [(photos(f, below=s), write(f / s / "_annotations.csv",
                   "filename,class,xmin,ymin,xmax,ymax\n0.jpg,cup,4,5,24,29\n"))
                   for s in ("train", "valid")] and f, DET, FOUND, 1, None),
    "verl's reward_model": (
        lambda f: table(f, "rows.jsonl", rows_with(
            image=FILES, prompt=[[{"role": "user", "content": "?"}]] * 4,
            reward_model=[{"ground_truth": kind} for kind in KINDS]), True), CLS, TWO, 0, None),
    "notes in another encoding, a broken YAML of another tool": (
        lambda f: (yolo_beside(f), (f / "notes.txt").write_bytes(b"Gr\xf6\xdfe"),
                   write(f / "hooks.yaml", "a: [b"))[0], DET, FOUND, 1, "read as YOLO"),
    "columns that nothing reads": (
        lambda f: table(f, "rows.json", rows_with(**ASKED, solution=KINDS, options="A, B")), CLS,
        TWO, 0, "columns that are not used: options"),
}  # fmt: skip


def splits(path, script, **flags):
    config = script.Config(dataset_name=str(path), **flags)
    model = CHECKPOINT if script is train_cls else DETECTION
    return load_splits(config, Processor(model), lambda items, *_: items)


@pytest.mark.parametrize("name", [*READ, *ALSO])
def test_what_people_have_is_read(tmp_path, name):
    build, script, solutions, held_out, note = (READ | ALSO)[name]
    flags = {"absent_share": 0.0} if script is DET else {}
    rows, other = splits(build(tmp_path / "set"), script, **flags)
    assert not rows.faults and not other.faults
    assert {row.solution for row in rows} == solutions
    assert len(other) == held_out
    assert note is None or note in "\n".join(rows.notes), rows.notes


def labelme(folder: Path) -> Path:
    shape = {"label": "cup", "points": [[3, 4], [20, 30]], "shape_type": "rectangle"}
    for i in range(3):
        content = {"version": "5.0", "flags": {}, "shapes": [shape], "imagePath": f"{i}.jpg"}
        write(photos(folder) / f"{i}.json", content)
    return folder


# name -> (how it is built, what the message says); no message asks to remove what holds files
REFUSED = {
    "folders that are no classes": (
        lambda f: tree(f, "images/0.jpg images/1.jpg masks/0.png masks/1.png train.csv"),
        r"no class folders here but images \(2 photographs\), masks \(2.*Beside them: train.csv"),
    "photographs of splits without classes": (
        lambda f: tree(f, "train/0.jpg train/1.jpg test/0.jpg _classes.csv"),
        r"no class folders here but test \(1.*_classes.csv.*a CSV file with the columns image and"),
    "a split's name for a class": (
        lambda f: tree(f, "train/0.jpg bus/0.jpg car/0.jpg"), "no class folders here but .*train"),
    "class folders beside masks": (
        lambda f: tree(classes(f, "images"), "masks/0.png"), "folders in images are classes, give"),
    "trainA and trainB": (
        lambda f: tree(f, "trainA/0.jpg trainB/1.jpg testA/2.jpg testB/3.jpg"), "no class folders"),
    "folders above the classes": (
        lambda f: classes(f, "color", "grey"), "color, grey have the same folders in them \\(cup"),
    "two data sets in a folder": (
        lambda f: voc(voc(f, "VOC2007/images", "VOC2007/xml"), "VOC2012/images", "VOC2012/xml"),
        "several data sets, VOC2007, VOC2012: give --dataset_name one"),
    "VOC with swapped corners": (
        lambda f: voc(f, thing=THING.replace("<xmax>24", "<xmax>2")), "object 1, cup: the corners"),
    "folders that say nothing": (
        lambda f: tree(f, "original/0.jpg augmented/1.jpg"), "no class folders"),
    "masks in class folders": (
        lambda f: tree(f, "cup/images/0.jpg cup/masks/1.jpg jug/images/2.jpg jug/masks/3.jpg"),
        "which are no classes: put the photographs of each class straight into"),
    "splits in class folders": (
        lambda f: tree(f, "cup/train/0.jpg cup/test/1.jpg jug/train/2.jpg jug/test/3.jpg"),
        "put the splits above the classes, test/cup"),
    "COCO annotations and YOLO files": (
        lambda f: coco(yolo_apart(f)).parent, "holds COCO annotations and YOLO text files"),
    "KITTI": (
        lambda f: write(tree(f, "training/image_2/0.jpg") / "training/label_2/0.txt",
                        "Car 0.00 0 1.5 4 5 24 29 1 1 1 1 1 1 1").parents[2], "0.txt is KITTI's"),
    "a test split without answers": (
        lambda f: (csv(f, "image,label\n0.jpg,cup\n1.jpg,jug\n", "train.csv"),
                   csv(f, "image\n2.jpg\n", "test.csv"))[0].parent, "the held-out split 'test'"),
    "archives beside a table": (
        lambda f: tree(f, "images.zip") and write(f / "a.csv", "image,label\nx.jpg,cup\n"),
        "If they are in images.zip, unpack it"),
    "Oxford Pets in its own layout": (
        lambda f: write(tree(f, "images/Grey_Shorthair_0.jpg annotations/trimaps/a.png")
                        / "annotations/list.txt", "Grey_Shorthair_0 1 1 1\n").parent.parent,
        "Oxford-IIIT Pets in its own layout.*\n.*data.published"),
    "Cup and cup in two splits": (
        lambda f: tree(f, "train/Cup/0.jpg train/Vase/1.jpg val/cup/2.jpg val/vase/3.jpg"),
        "'Cup' and 'cup' count as one name"),
    "labelme": (labelme, "labelme's: make one COCO file of all"),
    "a webdataset": (lambda f: tree(f, "a-000.tar a-001.tar"), "tar files.*unpack them"),
    "an archive": (lambda f: tree(f, "photos.zip") / "photos.zip", "an archive: unpack it"),
    "an archive in a folder": (lambda f: tree(f, "photos.zip"), "photos.zip is an archive"),
    "Label Studio's JSON": (
        lambda f: write(f / "ls.json", [{"id": 1, "data": {"image": "0.jpg"}, "annotations": []}]),
        "Label Studio's own JSON: export it again, as COCO"),
    "CVAT's XML": (
        lambda f: write(tree(f, "0.jpg") / "annotations.xml", "<annotations><image/></annotations>"
                        ).parent, "CVAT's own XML: export again, as COCO"),
    "photographs alone": (lambda f: photos(f), "nothing says what they show"),
    "an empty folder": (lambda f: tree(f, "set/") / "set", "an empty folder"),
    "COCO without annotations": (
        lambda f: write(photos(f) / "image_info_test.json", {"images": IMAGES, "categories": []}),
        "a COCO file without annotations"),
    "COCO whose ids are text on one side": (
        lambda f: coco(f, boxes=annotations(image_id="1")), 
        "is of image '1', text, and the file has 1: write both in one way"),
    "COCO with an id twice": (
        lambda f: coco(f, [*IMAGES, IMAGES[1]]), "the id 1 is there twice: .*1.jpg.* and .*1.jpg"),
    "COCO whose images are nowhere": (
        lambda f: coco(f, named(["a/x.jpg"] * 4)), 
        "'a/x.jpg', is in none of .*Put the images beside"),
    "COCO whose images could be two": (
        lambda f: coco(photos(photos(f, below="a"), below="b"), named([f"x/{n}" for n in FILES]),
                       below="c"), "3 files below have its name"),
    "COCO with a crowd that is neither": (
        lambda f: coco(f, boxes=annotations(iscrowd="maybe")), "iscrowd 'maybe', not 0 or 1"),
    "COCO with a size in words": (
        lambda f: coco(f, [e | {"width": "sixty"} for e in IMAGES]), "are text: 'sixty'"),
    "text in another encoding": (
        lambda f: (write(f / "rows.json", ""), (f / "rows.json").write_bytes(
            '[{"problem": "Gr\u00f6\u00dfe?"}]'.encode("cp1252")))[0],
        "not UTF-8 text: line 1 holds the byte 0xf6.*iconv -f cp1252"),
    "YOLO without names": (
        lambda f: (yolo(f, "images", "labels"), f)[1], "without its classes' names: write classes"),
    "YOLO lines that are no boxes": (
        lambda f: write(yolo_beside(f) / "1.txt", "0 .5 .5 .2\n7 .5 .5 1 1\n0 30 20 9 9\n").parent,
        "3 bad lines\n.*1.txt, line 1: 3 numbers after(.|\n)*line 2: class 7, and the set names 2"
        "(.|\n)*30 is no share"),
    "VOC without a photograph": (
        lambda f: ((voc(f) / "JPEGImages/2.jpg").unlink(), f)[1], "2.xml: no photograph 2"),
    "VOC that is no XML": (
        lambda f: write(voc(f) / "Annotations/3.xml", "<annotation><obj").parent.parent,
        "3.xml: not readable XML"),
    "VOC with a corner that is no number": (
        lambda f: voc(f, thing=THING.replace("<xmin>4", "<xmin>four")), "object 1, cup: the corn"),
    "CSV without a header": (
        lambda f: csv(f, "0.jpg,cup\n1.jpg,vase\n"), "its first line is '0.jpg,cup', a row"),
    "CSV with a column too many": (
        lambda f: csv(f, "image,label\n0.jpg,cup,\n"), "row 0 has 3 columns, the header 2"),
    "a table with two columns for one": (
        lambda f: table(f, "r.json", rows_with(image=FILES, query="?", answer="", response="")),
        "answer or response could be the solution: rename one"),
    "a table whose images are nowhere": (
        lambda f: table(f, "r.json", rows_with(image="C:\\data\\x.jpg", problem="?", solution="a")),
        r"first image, 'C:\\\\data\\\\x.jpg', is in none of .*Put the images beside"),
    "one class only": (
        lambda f: csv(f, "image,label\n0.jpg,cup\n1.jpg,cup\n"), "one class only.*nothing to tell"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path, name):
    build, message = REFUSED[name]
    path = build(tmp_path / "set")
    with pytest.raises(ValueError) as error:
        splits(path, train_det if "YOLO" in name or "VOC" in name or "COCO" in name else train_cls)
    assert re.search(message, str(error.value)), str(error.value)
    assert not re.search(r"\b(remove|delete)\b (?!it)", str(error.value)) or "or remove" in message


def test_docs_name_each_form_that_is_read():
    page = (ROOT / "docs" / "data.md").read_text()
    listed = set(re.findall(r"^\| ([^|]+?) \|", page.split("## ")[0], flags=re.MULTILINE))
    assert listed - {"you have", "---"} == READ.keys() - {"training_set"}


def test_ids_of_the_files_come_back(tmp_path):
    """YOLO: the photograph's path and the class's number; VOC: the XML file's name."""
    (row, *_) = load(str(yolo_apart(tmp_path / "yolo")), "train")
    assert (row.coco["image_id"], row.coco["category_id"]) == ("images/train/0.jpg", 0)
    (row, *_) = load(str(voc_lists(tmp_path / "voc")), "train")
    assert (row.coco["image_id"], row.coco["category_id"], row.coco["category"]) == ("0", 1, "cup")
    corners = coco(tmp_path / "coco", boxes=annotations(bbox=[30, 20, 60, 46]))
    assert load(str(corners), "train")[0].coco["annotations"][0]["bbox"] == [30, 20, 30, 26]
    crowd = coco(tmp_path / "crowd", boxes=annotations(iscrowd="0"))
    assert load(str(crowd), "train")[0].coco["annotations"][0]["iscrowd"] == 0


def test_one_photograph_that_is_missing_is_one_bad_row(tmp_path):
    """The others' backslashes are turned all the same."""
    photos(tmp_path, 3, below="img")
    rows = rows_with(image=[f"img\\{n}" for n in FILES], problem="?", solution=KINDS)
    rows, _ = splits(write(tmp_path / "rows.json", rows), train_cls)
    assert [(fault.row, fault.found) for fault in rows.faults] == [
        (3, "missing: there is no such file")
    ]


def test_negative_corners_are_no_zeros(tmp_path):
    text = "filename,class,xmin,ymin,xmax,ymax\n0.jpg,cup,-8,5,24,29\n"
    rows, _ = splits(csv(tmp_path, text), train_det, absent_share=0.0)
    assert "1 boxes reach out of their image and are clipped to it" in rows.notes


def test_photographs_turned_by_exif_have_their_upright_size(tmp_path):
    """A phone's photograph: shares of its height are those of the image as it is shown."""
    yolo(tmp_path, ".", ".")
    write(tmp_path / "classes.txt", "cup")
    for i in range(4):
        image = Image.open(tmp_path / f"{i}.jpg")
        exif = image.getexif()
        exif[274] = 6
        image.save(tmp_path / f"{i}.jpg", exif=exif)
    rows, _ = splits(tmp_path, train_det, absent_share=0.0)
    assert rows[0].coco["size"] == (H, W)
    assert "[3, 6.6667, 18, 38.6667]" in rows[0].solution


@pytest.mark.parametrize(
    "name, split",
    [
        ("train", "train"), ("Train", "train"), ("training_set", "train"), ("train2017", "train"),
        ("01-test", "test"), ("trainset", "train"), ("TestImages", "test"),
        ("val_images", "validation"), ("dev", "validation"), ("bullet_train", None),
        ("test_tube", None), ("trainers", None),
        ("validity", None), ("2017", None), ("train_test", None), ("cars_train", None),
    ],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_of(name) == split


def test_names_that_are_no_classes():
    for name in (
        "images",
        "JPEGImages",
        "masks",
        "Annotations",
        "train_masks",
        "images2",
        "labels",
    ):
        assert is_layout(name), name
    for name in (
        "cup",
        "photo",
        "mask",
        "with_mask",
        "raw",
        "new",
        "0",
        "imagesque",
        "data center",
    ):
        assert not is_layout(name), name
    assert splits_among(["cars_train", "cars_test", "devkit"]) == {
        "cars_train": "train", "cars_test": "test"}  # fmt: skip
    assert splits_among(["bullet_train", "steam_train"]) == {}
