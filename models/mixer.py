"""The door of a layer kind: what it must have, so that nothing else has to know it.

A decoder layer is a *mixer*, in which tokens see each other, and a feed-forward. A kind of mixer is
one file, models/attention.py say, with three classes:

- the mixer itself, an nn.Module over packed sequences, for training and for prefill;
- its `State`: what these layers remember of prompts and samples while completions are drawn. It
  alone knows how that lies in memory, how samples start from their prompt, how many bytes it takes;
- its `Step`: the same layers for one new token of each sample.

A family's file says which kind each of its decoder layers is (`mixer(config, index)`). The decoder,
the decode step, CUDA graphs, LoRA and the memory plan ask these classes and name no kind. State and
Step serve all layers of one kind: `layer` counts these, not all layers of the decoder.

The protocols are a description; a kind inherits nothing from here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models.config import QwenVLConfig
from models.packed_attention import Bounds


class Layout(NamedTuple):
    """Room for B prompts of up to P tokens, with G samples each, of up to C tokens.

    A sample's *slot* is b * G + g, for member g of prompt b.
    """

    prompts: int
    group: int
    longest: int
    capacity: int

    @property
    def slots(self) -> int:
        return self.prompts * self.group


class Move(NamedTuple):
    """How the samples that are still decoded move together when others have ended.

    prompts, members: the new slot of member g of prompt b is the old slot of member members[b][g]
    of prompt prompts[b]. entries: which entry of the old batch each entry of the new one is. The
    batch is the samples that a decode step takes, in the order of their slots.
    """

    prompts: list[int]
    members: list[list[int]]
    entries: list[int]


class Mixer(Protocol):
    """An nn.Module. NAME: its name in the decoder layer, as in published weights.

    JOINED: its linear layers that a Step multiplies by at once; their weights are laid out one
    after the other (models/decoding/storage.py). ADAPTED: those that LoRA adapts unless
    --lora_target_modules says otherwise. UNPACKED, if there: those that --load_in_4bit leaves as
    they are. FLOAT32, if there: parameters of its own that stay float32 in a bfloat16 model.
    `initialize(generator)`, if there: gives its own parameters, and no other module's, their first
    values.
    """

    NAME: str
    JOINED: tuple[tuple[str, ...], ...]
    ADAPTED: tuple[str, ...]
    State: type["State"]
    Step: type["Step"]

    def __init__(self, config: QwenVLConfig): ...

    @staticmethod
    def shared(
        config: QwenVLConfig, position_ids: Tensor, bounds: Bounds, dtype: torch.dtype
    ) -> Any:
        """What all layers of this kind need in one pass, made once: `forward` gets it."""

    @staticmethod
    def products(config: QwenVLConfig, rows: tuple[tuple[int, ...], ...]) -> int:
        """Floating point operations of the matrix products between tokens, in a layer's forward
        pass over packed rows [P, C1, ..., CG] (models/flops.py); linear layers do not count."""

    def forward(
        self,
        x: Tensor,
        shared: Any,
        store: Callable[..., None] | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """(T, hidden) -> (T, hidden), or (R, hidden) at the packed positions `read` (R,) int64.

        A completion continues its prompt, which is there once. store: in a prefill, to be called
        with what `State.store` takes.
        """


class State(Protocol):
    """What all layers of one kind remember of B prompts and their samples."""

    def __init__(self, config: QwenVLConfig, layout: Layout, memory: Tensor, dtype: torch.dtype):
        """memory: (layers, at least `nbytes`) uint8, all 0; it stays where it is, and whatever
        must outlive a step is in it. dtype: the model's."""

    @staticmethod
    def nbytes(config: QwenVLConfig, layout: Layout, dtype: torch.dtype) -> int:
        """Bytes of one layer."""

    def expect(self, first: int, lengths: list[int]) -> None:
        """The next prefill packs these prompts, from the `first`-th on. lengths: tokens."""

    def store(self, layer: int, *kept: Tensor) -> None:
        """Keeps what a layer's `forward` hands over, so that each prompt's samples start from it.

        Slots are those of the first layout: all samples of all prompts.
        """

    def index(self, slots: list[int], lengths: list[int], tokens: int) -> tuple[Tensor, ...]:
        """Where a step finds each entry of the batch: tensors on the device, which `Step.begin` may
        change in place. Not called before a step: only where the batch changes.

        slots: of the batch. lengths: tokens of the layout's prompts. tokens: how many of its own
        each sample has in the state.
        """

    def between(self, tokens: int) -> None:
        """Called before each step, after `shrink` if that is called too; not a part of the step,
        so that it may do now and then what a CUDA graph cannot choose to do. tokens: as above."""

    def shrink(self, move: Move, layout: Layout, tokens: int) -> None:
        """Moves what stays to where the smaller `layout` has it, within the same memory."""


class Step(Protocol):
    """All layers of one kind for one new token of each sample, with the weights of this moment.

    Shapes depend on the batch, the layout and `bound` alone, and nothing waits for the device, so
    that a step can be captured in a CUDA graph. tensors: the weights that it reads; some are
    copies, which are refreshed where they lie.
    """

    tensors: list[Tensor]

    def __init__(self, config: QwenVLConfig, mixers: Sequence[Mixer], device: torch.device): ...

    @staticmethod
    def operations(config: QwenVLConfig) -> int:
        """What a GPU launches for a decoder layer of this kind and a token, its feed-forward and
        norms with it; adapters add to it."""

    def begin(
        self,
        state: State,
        index: tuple[Tensor, ...],
        positions: Tensor,
        tokens: Tensor,
        bound: int,
    ) -> Any:
        """What all layers need for this token, made once.

        positions: (U,) int64, of the token, the same for M / U entries of the batch in turn.
        tokens: (1,) int64, how many of its own each sample had before; bound: no sample has more
        with this one.
        """

    def __call__(self, layer: int, x: Tensor, residual: Tensor, shared: Any) -> Tensor:
        """`residual` (M, hidden) with what the layer makes of x (M, hidden) added in place."""
