"""Where a completion ends: at an end token, or at the token that completes a stop string.

Tokens are not text: "</answer>" may come as "</", "answer" and ">\n", and a token may hold half a
character. Decoding every running sample at each look would bring all tokens to the host. So stop
strings are searched for in bytes, by an automaton (Aho and Corasick, 1975) whose state is how much
of which string has come, and the bytes of a whole token are one step of it: a table on the device.

Only what is sampled counts: the automaton starts behind the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from data.errors import UserError, shown
from models.transfer import to_device

END, START = 0, 1  # states: a string is complete, nothing of any has come
LONGEST = 250  # bytes of all strings: with END a state is then one byte of the table


def check_stop(texts: Sequence[str]) -> None:
    """Raises UserError for strings that cannot be searched for."""
    for text in texts:
        if not text:
            raise UserError("--stop is an empty text, which would end every completion at once")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"--stop {shown(text)} is no UTF-8 text")
    size = sum(len(text.encode()) for text in texts)
    if size > LONGEST:
        raise UserError(f"--stop: {size:,} bytes of UTF-8 in all; at most {LONGEST}")


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a completion. Two with the same strings are equal.

    strings: in UTF-8. pieces: by token id, the bytes that it adds to a text. table: (states, V)
    uint8, the state after a token by the state before it.
    """

    strings: tuple[bytes, ...]
    pieces: list[bytes] = field(compare=False, repr=False)
    table: Tensor = field(compare=False, repr=False)

    def are_in(self, completion_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens holds one of the strings."""
        text = b"".join(self.pieces[token] for token in completion_ids)
        return any(string in text for string in self.strings)


@lru_cache(1)  # a run has one processor and asks at each evaluation
def read_stop(processor, texts: tuple[str, ...]) -> StopStrings | None:
    """The strings for a processor's tokens; None if there are none.

    Raises UserError as `check_stop`, and if the tokenizer is not byte-level BPE.
    """
    if not texts:
        return None
    check_stop(texts)
    strings = tuple(dict.fromkeys(text.encode() for text in texts))
    pieces = token_bytes(processor.tokenizer, processor.config.vocab_size)
    table = fold(automaton(strings), pieces)
    table[:, processor.stop_ids] = END
    return StopStrings(strings, pieces, table)


def token_bytes(tokenizer, count: int) -> list[bytes]:
    """The bytes that each token id below `count` adds to a decoded text, none beyond the tokenizer.

    Byte-level BPE writes each byte as a printable character; an added token that holds another
    character stands for its own UTF-8. Raises UserError for another kind of tokenizer.
    """
    from tokenizers.decoders import ByteLevel

    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        raise UserError("--stop needs a byte-level BPE tokenizer, as the Qwen models have")
    byte_of = {ord(char): byte for byte, char in enumerate(byte_characters())}
    # a character that stands for no byte becomes one that Latin-1 does not have
    code = {code: 0xFFFF for code in range(256)} | byte_of
    pieces = []
    for token in tokenizer.convert_ids_to_tokens(list(range(count))):
        try:
            pieces.append((token or "").translate(code).encode("latin-1"))
        except UnicodeEncodeError:
            pieces.append(token.encode())
    return pieces


def byte_characters() -> list[str]:
    """How byte-level BPE writes each byte: printable Latin-1 as itself, others from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def automaton(strings: Sequence[bytes]) -> Tensor:
    """(states, 256) int64: the next state by the state and a byte. None leads out of END."""
    # a string that holds another is never the first to be complete
    strings = [s for s in strings if not any(other != s and other in s for other in strings)]
    parts = sorted({s[:size] for s in strings for size in range(len(s))}, key=len)
    state = {part: START + i for i, part in enumerate(parts)} | {s: END for s in strings}
    rows = {}
    for part in parts:  # what has come; b"" first
        # a byte that continues no string leads where it leads from the longest end of `part` that
        # begins a string
        shorter = next((part[i:] for i in range(1, len(part) + 1) if part[i:] in rows), None)
        row = [START] * 256 if shorter is None else list(rows[shorter])
        for byte in range(256):
            row[byte] = state.get(part + bytes([byte]), row[byte])
        rows[part] = row
    return torch.tensor([[END] * 256, *rows.values()])


def fold(steps: Tensor, pieces: Sequence[bytes]) -> Tensor:
    """(states, V) uint8: the state after all bytes of a token. steps: as `automaton` returns."""
    sizes = torch.tensor([len(piece) for piece in pieces])
    order = sizes.argsort(descending=True)
    starts = (sizes.cumsum(0) - sizes)[order]
    flat = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8).long()
    longest = int(sizes.max())
    # the n-th byte of those tokens that have one, which come first
    nth = [flat[starts[: (sizes > n).sum()] + n] for n in range(longest)]
    table = torch.empty(len(steps), len(pieces), dtype=torch.uint8)
    for before in range(len(steps)):
        state = torch.full((len(pieces),), before)
        for byte in nth:
            state[: len(byte)] = steps[state[: len(byte)], byte]
        table[before, order] = state.to(torch.uint8)
    return table


class Ends:
    """Finds the ends of N completions, tokens of a look at a time; never waits for the device."""

    def __init__(
        self, stop_ids: Sequence[int], stop: StopStrings | None, count: int, device: torch.device
    ):
        self.stop_ids = to_device(torch.tensor(stop_ids, dtype=torch.int64), device)
        self.table = None if stop is None else to_device(stop.table, device)
        self.state = torch.full((count,), START, device=device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(N, n) bool: whether a completion ends with a token, or has ended before it.

        tokens: (N, n) int64, those drawn since the last call. Without stop strings what has ended
        before is not known.
        """
        if self.table is None:
            return torch.isin(tokens, self.stop_ids)
        states = []
        for token in tokens.unbind(1):
            self.state = self.table[self.state, token].long()
            states.append(self.state)
        return torch.stack(states, 1) == END
