"""Data sets in every form, every fault named, images as a person sees them, the prompt stream."""

import json
import re
import struct
import tracemalloc
import weakref
from pathlib import Path

import datasets
import pytest
from PIL import Image

import data.check
from data import files, scenes
from data.check import cache_file, check_images, check_rows, refuse
from data.flowers import SPECIES, draw, rows, thinking
from data.images import open_image
from data.load import load, splits
from data.stream import PromptStream

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = {"problem": "What is it?", "solution": "<answer>rose</answer>"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed: int = 0) -> Image.Image:
    return draw(SPECIES[seed % 12], f"test/{seed}")


@pytest.fixture
def pictures(tmp_path) -> list[dict]:
    """Six rows of a JSON data set whose images lie in a folder beside it."""
    (tmp_path / "set" / "img").mkdir(parents=True)
    table = []
    for i in range(6):
        picture(i).save(tmp_path / "set" / "img" / f"{i}.png")
        solution = f"<answer>{SPECIES[i].name}</answer>"
        table.append({"image": f"img/{i}.png", "problem": f"What is {i}?", "solution": solution})
    return table


def write_json(folder, name, table):
    (folder / name).write_text(json.dumps(table))


def as_hf(table, folder):
    """The same rows as a datasets.Dataset with encoded images."""
    columns = {k: [row[k] for row in table] for k in ("image", "problem", "solution")}
    columns["image"] = [str(folder / name) for name in columns["image"]]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def contents(examples):
    return [
        (e.index, e.problem, e.solution, [open_image(i).tobytes() for i in e.images])
        for e in examples
    ]


def test_every_form_gives_the_same_rows(pictures, tmp_path):
    folder = tmp_path / "set"
    write_json(folder, "train.json", pictures)
    write_json(folder, "test.json", pictures[:2])
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, pictures)) + "\n")
    other = [{("image_path" if k == "image" else k): v for k, v in r.items()} for r in pictures]
    write_json(folder, "paths.json", other)
    several = [
        {"images": [row["image"]], **{k: row[k] for k in ("problem", "solution")}}
        for row in pictures
    ]
    write_json(folder, "several.json", several)
    table = as_hf(pictures, folder)
    parts = datasets.DatasetDict({"train": table, "test": table.select(range(2))})
    parts.save_to_disk(tmp_path / "dict")
    table.save_to_disk(tmp_path / "single")
    table.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "pq" / "data").mkdir(parents=True)
    table.select(range(4)).to_parquet(tmp_path / "pq" / "data" / "train-00000-of-00002.parquet")
    table.select([4, 5]).to_parquet(tmp_path / "pq" / "data" / "train-00001-of-00002.parquet")
    parts["test"].to_parquet(tmp_path / "pq" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "flat").mkdir()
    table.to_parquet(tmp_path / "flat" / "anything.parquet")

    expected = contents(load(str(folder), "train"))
    assert [row[:3] for row in expected] == [
        (i, r["problem"], r["solution"]) for i, r in enumerate(pictures)
    ]
    assert expected[3][3] == [picture(3).tobytes()]
    forms = ["set/train.json", "set/lines.jsonl", "set/paths.json", "set/several.json"]
    forms += ["dict", "single", "one.parquet", "pq", "flat"]
    for form in forms:
        assert contents(load(str(tmp_path / form), "train")) == expected, form
    for form in ("set", "dict", "pq"):
        assert {"train", "test"} <= set(splits(str(tmp_path / form)))
        assert contents(load(str(tmp_path / form), "test")) == expected[:2]


def test_the_real_photographs_are_the_same_in_both_forms():
    if not SHARED.exists():
        pytest.skip("the shared photographs are not here")
    json_form, saved_form = (load(str(SHARED / "clothing" / p), "train") for p in ("", "hf"))
    assert len(json_form) == len(saved_form) == 40
    first = {(e.problem, e.solution, open_image(e.images[0]).tobytes()) for e in json_form}
    second = {(e.problem, e.solution, open_image(e.images[0]).tobytes()) for e in saved_form}
    assert first == second
    sizes, faults = check_images(json_form, "photographs")
    assert not faults and not check_rows(json_form)
    assert [len(row) for row in sizes] == [1] * 40


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "{", "not JSON"),
        ("a.json", '{"a": 1}', "no list of rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "[1]", "row 0"),
        ("a.jsonl", '{"image": 1}\n{]', "line 2"),
        ("a.json", '[{"picture": 1, "problem": "p"}]', "no column solution; it has"),
        ("a.csv", "image", "no rows"),
        ("a.npz", "image", "NumPy arrays: save each image as PNG"),
    ],
)
def test_a_broken_file_is_one_message(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / name), "train")


def test_a_small_file_takes_little_memory_however_much_may_be_read(tmp_path):
    """`read` reserves what it is asked for."""
    (tmp_path / "a.json").write_text("[]")
    tracemalloc.start()
    assert files.read_json(tmp_path / "a.json", files.TABLE) == []
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_reading_writes_nothing_beside_the_data(pictures, tmp_path):
    table = as_hf(pictures, tmp_path / "set")
    listed = {"images": [[row["image"]] * 2 for row in table], **TEXTS}
    listed = {k: v if isinstance(v, list) else [v] * 6 for k, v in listed.items()}
    features = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    features = datasets.Features(features | {"solution": datasets.Value("string")})
    datasets.Dataset.from_dict(listed, features).save_to_disk(tmp_path / "lists")
    before = sorted(tmp_path.rglob("*"))
    examples = load(str(tmp_path / "lists"), "train")
    assert [len(e.images) for e in examples] == [2] * 6
    assert open_image(examples[-1].images[1]).tobytes() == picture(5).tobytes()
    assert not check_images(examples, "images")[1]
    assert [p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts] == before


def test_missing_sets_and_splits_are_named(tmp_path, pictures, monkeypatch):
    write_json(tmp_path / "set", "train.json", pictures)
    with pytest.raises(ValueError, match="no split 'validation'; there is train"):
        load(str(tmp_path / "set"), "validation")
    with pytest.raises(ValueError, match="no data set here"):
        load(str(tmp_path / "set" / "img"), "train")
    with pytest.raises(ValueError, match="no such file or folder"):
        load(str(tmp_path / "absent"), "train")
    with pytest.raises(ValueError, match="no such file or folder"):
        splits("absent.json")
    datasets.Dataset.from_dict({k: [] for k in ("image", *TEXTS)}).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(ValueError, match="no rows"):
        load(str(tmp_path / "none.parquet"), "train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet: cannot be read"):
        load(str(tmp_path / "bad.parquet"), "train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="nobody/nothing: neither a local path nor"):
        load("nobody/nothing", "train")


def bad_images(folder):
    picture().save(folder / "whole.jpg", quality=90)
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image at all")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    Image.new("RGB", (500, 2)).save(folder / "thin.png")
    Image.new("F", (8, 8), 0.5).save(folder / "float.tiff")
    (folder / "folder.png").mkdir()
    return {
        "absent.png": "missing",
        "empty.png": r"empty \(0 bytes\)",
        "text.png": "not an image",
        "cut.jpg": "truncated",
        "thin.png": "aspect ratio 250 is over 200",
        "float.tiff": "floating-point",
        "folder.png": "not a regular file but a folder",
    }


def test_bad_images_are_named_with_row_file_and_remedy(tmp_path):
    expected = bad_images(tmp_path)
    names = ["whole.jpg", *expected]
    write_json(tmp_path, "train.json", [{"image": name, **TEXTS} for name in names])
    sizes, faults = check_images(load(str(tmp_path), "train"), "images")
    assert sizes[0] == [(84, 84)]
    assert [fault.row for fault in faults] == list(range(1, len(names)))
    with pytest.raises(ValueError) as caught:
        refuse(faults, "somewhere, split 'train'")
    lines = str(caught.value).splitlines()
    assert lines[0] == "somewhere, split 'train': 7 bad rows"
    for (name, reason), line in zip(expected.items(), lines[1:], strict=True):
        assert name in line
        assert re.search(reason, line), line
        assert "replace the file" in line


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match="decompression bomb"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow only warns up to twice the limit
    assert open_image(tmp_path / "a.png").size == (84, 84)


def test_rows_without_texts_or_images_are_named(tmp_path):
    good = {"image": "0.png", **TEXTS}
    picture().save(tmp_path / "0.png")
    table = [good, good | {"solution": ""}, good | {"problem": 3}, good | {"image": None}]
    table += [good | {"image": 7}, {"problem": "p", "image": "0.png"}]
    write_json(tmp_path, "train.json", table)
    faults = check_rows(load(str(tmp_path), "train"))
    found = [(f.row, f.found) for f in faults]
    assert found == [
        (1, "solution is empty"),
        (2, "problem is '3'"),
        (3, "no image"),
        (4, "the image is int '7'"),
        (5, "solution is empty"),
    ]


def test_a_long_list_of_faults_is_cut_and_counted():
    faults = [data.check.Fault(row, "f", "x", "y") for row in range(25)]
    with pytest.raises(ValueError, match=r"25 bad rows(?s:.*)row 9 (?s:.*)and 15 more"):
        refuse(faults, "d, split 'train'")
    refuse([], "d")


def test_good_images_are_decoded_once_ever(tmp_path, pictures, monkeypatch):
    write_json(tmp_path / "set", "train.json", pictures + pictures)
    examples = load(str(tmp_path / "set"), "train")
    opened = []
    monkeypatch.setattr(data.check, "open_image", lambda s: opened.append(s) or open_image(s))
    first = check_images(examples, "images")
    assert 6 <= len(opened) <= 7  # two threads may meet at one image
    opened.clear()
    assert check_images(examples, "images") == first
    assert not opened
    with cache_file().open("a") as file:  # a line cut by a kill is passed over
        file.write("abc 1")
    assert check_images(examples, "images") == first
    Image.new("RGB", (9, 9)).save(tmp_path / "set" / "img" / "0.png")  # content, not name, counts
    assert check_images(examples, "images")[0][0] == [(9, 9)]
    assert len(set(opened)) == 1


def test_an_unwritable_cache_is_no_error(tmp_path, pictures, monkeypatch, capsys):
    write_json(tmp_path / "set", "train.json", pictures)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    sizes, faults = check_images(load(str(tmp_path / "set"), "train"), "images")
    assert len(sizes) == 6 and not faults
    assert "checked again next time" in capsys.readouterr().out


def blend(foreground, alpha):
    return tuple(round(c * alpha / 255 + 255 * (1 - alpha / 255)) for c in foreground)


def test_every_mode_becomes_the_right_rgb(tmp_path):
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    see_through = palette.copy()
    see_through.info["transparency"] = 1
    cases = {
        "rgb.png": (Image.new("RGB", (1, 1), (10, 20, 30)), (10, 20, 30)),
        "rgba.png": (Image.new("RGBA", (1, 1), (10, 20, 30, 128)), blend((10, 20, 30), 128)),
        "clear.png": (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), (255, 255, 255)),
        "la.png": (Image.new("LA", (1, 1), (50, 128)), blend((50, 50, 50), 128)),
        "l.png": (Image.new("L", (1, 1), 77), (77, 77, 77)),
        "1.png": (Image.new("1", (1, 1), 1), (255, 255, 255)),
        "p.png": (palette, (10, 200, 30)),
        "clear_p.png": (see_through, (255, 255, 255)),
        "cmyk.tiff": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        "dark.png": (Image.new("I;16", (1, 1), 257 * 3), (3, 3, 3)),
        "middle.png": (Image.new("I;16", (1, 1), 0x8080), (128, 128, 128)),
        "bright.png": (Image.new("I;16", (1, 1), 65535), (255, 255, 255)),
        "int.tiff": (Image.new("I", (1, 1), 65535), (255, 255, 255)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        out = open_image(tmp_path / name)
        assert out.mode == "RGB"
        difference = [abs(a - b) for a, b in zip(out.getpixel((0, 0)), expected, strict=True)]
        assert max(difference) <= 1, (name, out.getpixel((0, 0)), expected)
    Image.new("I", (1, 1), 70000).save(tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match="save it as 8-bit"):
        open_image(tmp_path / "wide.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """A 3 x 2 image with one marked corner, stored turned and flipped as each tag says."""
    upright = Image.new("RGB", (3, 2), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    upright.putpixel((2, 0), (0, 255, 0))
    stored_as = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for turn in stored_as:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    out = open_image(tmp_path / "a.png")
    assert out.size == upright.size and out.tobytes() == upright.tobytes()


def test_a_png_of_nonsense_chunks_is_a_fault_and_no_crash(tmp_path):
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 5) + b"IHDR" + b"\0" * 9
    (tmp_path / "a.png").write_bytes(png)
    with pytest.raises(ValueError):
        open_image(tmp_path / "a.png")


def test_each_epoch_is_a_permutation_and_none_repeats_another():
    stream = PromptStream(7, seed=3)
    taken = stream.next(5) + stream.next(20) + stream.next(3)
    epochs = [taken[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert PromptStream(7, seed=4).next(7) != epochs[0]


@pytest.mark.parametrize("steps", range(6))
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(steps):
    whole = PromptStream(7, seed=1)
    expected = [whole.next(4) for _ in range(9)]
    stopped = PromptStream(7, seed=1)
    for _ in range(steps):
        stopped.next(4)
    resumed = PromptStream(7, seed=1, **json.loads(json.dumps(stopped.state())))
    assert [resumed.next(4) for _ in range(9 - steps)] == expected[steps:]


def test_flowers_are_balanced_and_drawn_the_same_every_time():
    table = rows("train", 36)
    solutions = [row["solution"] for row in table]
    assert {solutions.count(f"<answer>{s.name}</answer>") for s in SPECIES} == {3}
    again = rows("train", 36)
    assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in zip(table, again))  # noqa: B905
    assert len({s.name for s in SPECIES} | {s.latin for s in SPECIES}) == 24


def test_no_drawing_of_one_split_is_in_another():
    drawn = {
        split: {row["image"].tobytes() for row in rows(split, 60)}
        for split in ("warm", "exam", "train", "test")
    }
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values())) == 240


def test_reasoning_names_what_is_drawn():
    from random import Random

    for species in SPECIES:
        texts = {thinking(species, Random(i)) for i in range(30)}
        assert len(texts) == 3
        assert all(species.look in t and species.count in t for t in texts)


def test_the_demo_is_a_data_set_like_any_other():
    assert splits("demo:flowers") == ["train", "test"]
    examples = load("demo:flowers", "test")
    sizes, faults = check_images(examples, "demo")
    assert not faults and not check_rows(examples)
    assert sizes[0] == [(84, 84)]
    assert open_image(examples[0].images[0]).tobytes() == rows("test", 1)[0]["image"].tobytes()
    assert len({e.image_keys for e in examples}) == len(examples)


def test_scenes_draw_the_same_every_time_and_their_boxes_hold_the_colour():
    table, again = scenes.rows("train", 40), scenes.rows("train", 40)
    assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in zip(table, again))  # noqa: B905
    other = {row["image"].tobytes() for row in scenes.rows("test", 40)}
    assert not other & {row["image"].tobytes() for row in table}
    empty = [row for row in table if "No Objects" in row["solution"]]
    assert 2 <= len(empty) <= 16
    for number in range(40):
        image, category, objects = scenes.scene(f"train/{number}")
        assert objects == sorted(objects, key=lambda entry: entry[1]) and objects
        boxes = [str(list(box)) for name, box in objects if name == category]
        assert all(box in table[number]["solution"] for box in boxes)
        for name, (x1, y1, x2, y2) in objects:
            wanted = scenes.COLOURS[name]
            assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
            centre = [round(v * scenes.SIZE / 2000) for v in (x1 + x2, y1 + y2)]
            pixel = image.getpixel(tuple(centre))
            assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) < 70


def test_odd_but_legal_json_and_doubled_files(tmp_path):
    picture().save(tmp_path / "0.png")
    row = {"image": "0.png", "problem": "one\u2028two\u0085three", "solution": "<answer>a</answer>"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert load(str(tmp_path), "train")[0].problem == row["problem"]
    write_json(tmp_path, "train.json", [row])
    with pytest.raises(ValueError, match=r"several files hold it: train\.json, train\.jsonl"):
        load(str(tmp_path), "train")


def test_big_endian_16_bit_grey_is_read(tmp_path):
    values = [0, 257 * 100, 65535]
    pixels = b"".join(value.to_bytes(2, "big") for value in values)
    Image.frombytes("I;16B", (3, 1), pixels).save(tmp_path / "a.tiff")
    out = open_image(tmp_path / "a.tiff")
    assert [out.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_rows_are_read_as_they_are_needed(tmp_path, pictures):
    """A data set larger than memory is never held whole while its images are checked."""
    write_json(tmp_path / "set", "train.json", pictures * 50)
    examples, alive, most = load(str(tmp_path / "set"), "train"), [], [0]

    class Watched:
        def __len__(self):
            return len(examples)

        def __getitem__(self, index):
            example = examples[index]
            alive.append(weakref.ref(example))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            return example

    check_images(Watched(), "images")
    assert len(alive) == 300 and most[0] < 50
