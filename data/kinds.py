"""What kind of solutions a data set holds, and which script trains them.

Not here: what a solution's text means (rewards/notations.py).
"""

import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence

from data.check import refuse_all
from data.errors import UserError
from data.rows import Fault, SplitRows

# Kind of solution -> the script that trains it: where data that was given to another one belongs.
SCRIPTS = {"class": "train_cls.py", "boxes": "train_det.py", "grounding": "train_det.py"}
OWN_SCRIPT = "a script of its own"


def read_kinds(splits: Sequence[SplitRows], read: Callable) -> list[list[str]]:
    """Reads the sound rows' solutions, once; what was in another notation is from then on in ours.

    splits: those to train on, one of each data set, then those held out in the same order. read: as
    rewards/notations.py's `read_solution`. Returns for each split the kinds of its sound rows'
    solutions. What was decided is in the notes of the data set's rows to train on. Raises UserError
    that lists the bad rows if solutions of boxes cannot be read.
    """
    trained = splits[: (len(splits) + 1) // 2]
    readings = [
        {row.index: read(row.solution) for row in rows.sound} if len(rows) else {}
        for rows in splits
    ]
    for rows, found in zip(splits, readings, strict=True):
        for index, reading in found.items():
            if reading.fault:
                todo = "correct the row, or remove it"
                rows.faults.append(Fault(index, rows[index].where, reading.fault, todo))
    if any(found and all(r.fault for r in found.values()) for found in readings):
        refuse_all(splits)
    lists = any(r.kind == "boxes" for found in readings for r in found.values() if not r.fault)
    kinds = []
    for number, (rows, found) in enumerate(zip(splits, readings, strict=True)):
        good = {index: reading for index, reading in found.items() if not reading.fault}
        if lists:  # some rows have several boxes, or none: each row's are a list
            good = {i: r.as_list() if r.listed else r for i, r in good.items()}
        kinds.append([reading.kind for reading in good.values()])
        for note in _on_notations(rows, good):
            beside = trained[number % len(trained)]
            beside.notes.append(note if rows is beside else f"held out: {note}")
        rows.solutions = {index: r.text for index, r in good.items() if r.notation}
    return kinds


def _on_notations(rows: SplitRows, readings: dict) -> list[str]:
    """Lines for the plan: notations that were read as ours, and labels that no reward reads.

    readings: by row, as of rewards/notations.py's `read_solution`.
    """
    notes, by_notation = [], defaultdict(list)
    for index, reading in readings.items():
        by_notation[reading.notation].append(index)
    by_notation.pop("", None)
    for notation, those in by_notation.items():
        found, read = rows[those[0]].solution[:60], readings[those[0]].text[:80]
        notes.append(
            f"{len(those)} solutions, such as {found!r}, are {notation}: read as corners x1, y1, "
            f"x2, y2, {read!r}. Answers must be written so, too"
        )
    several = [index for index, reading in readings.items() if len(set(reading.labels)) > 1]
    if several:
        labels = ", ".join(sorted(set(readings[several[0]].labels)))
        notes.append(
            f"labels are not read: boxes of {len(several)} rows have several, such as row "
            f"{several[0]} with {labels[:80]}; make a row of each category"
        )
    return notes


def one_kind(
    splits: Sequence[SplitRows],
    kinds: Sequence[Sequence[str]],
    trains: Sequence[str],
    own_flags: set[str],
    argv: Sequence[str],
) -> str:
    """The kind of all solutions.

    splits, kinds: as `read_kinds` takes and returns them; the other arguments as for
    `refuse_other_task`. Raises UserError as that does, and if splits or data sets differ.
    """
    of_source: dict[str, set[str]] = {}  # data set -> its kinds
    for rows, found in zip(splits, kinds, strict=True):
        of_source.setdefault(rows.source, set()).update(found)
    for rows, found in zip(splits, kinds, strict=True):
        alike = [source for source, others in of_source.items() if others == set(found)]
        some = alike if len(alike) < len(of_source) else ()
        refuse_other_task(rows, found, trains, own_flags, argv, some)
    first, *others = dict.fromkeys(kind for found in kinds for kind in found)
    if others and len(of_source) == 1:
        raise UserError(
            f"the splits differ: {first} to train on, {others[0]} held out; give both one kind "
            f"of solution"
        )
    if others:
        found = "; ".join(f"{source}: {' and '.join(sorted(k))}" for source, k in of_source.items())
        raise UserError(f"the data sets differ ({found}): one run trains one kind of solution")
    return first


def refuse_other_task(
    rows: SplitRows,
    kinds: Sequence[str],
    trains: Sequence[str],
    own_flags: set[str],
    argv: Sequence[str],
    sources: Sequence[str] = (),
) -> None:
    """Raises UserError unless the solutions are of one kind, and of one that the script trains.

    kinds: of each sound row's solution. trains: the kinds that the script trains. sources: the data
    sets of this kind, if others are not. Where all rows are of another kind, the message is the
    command of its script in SCRIPTS, with the user's flags save `own_flags`, which that script does
    not know; a mixture names the first row of each kind.
    """
    first = {kind: list(kinds).index(kind) for kind in dict.fromkeys(kinds)}
    if len(first) <= 1 and first.keys() <= set(trains):
        return

    def named(kind: str) -> str:
        row = rows.sound[first[kind]]
        found = (row.found or row.solution)[:80]
        return f"row {row.index} ({row.where}) holds {found!r}, a {kind} solution"

    if len(first) == 1:
        (kind,) = first
        raise UserError(
            f"{rows.name}: {named(kind)}, and so do all {len(kinds)} rows; this script trains "
            f"{' or '.join(trains)} solutions and would pay nothing for it. "
            + _command_for(kind, own_flags, argv, sources)
        )
    found = "; ".join(f"{named(kind)} ({list(kinds).count(kind)} rows)" for kind in first)
    scripts = ", ".join(f"{kind} for {SCRIPTS.get(kind, OWN_SCRIPT)}" for kind in first)
    raise UserError(
        f"{rows.name}: the solutions are of {len(first)} kinds: {found}. Make a data set of each "
        f"kind: {scripts}"
    )


def _command_for(
    kind: str, own_flags: set[str], argv: Sequence[str], sources: Sequence[str]
) -> str:
    """What to run for solutions of this kind: the user's command, without `own_flags`, and with
    `sources` in place of its data sets."""
    if kind not in SCRIPTS:
        return f"Train {kind} solutions by {OWN_SCRIPT}"
    flags, left_out, dropped = [], False, set()
    other = ("dataset_name", "dataset_weights") if sources else ()
    for word in argv:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            left_out = name in own_flags or name in other
            dropped |= {f"--{name}"} if name in own_flags else set()
        flags += [] if left_out else [word]
    flags += ["--dataset_name", *sources] if sources else []
    without = f" (without {', '.join(sorted(dropped))}, which it does not know)" * bool(dropped)
    here = "Leave it out here, and for it run" if sources else "Run instead"
    return f"{here}{without}:\n  torchrun {SCRIPTS[kind]} {shlex.join(flags)}"
