"""The order in which rows are used: shuffled anew each epoch, resumable, no row dropped."""

from random import Random


class PromptStream:
    """Row numbers 0 to size - 1 without end, each once an epoch.

    An epoch's order follows from (seed, epoch) alone. Python promises that its generator's random()
    gives the same numbers in every version and on every platform, which shuffle() does not.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0, position: int = 0):
        assert size > 0
        self.size, self.seed = size, seed
        self.epoch, self.position = epoch, position
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        random = Random(f"{self.seed}/{self.epoch}").random
        return sorted(range(self.size), key=[random() for _ in range(self.size)].__getitem__)

    def next(self, count: int) -> list[int]:
        """The next `count` rows; they run on into the next epoch."""
        taken = []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + count - len(taken)]
            self.position += len(part)
            taken += part
        return taken

    def state(self) -> dict[str, int]:
        """What __init__ takes to go on from here."""
        return {"epoch": self.epoch, "position": self.position}
