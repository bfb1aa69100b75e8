"""Pascal VOC folders: an XML file for each photograph, with the corners of its boxes in pixels.

    JPEGImages/1.jpg  Annotations/1.xml  ImageSets/Main/train.txt
    images/1.jpg  annotations/1.xml        train/1.jpg  train/1.xml        1.jpg  1.xml

Corners are taken as they are written. Objects marked `difficult` count as crowds: VOC's evaluation
passes over them, too. Not here: rows and prompts (data/detection.py).
"""

from pathlib import Path
from xml.etree import ElementTree

from data import annotations, files
from data.detection import rows_of
from data.errors import UserError
from data.folders import folders, is_photograph, photographs
from data.images import size_if_known
from data.rows import SplitRows
from data.splits import split_of
from data.wording import Wording

IN_ANNOTATIONS, IN_IMAGES = ("annotations", "xmls", "xml"), ("jpegimages", "images", "image", "img")
LISTS = {"train": "train", "trainval": "train", "val": "validation", "test": "test"}


def find(path: Path) -> dict[str, list[Path]]:
    """Name of a split -> its XML files; nothing if `path` is no VOC set."""
    if not path.is_dir():
        return {}
    splits: dict[str, list[Path]] = {}
    above = [folder for folder in folders(path) if folder.name.lower() in IN_ANNOTATIONS]
    inner = [folder for annotated in above for folder in folders(annotated)]
    for folder in (*folders(path), *inner):  # train/, or annotations/train/
        inside = folders(folder)  # train_zip/train/
        found = xml_files(folder) or (xml_files(inside[0]) if len(inside) == 1 else [])
        if (split := split_of(folder.name)) and found:
            splits.setdefault(split, []).extend(found)
    if splits:
        return splits
    found = xml_files(path)
    if not found:
        inside = folders(path)
        return find(inside[0]) if len(inside) == 1 else {}  # VOCdevkit/VOC2007
    by_stem = {file.stem: file for file in found}
    lists = {f.stem: f for f in sorted((path / "ImageSets" / "Main").glob("*.txt"))}
    if "train" in lists:
        lists.pop("trainval", None)
    for name, split in LISTS.items():
        if name in lists:
            lines = map(str.split, files.read_text(lists[name]).splitlines())
            stems = [words[0] for words in lines if words]
            absent = [stem for stem in stems if stem not in by_stem]
            if absent and len(absent) < len(stems):
                count = f"{len(absent)} of {len(stems)}"
                raise UserError(f"{lists[name]}: {count} have no XML file, {absent[0]} the first")
            if stems and not absent:
                splits[split] = [by_stem[stem] for stem in stems]
    return splits or {"train": found}


def xml_files(path: Path) -> list[Path]:
    """The annotations of a folder: in Annotations/ or the like, or beside the photographs."""
    for folder in (path, *(f for f in folders(path) if f.name.lower() in IN_ANNOTATIONS)):
        found = [file for file in sorted(folder.glob("*.xml")) if is_voc(file)]
        if found:
            return found
    return []


def is_voc(file: Path) -> bool:
    """Whether an XML file is an annotation of VOC's form."""
    if files.fault(file, files.SETTINGS):
        return False
    with file.open("rb") as start:
        head = start.read(400)
    return b"<annotation" in head and b"<annotations" not in head


def read(path: Path, split: str, sources: dict[str, list[Path]], wording: Wording) -> SplitRows:
    """The rows of a split. path: the data set; sources: what `find` returned. Image ids are the XML
    files' names without suffix, category ids count the names in their order.

    Raises UserError for a file that is no XML, an object without a name or corners, or a photograph
    that is not there.
    """
    xmls, images, found, wrong = sources[split], [], [], []
    places = {folder: _by_stem(folder) for folder in {_image_folder(xml) for xml in xmls}}
    for xml in xmls:
        try:
            root = _parsed(xml)
            photo = _photograph(xml, root, places[_image_folder(xml)])
            images.append({"id": xml.stem, "file_name": str(photo), **_size(root, photo)})
            for number, thing in enumerate(root.findall("object"), 1):
                found.append((xml.stem, *_object(thing, number)))
        except UserError as error:
            wrong.append(f"{xml}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"{path}: {len(wrong)} bad files\n  " + "\n  ".join(wrong[:10]) + more)
    ids = {name: number for number, name in enumerate(sorted({name for _, name, *_ in found}), 1)}
    entries = [
        {"id": i, "image_id": image, "category_id": ids[name], "bbox": box, "area": box[2] * box[3],
         "iscrowd": difficult}
        for i, (image, name, box, difficult) in enumerate(found, 1)
    ]  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    content = {"images": images, "annotations": entries, "categories": categories}
    rows = rows_of(content, path, wording)
    rows.folder = path
    rows.notes.insert(0, f"read as Pascal VOC: {len(xmls)} XML files, corners in pixels")
    listed = {xml for of_split in sources.values() for xml in of_split}
    beside = {f for folder in {xml.parent for xml in xmls} for f in folder.glob("*.xml")}
    if unlisted := len(beside - listed):
        rows.notes.append(f"{unlisted} XML files are in none of the lists in ImageSets/Main")
    if any(difficult for *_, difficult in found):
        rows.notes.append("objects marked difficult count as crowds")
    return rows


def _parsed(xml: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(files.read_bytes(xml, files.SETTINGS))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"not readable XML: {str(error)[: files.SHOWN]}") from error


def _image_folder(xml: Path) -> Path:
    """The folder with the photographs of an XML file: JPEGImages/ beside Annotations/ or the like,
    there in a folder of the same name as the file's, or the file's own."""
    for inner, folder in (("", xml.parent), (xml.parent.name, xml.parent.parent)):
        if folder.name.lower() in IN_ANNOTATIONS:
            beside = (f for f in folders(folder.parent) if f.name.lower() in IN_IMAGES)
            images = next(beside, folder.parent)
            return images / inner if (images / inner).is_dir() else images
    return xml.parent


def _by_stem(folder: Path) -> dict[str, Path]:
    return {photo.stem: photo for photo in photographs(folder)}


def _photograph(xml: Path, root: ElementTree.Element, by_stem: dict[str, Path]) -> Path:
    """The photograph of an XML file: the one with its name, or the one that it names."""
    named = Path((root.findtext("filename") or "").replace("\\", "/"))
    for stem in (xml.stem, named.stem if is_photograph(named) else named.name):
        if stem in by_stem:
            return by_stem[stem].resolve()
    raise UserError(f"no photograph {xml.stem}.* or {named.name!r} in {_image_folder(xml).name}/")


def _size(root: ElementTree.Element, photo: Path) -> dict[str, int]:
    """Width and height in pixels as the file says, or the photograph's own."""
    size = [annotations.side(root.findtext(f"size/{name}")) for name in ("width", "height")]
    if not all(annotations.is_number(n) and n > 0 for n in size):
        size = size_if_known(photo)
    return {"width": size[0], "height": size[1]}


def _object(thing: ElementTree.Element, number: int) -> tuple[str, list[float], int]:
    """(name, [x, y, width, height], whether it is difficult) of an object. Raises UserError."""
    name = (thing.findtext("name") or "").strip()
    if not name:
        raise UserError(f"object {number} has no name")
    if thing.find("bndbox") is None:
        raise UserError(f"object {number}, {name}, has no bndbox")
    texts = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        corners = [float(text) for text in texts]
    except (TypeError, ValueError):
        raise UserError(f"object {number}, {name}: the corners {texts} are no numbers") from None
    if not annotations.is_box(corners):
        raise UserError(f"object {number}, {name}: the corners {texts} are no numbers")
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise UserError(
            f"object {number}, {name}: the corners {texts} have no area, or are swapped"
        )
    difficult = annotations.crowd(thing.findtext("difficult"))
    if difficult not in (0, 1):
        raise UserError(f"object {number}, {name}: difficult is {difficult!r}, not 0 or 1")
    return name, annotations.without_corners(corners), difficult
