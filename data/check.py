"""Every row looked at before a weight is loaded, every image decoded once."""

import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.images import content_key, open_image
from data.virft import Example

SHOWN = 10  # faults listed in a refusal


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: its number, the file, what was found, what to do."""

    row: int
    where: str
    found: str
    todo: str


def check_rows(examples: Sequence[Example]) -> list[Fault]:
    """Rows whose problem or solution is no text, or that have no image."""
    faults = []
    for example in examples:
        for name in ("problem", "solution"):
            text = getattr(example, name)
            if not isinstance(text, str) or not text.strip():
                found = f"{name} is {str(text)[:80]!r}" if text else f"{name} is empty"
                todo = f"give the row a {name} as text, or remove it"
                faults.append(Fault(example.index, example.where, found, todo))
        if not example.images:
            todo = "give the row an image, or remove it"
            faults.append(Fault(example.index, example.where, "no image", todo))
        for image in example.images:
            if not isinstance(image, bytes | Path):
                found = f"the image is {type(image).__name__} {str(image)[:60]!r}"
                todo = "store a path or an encoded image"
                faults.append(Fault(example.index, example.where, found, todo))
    return faults


def check_images(
    examples: Sequence[Example], description: str
) -> tuple[list[list[tuple[int, int]]], list[Fault]]:
    """Decodes every image once, in parallel, with a progress bar on stderr.

    What was found good is remembered by content in a cache file, so that a second run only hashes.
    Returns each row's image sizes (width, height in pixels, upright) and the faults; what is no
    image at all is left to `check_rows`.
    """
    known = _read_cache()
    new: dict[str, tuple[int, int]] = {}

    def look(example: Example):
        sizes, faults = [], []
        for image in example.images:
            if not isinstance(image, bytes | Path):
                continue
            try:
                key = content_key(image)
                if key not in known and key not in new:
                    new[key] = open_image(image).size
                sizes.append(known.get(key) or new[key])
            except ValueError as error:
                todo = "replace the file or remove the row"
                faults.append(Fault(example.index, example.where, str(error), todo))
        return sizes, faults

    try:
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            looked = pool.map(lambda row: look(examples[row]), range(len(examples)))
            looked = list(tqdm(looked, description, len(examples), leave=False, unit="row"))
    finally:  # an interrupted check is not lost
        _write_cache(new)
    return [sizes for sizes, _ in looked], [fault for _, faults in looked for fault in faults]


def refuse(faults: Sequence[Fault], dataset_name: str, split: str) -> None:
    """Raises ValueError where there is a fault: the first bad rows, and how many more there are."""
    if not faults:
        return
    faults = sorted(faults, key=lambda fault: fault.row)
    lines = [f"  row {f.row} ({f.where}): {f.found}; {f.todo}" for f in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    count = len({fault.row for fault in faults})
    raise ValueError(f"{dataset_name}, split {split!r}: {count} bad rows\n" + "\n".join(lines))


def cache_file() -> Path:
    """Where sizes of images found good are remembered: lines of sha256, width, height."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpo-vlm" / "checked-images-1.txt"


def _read_cache() -> dict[str, tuple[int, int]]:
    try:
        lines = cache_file().read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # no cache, or one of no use: the images are decoded
        return {}
    known = {}
    for line in lines:
        words = line.split()  # a line cut short by a kill is passed over
        if len(words) == 3 and len(words[0]) == 64 and words[1].isdigit() and words[2].isdigit():
            known[words[0]] = (int(words[1]), int(words[2]))
    return known


def _write_cache(new: dict[str, tuple[int, int]]) -> None:
    if not new:
        return
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with cache_file().open("a") as file:
            file.writelines(f"{key} {w} {h}\n" for key, (w, h) in new.items())
    except OSError as error:
        tqdm.write(f"note: images will be checked again next time ({cache_file()}: {error})")


def refuse_other_task(
    kinds: Sequence[str],
    mine: set[str],
    own_flags: set[str],
    script: str,
    other: str,
    examples: Sequence[Example],
    argv: Sequence[str],
    dataset_name: str,
    split: str,
) -> None:
    """Raises ValueError where solutions are of a kind that `script` does not train.

    kinds: what each row's solution is. Where all are of one kind, the message is the other script's
    command with the user's flags, save `own_flags`, which that script does not know; a mixture
    names the first row of each kind.
    """
    wrong = [row for row, kind in enumerate(kinds) if kind not in mine]
    if not wrong:
        return

    def named(row: int) -> str:
        return f"row {row} ({examples[row].where}) holds {examples[row].solution[:80]!r}"

    opening = f"{dataset_name}, split {split!r}: "
    if len(set(kinds)) == 1:
        flags, left_out, dropped = [], False, set()
        for word in argv:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                left_out = name in own_flags
                dropped |= {f"--{name}"} & {f"--{own}" for own in own_flags}
            flags += [] if left_out else [word]
        without = f" (without {', '.join(sorted(dropped))}, which it does not know)"
        raise ValueError(
            f"{opening}{named(0)}, a {kinds[0]} solution, and so do all {len(kinds)} rows; "
            f"{script} would pay nothing for it. Run instead{without if dropped else ''}:\n"
            f"  torchrun {other} {shlex.join(flags)}"
        )
    first = {kind: list(kinds).index(kind) for kind in dict.fromkeys(kinds)}
    found = "; ".join(
        f"{named(row)}, a {kind} solution ({list(kinds).count(kind)} rows)"
        for kind, row in first.items()
    )
    raise ValueError(
        f"{opening}the solutions are of {len(first)} kinds: {found}. Make a data set of each kind; "
        f"class solutions are for train_cls.py, boxes and grounding for train_det.py"
    )
