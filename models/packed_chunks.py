"""Packed rows cut into chunks: which tokens a recurrence computes together, and in what order.

Prompts come first, then the completions, which begin where their prompt ends. Everything here is
indexes, made once for all layers of a pass.

Shapes: T packed tokens; N chunks of L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from models.config import DeltaHeads
from models.transfer import to_device

LEAST, CHUNK = 16, 64  # tokens of a chunk
AT_ONCE = 4096  # tokens of rows that are computed together, unless one row is longer


class Chunks(NamedTuple):
    """Where the chunks of some sequences lie, longest sequence first: all first chunks, then all
    second ones, and so on.

    index: (N, L) int64, the packed positions of a chunk's tokens. real: the same shape, bool, False
    for what fills up a sequence's last chunk, whose index is some token's. counts: how many
    sequences have a first chunk, a second one, .... start: (sequences,) int64, which of the states
    before it each sequence begins with; None for prompts, which begin with 0.
    """

    index: Tensor
    real: Tensor
    counts: tuple[int, ...]
    start: Tensor | None


@dataclass(frozen=True)
class PackedChunks:
    """The chunks of packed rows, [P, C1, ..., CG] tokens each.

    longest: tokens of a chunk, L; fewer if the prompts, or the completions, are all short. kernel:
    of the convolution. first: where these rows begin in a longer packed tensor.
    """

    rows: tuple[tuple[int, ...], ...]
    longest: int
    kernel: int
    device: torch.device
    first: int = 0

    @property
    def tokens(self) -> slice:
        """Those of these rows in the longer tensor."""
        return slice(self.first, self.first + sum(map(sum, self.rows)))

    @cached_property
    def sequences(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(tokens, first packed position, row) of the prompts, and of the completions; the longest
        first."""
        prompts, completions, begin = [], [], 0
        for row, lengths in enumerate(self.rows):
            for number, length in enumerate(lengths):
                (completions if number else prompts).append((length, begin, row))
                begin += length
        longest_first = [sorted(some, key=lambda s: -s[0]) for some in (prompts, completions)]
        return longest_first[0], [s for s in longest_first[1] if s[0]]

    @cached_property
    def _place(self) -> Tensor:
        return torch.tensor([row for _, _, row in self.sequences[0]]).argsort()

    @cached_property
    def place(self) -> Tensor:
        """Where each row's prompt is in the order of `sequences`, (rows,) int64."""
        return to_device(self._place, self.device)

    @cached_property
    def _on_host(self) -> list[Chunks]:
        return [self._chunks(some) for some in self.sequences if some]

    @cached_property
    def chunks(self) -> list[Chunks]:
        """Of the prompts, and of the completions if there are any."""

        def moved(x):
            return to_device(x, self.device) if isinstance(x, Tensor) else x

        return [Chunks(*map(moved, part)) for part in self._on_host]

    def _chunks(self, sequences: list[tuple[int, int, int]]) -> Chunks:
        length, first, row = (torch.tensor(x) for x in zip(*sequences, strict=True))
        size = min(self.longest, max(LEAST, 1 << (sequences[0][0] - 1).bit_length()))
        chunks = -(-length // size)
        index, real, counts = [], [], []
        for i in range(int(chunks[0])):
            counts.append(int((chunks > i).sum()))
            at = i * size + torch.arange(size)  # within each sequence
            real.append(at < length[: counts[-1], None])
            index.append((first[: counts[-1], None] + at).masked_fill(~real[-1], 0))
        return Chunks(
            index=torch.cat(index),
            real=torch.cat(real),
            counts=tuple(counts),
            start=self._place[row] if sequences is self.sequences[1] else None,
        )

    @cached_property
    def chunk_position(self) -> Tensor:
        """Where each packed token is in the chunks of the prompts and then of the completions, end
        to end, (T,) int64."""
        own = torch.cat([part.index.flatten() for part in self._on_host])
        real = torch.cat([part.real.flatten() for part in self._on_host])
        found = torch.empty(sum(map(sum, self.rows)), dtype=torch.int64)
        found[own[real]] = real.nonzero().squeeze(1)
        return to_device(found, self.device)

    def positions(self, sequences: list[tuple[int, int, int]], at: Tensor) -> tuple[Tensor, Tensor]:
        """Packed positions of tokens of these sequences, (sequences, len(at)) int64, and whether
        there are such. at: within each, negative for tokens before it, which are its prompt's."""
        _, first, row = (torch.tensor(x) for x in zip(*sequences, strict=True))
        begin = torch.tensor([first for _, first, _ in self.sequences[0]])[self._place][row]
        end = begin + torch.tensor([lengths[0] for lengths in self.rows])[row]
        shared = torch.where(first == begin, first, end)[:, None]  # where what is before it ends
        where = torch.where(at < 0, shared + at, first[:, None] + at)
        real = where >= begin[:, None]
        return where.masked_fill(~real, 0), real

    @cached_property
    def firsts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens whose convolution window is not contiguous in the packed tensor: each
        sequence's first ones. Their packed positions, (F,) int64; those of their windows, (F,
        kernel) int64; and whether these exist."""
        token, window, real = [], [torch.empty(0, self.kernel).long()], []
        real.append(window[0].bool())
        for number in range(self.kernel - 1):
            longer = [s for some in self.sequences for s in some if s[0] > number]
            if longer:
                token += [first + number for _, first, _ in longer]
                at = torch.arange(number + 1 - self.kernel, number + 1)
                for kept, part in zip((window, real), self.positions(longer, at), strict=True):
                    kept.append(part)
        found = torch.tensor(token, dtype=torch.int64), torch.cat(window), torch.cat(real)
        return tuple(to_device(x, self.device) for x in found)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The packed positions of each prompt's last tokens that the convolution sees of the token
        after it, (rows, kernel - 1) int64, and which of them exist."""
        in_turn = sorted(self.sequences[0], key=lambda s: s[2])
        after = [(0, first + length, row) for length, first, row in in_turn]
        found = self.positions(after, torch.arange(1 - self.kernel, 0))
        return tuple(to_device(x, self.device) for x in found)


def packed_chunks(
    rows: Sequence[tuple[int, ...]], heads: DeltaHeads, device: torch.device
) -> list[PackedChunks]:
    """The rows in as few parts as AT_ONCE allows, so that what a part forms for a moment is little
    beside what a pass keeps. Chunks are not longer than keys are wide: what is done for each pair
    of tokens would outweigh what is done with the states."""
    longest = min(CHUNK, max(LEAST, heads.key_dim))
    parts, first, tokens = [[]], 0, 0
    for row in rows:
        if parts[-1] and tokens + sum(row) > AT_ONCE:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += sum(row)
    made = []
    for part in parts:
        made.append(PackedChunks(tuple(part), longest, heads.kernel, device, first))
        first = made[-1].tokens.stop
    return made
