"""One face for the two kinds of tables: a list of dicts, and a `datasets.Dataset`.

Not here: what the columns are (data/columns.py).
"""

from functools import cached_property
from pathlib import Path


class Table:
    """rows: a list of dicts, whose columns are the keys of all; or a `datasets.Dataset`.

    Set by whoever reads them from a file: folder, what image paths are relative to; places, the
    files of images that are elsewhere.
    """

    def __init__(self, rows):
        self.rows, self.folder = rows, Path()
        self.places: dict[str, Path] = {}
        self.is_list = isinstance(rows, list)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def columns(self) -> list[str]:
        if self.is_list:
            return sorted({key for row in self.rows for key in row})
        return self.rows.column_names

    @property
    def stored(self):
        """The rows as they are stored, images undecoded."""
        return self.rows if self.is_list else self.rows.with_format("arrow")

    def image_file(self, name: str) -> Path:
        return self.places.get(name, self.folder / name)

    def row(self, index: int) -> dict:
        return self.rows[index] if self.is_list else self.stored[index].to_pylist()[0]

    @property
    def first(self) -> dict:
        return self.row(0)

    def values(self, column: str) -> list:
        """A column's values, images undecoded."""
        if self.is_list:
            return [row.get(column) for row in self.rows]
        return self.rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()

    @cached_property
    def class_labels(self) -> dict[str, list[str]]:
        """Column -> the names of its classes, of the columns that `datasets` knows as labels."""
        if self.is_list:
            return {}
        import datasets

        features = self.rows.features.items()
        return {
            name: kind.names for name, kind in features if isinstance(kind, datasets.ClassLabel)
        }

    def category_names(self, column: str) -> list[str] | None:
        """The names of the categories in a column `objects`, if `datasets` knows them."""
        if self.is_list:
            return None
        feature = self.rows.features["objects"]
        feature = getattr(feature, "feature", feature)
        feature = feature[0] if isinstance(feature, list) else feature
        kind = feature.get(column) if isinstance(feature, dict) else None
        return getattr(getattr(kind, "feature", kind), "names", None)
