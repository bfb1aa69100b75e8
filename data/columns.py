"""Which column of a table is what: the ViRFT schema's names, and those that others use for them.

A name that can mean one thing only is read as that, and the plan says so; several that could be
one thing are refused, by name. Not here: conversations (chat.py), labels and boxes (labels.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.errors import UserError
from data.rows import IMAGE_COLUMNS, SplitRows
from data.table import Table

# What others call each column. One with ViRFT's own name is taken before these.
IMAGE = ("file_name", "filename", "image_file", "image_name", "img", "img_path", "photo", "picture")
IMAGE += ("filepath", "file_path", "file", "path")
PROBLEM = ("question", "prompt", "query", "instruction")
SOLUTION = ("answer", "ground_truth", "response")
LABEL = ("label", "labels", "class", "class_name", "category", "species", "breed", "variant")
LABEL += ("choice",)  # Label Studio's JSON-MIN
SCHEMA = (
    "A row has image (or images), problem and solution; or messages; or image and a class label; "
    "or objects"
)


class Roles(NamedTuple):
    """A table's columns by what they are; None for what it has not. notes: lines for the plan."""

    image: str | None
    problem: str | None
    solution: str | None
    label: str | None
    notes: list[str]


def roles_of(columns: Sequence[str]) -> Roles:
    """What each column is. Raises UserError if several could be the same thing."""
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    image = image or _only(columns, (*IMAGE_COLUMNS, *IMAGE), "image")
    problem = _only(columns, ("problem", *PROBLEM), "problem")
    solution = _only(columns, ("solution", *SOLUTION), "solution")
    label = None
    if solution is None:
        label = _only(columns, LABEL, "solution" if problem else "label")
    if problem and label:
        solution, label = label, None
    pairs = [(image, "image"), (problem, "problem"), (solution, "solution")]
    notes = [
        f"the column {column} is read as {role}"
        for column, role in pairs
        if column and column not in (role, *IMAGE_COLUMNS)
    ]
    return Roles(image, problem, solution, label, notes)


def _only(columns: Sequence[str], names: Sequence[str], role: str) -> str | None:
    """The column that is called `role`, or else the only one that has one of these names, in small
    letters or capitals; None without one. Raises UserError if there are several."""
    if names[0] in columns and names[0] == role:
        return role
    found = [column for column in columns if str(column).strip().lower() in names]
    if len(found) > 1:
        raise UserError(f"{' or '.join(found)} could be the {role}: rename one to {role}")
    return found[0] if found else None


def need(roles: Roles, columns: Sequence[str]) -> None:
    """Raises UserError if a column of the ViRFT schema is missing: which, and what to do."""
    missing = [name for name in ("image", "problem", "solution") if getattr(roles, name) is None]
    if missing:
        raise UserError(
            f"no column {', '.join(missing)}; it has {', '.join(map(str, columns))}. Rename the "
            f"column that holds it. {SCHEMA}"
        )


def renamed(roles: Roles):
    """A function, a row -> the row with its columns in the ViRFT schema's names; None if they have
    them already."""
    pairs = [("problem", roles.problem), ("solution", roles.solution)]
    pairs += [("image", roles.image)] if roles.image not in IMAGE_COLUMNS else []
    pairs = [(role, column) for role, column in pairs if column and column != role]
    if not pairs:
        return None
    return lambda row: row | {role: row.get(column) for role, column in pairs}


def plain_rows(table: Table, roles: Roles) -> SplitRows:
    """Rows in the ViRFT schema, whatever their columns are called. roles: of a table that has not
    these names."""
    rows = SplitRows(table.stored, table.folder, renamed(roles))
    used = {*IMAGE_COLUMNS, "problem", "solution", *roles[:4], "width", "height"}
    others = ", ".join(str(column) for column in table.columns if column not in used)
    rows.notes = [*roles.notes, *[f"columns that are not used: {others[:200]}"] * bool(others)]
    return rows
