"""Which samples are decoded together, and in what shapes."""

from typing import NamedTuple


class Shapes(NamedTuple):
    """How rows follow the samples that go on.

    look: tokens from one look at what has ended to the next. halves: rows are all places of a
    rectangle (prompts x members) whose sides are halved once they can be, so that few shapes occur;
    else they are the samples that go on, in the smallest rectangle. keys: a sample looks at so many
    keys of its own, or twice, three times as many; with halves twice, four times.
    """

    look: int
    halves: bool
    keys: int


# A look waits for a GPU to catch up, a new shape has to be captured; neither costs a CPU anything.
SHAPES = {"cpu": Shapes(1, False, 16), "cuda": Shapes(16, True, 64)}


def multiple(count: int, of: int) -> int:
    """`count`, rounded up to a multiple."""
    return -(-count // of) * of


def doubled(size: int, needed: int) -> int:
    """`size`, doubled as often as `needed` wants."""
    while size < needed:
        size *= 2
    return size


def few_lengths(length: int) -> int:
    """`length`, rounded up so that there are four from 256 to 512, four from 512 to 1,024, ...."""
    return multiple(length, max(64, 2 ** (length.bit_length() - 3)))


def halved(size: int, needed: int) -> int:
    """`size`, halved and rounded up as often as `needed` allows."""
    while size > 1 and (half := (size + 1) // 2) >= needed:
        size = half
    return size


class Table:
    """Which sample is at each place of the cache's rectangle; on the host.

    samples: B lists of G numbers, None where a place is nobody's.
    """

    def __init__(self, samples: list[list[int | None]]):
        self.samples = samples
        self.prompts = list(range(len(samples)))  # which one each list's is
        self.nobody, self.group = sum(map(len, samples)), len(samples[0])

    @property
    def left(self) -> bool:
        return any(sample is not None for row in self.samples for sample in row)

    def drop(self, ended: list[bool]) -> bool:
        """Takes out the samples that have ended. Whether there were any."""
        before = self.samples
        self.samples = [
            [None if sample is None or ended[sample] else sample for sample in row]
            for row in before
        ]
        return self.samples != before

    def smaller(self, halves: bool) -> tuple[list[int], list[list[int]]] | None:
        """Makes the rectangle smaller if it can be: the places that stay, as for `KVCache.shrink`.

        A prompt's samples come to the front.
        """
        size = len(self.samples), len(self.samples[0])
        alive = [[g for g, sample in enumerate(row) if sample is not None] for row in self.samples]
        needed = sum(map(bool, alive)), max(map(len, alive))
        wanted = tuple(map(halved, size, needed)) if halves else needed
        if wanted == size:
            return None
        kept = sorted(range(size[0]), key=lambda b: not alive[b])[: wanted[0]]
        members = [alive[b] + [0] * (wanted[1] - len(alive[b])) for b in kept]
        self.samples = [
            [self.samples[b][g] for g in alive[b]] + [None] * (wanted[1] - len(alive[b]))
            for b in kept
        ]
        self.prompts = [self.prompts[b] for b in kept]
        return kept, members
