"""The order in which a run draws its rows: shuffled per epoch, resumable anywhere.

It deals out row indices and knows nothing of what a row holds.
"""

import hashlib


class PromptStream:
    """An endless sequence of row indices in which each epoch is a permutation of all rows.

    It depends on (size, seed) and the place in it, (epoch, position): `position` rows of `epoch`
    have been dealt. Raises ValueError where there is no such place among `size` rows.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0, position: int = 0):
        if size < 1:
            raise ValueError(f"a prompt stream needs at least one row, got {size}")
        if epoch < 0 or not 0 <= position < size:
            raise ValueError(
                f"epoch {epoch}, position {position} is no place in a data set of {size} rows; "
                "resume with the data set that the run was started with"
            )
        self.size, self.seed, self.epoch, self.position = size, seed, epoch, position
        self._order = self._shuffled()

    def next(self, count: int) -> list[int]:
        """Returns the next `count` row indices; they may span several epochs."""
        rows: list[int] = []
        while len(rows) < count:
            dealt = self._order[self.position : self.position + count - len(rows)]
            rows += dealt
            self.position += len(dealt)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
        return rows

    def state(self) -> dict[str, int]:
        """Returns {"epoch", "position"}: PromptStream(size, seed, **state) goes on from here."""
        return {"epoch": self.epoch, "position": self.position}

    def _shuffled(self) -> list[int]:
        # Sorted by hash, since a resumed run must find the same order on any machine: of Python's
        # generator only random() is promised to stay the same between versions, not shuffle().
        def digest(row: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{self.epoch}/{row}".encode()).digest()

        return sorted(range(self.size), key=digest)
