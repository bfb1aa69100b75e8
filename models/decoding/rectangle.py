"""Which samples are decoded together: slots, and how they follow the samples that are running.

The samples of a rollout have the slots of a rectangle, prompts x members. As samples end, the
rectangle and the batch, the slots that a decode step takes, become smaller; how is another question
on a CPU than on a GPU (`SmallestRectangle`, `HalvedRectangle`). All of it is decided on the host,
between steps.
"""

from dataclasses import dataclass

from models.mixer import Move


@dataclass(frozen=True)
class SmallestRectangle:
    """For a CPU, where another shape costs nothing: the batch is the samples that are running, in
    the smallest rectangle that holds them.

    look: tokens from one look at which samples have ended to the next. keys: a multiple of this is
    the bound of how many tokens a sample has.
    """

    look: int = 1
    keys: int = 16

    def sides(self, size: tuple[int, int], needed: tuple[int, int]) -> tuple[int, int]:
        """Of the next rectangle."""
        return needed

    def batch(self, samples: list[list[int | None]]) -> list[int]:
        """The slots that a step takes."""
        slots = [sample for members in samples for sample in members]
        return [slot for slot, sample in enumerate(slots) if sample is not None]

    def prompts(self, samples: list[list[int | None]]) -> list[int]:
        """The prompt of the first entries of the batch, of as many next ones, and so on: by its
        number in the rectangle."""
        return [slot // len(samples[0]) for slot in self.batch(samples)]

    def bound(self, tokens: int) -> int:
        """At least `tokens`."""
        return multiple(tokens, self.keys)


@dataclass(frozen=True)
class HalvedRectangle:
    """For a GPU, where a look waits and another shape must be captured: the batch is the whole
    rectangle, whose sides are halved once they can be. Samples that have ended are drawn on, and
    slots of nobody too.

    look: as above. keys: the bound of a sample's tokens is this, or twice, four times as much.
    """

    look: int = 16
    keys: int = 64

    def sides(self, size: tuple[int, int], needed: tuple[int, int]) -> tuple[int, int]:
        return halved(size[0], needed[0]), halved(size[1], needed[1])

    def batch(self, samples: list[list[int | None]]) -> list[int]:
        return list(range(len(samples) * len(samples[0])))

    def prompts(self, samples: list[list[int | None]]) -> list[int]:
        return list(range(len(samples)))

    def bound(self, tokens: int) -> int:
        return doubled(self.keys, tokens)


SHAPES = {"cpu": SmallestRectangle(), "cuda": HalvedRectangle()}


class Rectangle:
    """Which sample has which slot.

    samples: B lists of G numbers, b * G + g at first, None where a slot is nobody's. prompts: which
    one each list's is. batch: the slots that a step takes.
    """

    def __init__(self, prompts: int, group: int, shapes: SmallestRectangle | HalvedRectangle):
        self.shapes, self.nobody = shapes, prompts * group
        self.samples: list[list[int | None]] = [
            [b * group + g for g in range(group)] for b in range(prompts)
        ]
        self.prompts = list(range(prompts))
        self.batch = shapes.batch(self.samples)

    @property
    def is_empty(self) -> bool:
        return all(sample is None for members in self.samples for sample in members)

    def batch_samples(self) -> list[int]:
        """The number of each sample of the batch, `nobody` for a slot without one."""
        slots = [self.nobody if s is None else s for members in self.samples for s in members]
        return [slots[slot] for slot in self.batch]

    def batch_prompts(self) -> list[int]:
        """The prompt of the first entries of the batch, of as many next ones, and so on."""
        return [self.prompts[b] for b in self.shapes.prompts(self.samples)]

    def drop(self, ended: list[bool]) -> Move | None:
        """Takes out the samples that have ended. How the others move, None if the batch stays.

        A prompt's samples come to the front of its slots.
        """
        self.samples = [
            [None if sample is None or ended[sample] else sample for sample in members]
            for members in self.samples
        ]
        group, batch = len(self.samples[0]), {slot: i for i, slot in enumerate(self.batch)}
        size = len(self.samples), group
        running = [[g for g, s in enumerate(row) if s is not None] for row in self.samples]
        needed = sum(map(bool, running)), max(map(len, running))
        if not any(needed):
            return None
        sides = self.shapes.sides(size, needed)
        prompts, members = list(range(size[0])), [list(range(group))] * size[0]
        if sides != size:
            prompts = sorted(prompts, key=lambda b: not running[b])[: sides[0]]
            members = [running[b] + [0] * (sides[1] - len(running[b])) for b in prompts]
            self.samples = [
                [self.samples[b][g] for g in running[b]] + [None] * (sides[1] - len(running[b]))
                for b in prompts
            ]
            self.prompts = [self.prompts[b] for b in prompts]
        after = self.shapes.batch(self.samples)
        if sides == size and after == self.batch:
            return None
        self.batch = after
        before = [b * group + g for b, slots in zip(prompts, members, strict=True) for g in slots]
        return Move(prompts, members, [batch[before[slot]] for slot in after])


def multiple(count: int, of: int) -> int:
    """`count`, rounded up to a multiple."""
    return -(-count // of) * of


def doubled(size: int, needed: int) -> int:
    """`size`, doubled as often as `needed` wants."""
    while size < needed:
        size *= 2
    return size


def halved(size: int, needed: int) -> int:
    """`size`, halved and rounded up as often as `needed` allows."""
    while size > 1 and (half := (size + 1) // 2) >= needed:
        size = half
    return size


def few_lengths(length: int) -> int:
    """`length`, rounded up so that there are four from 256 to 512, four from 512 to 1,024, ...."""
    return multiple(length, max(64, 2 ** (length.bit_length() - 3)))
