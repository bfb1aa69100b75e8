"""What is no data set here, by its name, with the one step that makes it one.

Not here: reading anything.
"""

from pathlib import Path

from data import files
from data.folders import files as files_in
from data.folders import photographs
from data.places import ARCHIVES

BY_SUFFIX = {
    ".arrow": "one file of a save_to_disk folder: give the folder",
    ".mat": "MATLAB: list its labels in a CSV file with the columns image and label",
    ".xlsx": "a spreadsheet: save it as CSV, with the columns image and label",
    ".xls": "a spreadsheet: save it as CSV, with the columns image and label",
    ".tfrecord": "TFRecord: write it as parquet with image and label, or as COCO",
    ".pkl": "a pickle, which could run any code: save the table as parquet",
    ".npz": "NumPy arrays: save each image as PNG in the folder of its class",
    ".npy": "NumPy arrays: save each image as PNG in the folder of its class",
    ".h5": "HDF5: save each image as PNG in the folder of its class",
    ".hdf5": "HDF5: save each image as PNG in the folder of its class",
    ".lmdb": "LMDB: write it as parquet with image and label",
    ".xml": "one annotation: give the folder with all of them",
    ".txt": "text: write a CSV file with a line image,label above the rows",
}
READ = (
    "photographs in class folders, COCO, YOLO or Pascal VOC annotations, a table (JSON, JSONL, "
    "CSV, parquet) or a save_to_disk folder (docs/data.md)"
)


def what_it_is(path: Path) -> str:
    """The message for a file or folder that holds no data set."""
    if path.is_file():
        return f"{path}: {_file(path)}"
    inside = files_in(path, depth=2)
    if not inside:
        return f"{path}: an empty folder; a data set is {READ}"
    suffixes = {file.suffix.lower() for file in inside}
    if ".tar" in suffixes and not photographs(path):
        return (
            f"{path}: tar files, of a webdataset or packed: unpack them (for f in *.tar; do tar xf "
            f"$f; done) and list image and label in a CSV file"
        )
    if tool := tool_of(path):
        return f"{path}: {tool}"
    named = next((s for s in (*ARCHIVES, *BY_SUFFIX) if s in suffixes), None)
    if named and not photographs(path):
        file = next(f for f in inside if f.suffix.lower() == named)
        return f"{path}: {file.relative_to(path)} is {_file(file).removeprefix('this is ')}"
    if photographs(path):
        shown = ", ".join(str(file.relative_to(path)) for file in inside[:5])
        return (
            f"{path}: no data set here: photographs ({shown}), and nothing says what "
            f"they show. Put those of each class into a folder of its name (tulip/1.jpg), or "
            f"list them in a CSV file with the columns image and label"
        )
    shown = ", ".join(str(file.relative_to(path)) for file in inside[:5])
    return f"{path}: no data set here ({shown}); a data set is {READ}"


def tool_of(path: Path) -> str:
    """Which tool or benchmark wrote the annotations in a folder, and the step; "" if none is
    known."""
    inside = files_in(path, depth=4)
    for suffix, which in ((".json", _annotation_tool), (".xml", _cvat), (".txt", _benchmark)):
        for file in [file for file in inside if file.suffix.lower() == suffix][:20]:
            if name := which(file):
                return f"{file.relative_to(path)} is {name}"
    return ""


def _cvat(file: Path) -> str:
    is_cvat = "<annotations" in _head(file)
    return "CVAT's own XML: export again, as COCO 1.0" if is_cvat else ""


def _benchmark(file: Path) -> str:
    """Benchmarks whose boxes are text, by the first line of a file."""
    first = _head(file).strip().partition("\n")[0]
    words = first.replace(",", " ").split()
    if len(words) in (15, 16) and words[0].isalpha():
        return "KITTI's: write its boxes (columns 5 to 8, corners in pixels) as COCO"
    if len(words) == 8 and "," in first and all(word.lstrip("-").isdigit() for word in words):
        return "VisDrone's (x,y,width,height,score,category,...): write it as COCO"
    if len(words) == 10 and not words[8].isdigit() and words[9].isdigit():
        return "DOTA's, turned boxes: write the upright box around each as COCO"
    return ""


def _file(file: Path) -> str:
    suffix = file.suffix.lower()
    if reason := files.fault(file):
        return reason
    if suffix in ARCHIVES:
        return "an archive: unpack it, and give --dataset_name the folder"
    if suffix == ".json" and (name := _annotation_tool(file)):
        return f"this is {name}"
    if suffix in BY_SUFFIX:
        return f"this is {BY_SUFFIX[suffix]}"
    return f"not a .json, .jsonl, .csv or .parquet file; a data set is {READ}"


def _head(file: Path) -> str:
    if files.fault(file):
        return ""
    with file.open("rb") as start:
        return start.read(4000).decode("utf-8", errors="replace")


def _annotation_tool(file: Path) -> str:
    """Which tool wrote a JSON file that is no data set, and the step; "" if none is known."""
    head = _head(file)
    if not head:
        return ""
    if '"shapes"' in head and ('"imagePath"' in head or '"flags"' in head):
        return (
            "labelme's: make one COCO file of all (pip install labelme2coco; labelme2coco FOLDER)"
        )
    if '"_via_' in head or '"regions"' in head:
        return "VGG Image Annotator's: export the annotations again, as COCO"
    if '"annotations"' in head and '"data"' in head and '"result"' in head:
        return "Label Studio's own JSON: export it again, as COCO for boxes, as CSV for choices"
    if '"coordinates"' in head and '"image"' in head:
        return "CreateML's: export again, as COCO, YOLO or Pascal VOC"
    if '"asset"' in head and '"regions"' in head:
        return "VoTT's: export again, as Pascal VOC or COCO"
    if '"dataset_type"' in head or '"objects"' in head and '"classTitle"' in head:
        return "Supervisely's: export again, as COCO, YOLO or Pascal VOC"
    return ""
