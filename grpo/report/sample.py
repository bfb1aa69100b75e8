"""Which steps, held-out rows and groups of a long run a report shows."""

from collections.abc import Sequence

POINTS = 1000  # of a curve
CARDS = 60  # held-out rows
GROUPS = 24  # of training
SAMPLES = 16  # completions of a group
LETTERS = 500_000  # of all completions of all groups


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 to count - 1 at even distances, the first and the last among them;
    all of them if count <= wanted."""
    if count <= wanted:
        return list(range(count))
    if wanted == 1:
        return [0]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def extremes(values: Sequence[float | None], points: int = POINTS) -> list[int]:
    """Indices of about `points` values that show a curve: the first, the last, and of each of many
    stretches of equal length the lowest and the highest. So no spike is lost, and each value shown
    is one that was logged. All indices if there are no more than `points`."""
    if len(values) <= points:
        return list(range(len(values)))
    stretches = max(1, points // 2 - 1)
    chosen = {0, len(values) - 1}
    for number in range(stretches):
        start, end = (i * len(values) // stretches for i in (number, number + 1))
        known = [i for i in range(start, end) if values[i] is not None]
        if known:
            chosen |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
    return sorted(chosen)


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """For each index the mean of the last `window` values up to it, None if all of them are."""
    means, total, known = [], 0.0, 0
    for index, value in enumerate(values):
        if value is not None:
            total, known = total + value, known + 1
        leaving = values[index - window] if index >= window else None
        if leaving is not None:
            total, known = total - leaving, known - 1
        means.append(total / known if known else None)
    return means


def pick_groups(groups: list[tuple[int, int]], wanted: int = GROUPS) -> list[tuple[int, int]]:
    """At most `wanted` of the groups (step, prompt), spread evenly over the steps. Each step shows
    another prompt than the one before, not always the first."""
    by_step: dict[int, list[tuple[int, int]]] = {}
    for step, prompt in groups:
        by_step.setdefault(step, []).append((step, prompt))
    steps = sorted(by_step)
    rounds = min(wanted, len(steps))
    if not rounds:
        return []
    picked = []
    for number, index in enumerate(evenly(len(steps), rounds)):
        of_step = by_step[steps[index]]
        share = wanted // rounds  # more than one of a step where there are few steps
        first = number % len(of_step)
        picked += [of_step[(first + i) % len(of_step)] for i in range(min(share, len(of_step)))]
    return sorted(picked)


def rank_rows(before: dict[int, float], after: dict[int, float]) -> list[int]:
    """All rows, worst and most changed first: in turns the one with the lowest value in `after` and
    the one with the largest change since `before`. Ties by the row's number."""
    worst = sorted(after, key=lambda row: (after[row], row))
    changed = sorted(after, key=lambda row: (-abs(after[row] - before.get(row, after[row])), row))
    turns = [row for pair in zip(worst, changed, strict=True) for row in pair]
    return list(dict.fromkeys(turns))


def shortened(text: str | None, letters: int) -> str | None:
    """The text, or its first `letters` characters and how many are left out."""
    if text is None or len(text) <= letters:
        return text
    return f"{text[:letters]} ... ({len(text) - letters:,} more characters)"
