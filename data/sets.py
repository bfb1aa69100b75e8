"""Several data sets at once: their short names, and their rows one after another.

Not here: reading one (data/load.py), and in which order prompts are taken (data/stream.py).
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from itertools import count as count_from
from pathlib import Path

from data.rows import Row, SplitRows
from data.tables import SUFFIX

FILES = {*SUFFIX, ".json", ".yaml", ".yml", ".xml", ".zip"}  # what is no part of a set's name
TAKEN = ("AP", "AP50")  # words that stand in a metric's name where a data set's name does
LONGEST = 60  # characters of a name: files are named after it, too


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each data set, for metrics and messages: the last part of its path or hub name.

    Where several have the same, the folder's above; where that does not tell them apart, all parts
    that do, or a number. Names hold letters, digits, ".", "_" and "-" alone, at most LONGEST and a
    number.
    """
    parts = [_parts(source) for source in sources]
    names = [of_one[-1] for of_one in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        count = Counter(names)
        same = [i for i, name in enumerate(names) if count[name] > 1]
        if not same:
            break
        above = {i: parts[i][-depth] if len(parts[i]) >= depth else "" for i in same}
        others = {name for i, name in enumerate(names) if i not in above}
        alone = depth == 2 and len(set(above.values()) - others) == len(same)
        for i in same:
            joined = "_".join(filter(None, (above[i], names[i])))
            names[i] = above[i] if alone and above[i] else joined
    names = [name[:LONGEST] for name in names]
    for i, name in enumerate(names):  # what is still the same
        numbered = (f"{name}-{number}" for number in count_from(2))
        while names[i] in (*names[:i], *TAKEN):
            names[i] = next(numbered)
    return names


def _parts(source: str) -> list[str]:
    """The parts of a path or hub name that a data set may be called by, the last one last."""
    path = Path(source.removeprefix("demo:")).expanduser()
    path = Path(os.path.abspath(path)) if os.path.exists(path) else path
    last = path.stem if path.suffix.lower() in FILES else path.name
    parts = [re.sub(r"[^\w.-]+", "_", part).strip("_") for part in (*path.parts[:-1], last)]
    return [part for part in parts if part.strip(".")] or ["data"]


class JoinedRows(Sequence[Row]):
    """The rows of several data sets, one after another, each with its set's name and its own index.

    parts: the rows of each. notes: lines for the plan that are about all of them.
    """

    def __init__(self, parts: Sequence[SplitRows]):
        self.parts, self.notes = list(parts), []
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part] + len(self.parts[part])]

    def first(self, count: int | None) -> list[Row]:
        """The first `count` rows of each data set; None or 0: all of them."""
        return [row for part in self.parts for row in part.first(count)]

    @property
    def sizes(self) -> list[list[tuple[int, int]]]:
        """(width, height) in pixels of each row's images."""
        return [sizes for part in self.parts for sizes in part.sizes]

    @property
    def wording(self):
        """How prompts were worded that were made here: by the same flags for all."""
        return self.parts[0].wording
