"""One attention for packed tokens, on every device.

A packed tensor holds several *rows* end to end. A row is a prompt followed by the completions that
share it: the prompt attends to itself causally, each completion to the prompt and, causally, to
itself. A plain sequence is a row without completions; an image is a row without causality.

Three ways of computing the same numbers: the `flash-attn` package and PyTorch's own
variable-length FlashAttention (both on CUDA in half precision; the shared prompt is a gather of
keys), and SDPA row by row, a row's completions lengthened to its longest (anywhere, any float
dtype). There is no dropout and no sliding window.
"""

import inspect
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa")


@dataclass(frozen=True)
class Bounds:
    """Which keys each packed query sees.

    rows: for each row the lengths (tokens) of its prompt and of its completions: [P, C1, ..., CG].
    causal: False lets every token of a row see the whole row; such rows have no completions.
    implementation: "flash_attention_2" or "sdpa", see `choose_implementation`.
    """

    rows: tuple[tuple[int, ...], ...]
    device: torch.device
    causal: bool = True
    implementation: str = "sdpa"

    def __post_init__(self):
        assert self.causal or all(len(row) == 1 for row in self.rows)

    @cached_property
    def slices(self) -> list[slice]:
        """Where each row lies in the packed tensor."""
        slices, start = [], 0
        for row in self.rows:
            slices.append(slice(start, start + sum(row)))
            start += sum(row)
        return slices

    @cached_property
    def rectangles(self) -> list[tuple[Tensor, Tensor] | None]:
        """For each row its completions as a (G, longest) rectangle; None for a plain row.

        Packed indices of the rectangle, row by row, each completion's last token repeated to its
        end; and where in it the completions' own tokens lie, in order.
        """
        rectangles = []
        for where, (prompt, *completions) in zip(self.slices, self.rows, strict=True):
            if not completions:
                rectangles.append(None)
                continue
            lengths, step = torch.tensor(completions), torch.arange(max(completions))
            starts = where.start + prompt + lengths.cumsum(0) - lengths
            index = starts[:, None] + step.minimum(lengths[:, None] - 1)
            own = (step < lengths[:, None]).flatten().nonzero().squeeze(1)
            rectangles.append((index.flatten().to(self.device), own.to(self.device)))
        return rectangles

    @cached_property
    def _masks(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def mask(self, prompt: int, completion: int, dtype: torch.dtype) -> Tensor:
        """(C, P + C) of 0 and -inf: what a completion sees of its prompt and of itself."""
        sizes = (prompt, completion)
        if sizes not in self._masks:  # made for the first layer, kept for the others
            own = torch.full((completion, completion), float("-inf"), dtype=dtype).triu(1)
            mask = torch.cat((own.new_zeros(completion, prompt), own), 1)
            self._masks[sizes] = mask.to(self.device)
        return self._masks[sizes]

    @cached_property
    def varlen(self) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
        """(key_index, cu_seqlens_q, cu_seqlens_k, max_q, max_k) for a variable-length kernel.

        Every prompt and every completion is a sequence of queries of its own; a completion's keys
        are its prompt's, then its own. key_index gathers them, None where nothing is shared.
        """
        q_lengths, k_lengths, index = [], [], []
        for where, (prompt, *completions) in zip(self.slices, self.rows, strict=True):
            start = where.start
            q_lengths.append(prompt)
            k_lengths.append(prompt)
            shared = torch.arange(start, start + prompt)
            index.append(shared)
            own = start + prompt
            for length in completions:
                q_lengths.append(length)
                k_lengths.append(prompt + length)
                index += [shared, torch.arange(own, own + length)]
                own += length

        def cumulative(lengths: list[int]) -> Tensor:
            sums = torch.tensor([0, *lengths]).cumsum(0)
            return sums.to(self.device, torch.int32)

        shares = any(len(row) > 1 for row in self.rows)
        key_index = torch.cat(index).to(self.device) if shares else None
        return (
            key_index,
            cumulative(q_lengths),
            cumulative(k_lengths),
            max(q_lengths),
            max(k_lengths),
        )


def choose_implementation(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `--attn_implementation` means on this device: "flash_attention_2" or "sdpa".

    Raises ValueError for an unknown name, and for FlashAttention where it cannot run.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation {wanted!r} is none of {', '.join(IMPLEMENTATIONS)}")
    half = dtype in (torch.bfloat16, torch.float16)
    able = half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "flash_attention_2" and not able:
        raise ValueError(
            "--attn_implementation flash_attention_2 needs a CUDA device of compute capability 8.0 "
            "(Ampere) or later and half precision (--bf16); this is "
            f"{device.type} in {str(dtype).removeprefix('torch.')}: use sdpa"
        )
    return "sdpa" if wanted == "sdpa" or not able else "flash_attention_2"


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Scaled dot-product attention inside each row, grouped-query heads included.

    q: (T, H, D); k, v: (T, KH, D) with H a multiple of KH. Returns (T, H, D).
    """
    if bounds.implementation == "flash_attention_2":
        key_index, cu_q, cu_k, max_q, max_k = bounds.varlen
        if key_index is not None:
            k, v = k[key_index], v[key_index]
        return flash_varlen()(q, k, v, cu_q, cu_k, max_q, max_k, bounds.causal)
    gqa, outputs = q.shape[1] != k.shape[1], []
    for where, row, rectangle in zip(bounds.slices, bounds.rows, bounds.rectangles, strict=True):
        # (1, heads, P, D) each
        prompt = slice(where.start, where.start + row[0])
        first_q, first_k, first_v = (x[prompt].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            first_q, first_k, first_v, is_causal=bounds.causal, enable_gqa=gqa
        )
        outputs.append(out[0].transpose(0, 1))
        if rectangle is None:
            continue
        # (G, heads, C, D) each. What lengthens a short completion comes after its own tokens, so
        # that none of them sees it.
        index, own = rectangle
        group = len(row) - 1
        own_q, own_k, own_v = (
            x.index_select(0, index).unflatten(0, (group, -1)).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            own_q,
            torch.cat((first_k.expand(group, -1, -1, -1), own_k), 2),
            torch.cat((first_v.expand(group, -1, -1, -1), own_v), 2),
            attn_mask=bounds.mask(row[0], own_q.shape[2], q.dtype),
            enable_gqa=gqa,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, own))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@cache
def flash_varlen():
    """f(q, k, v, cu_q, cu_k, max_q, max_k, causal) of flash-attn, else of PyTorch.

    Both align a causal mask to the end where queries are fewer than keys, which is what a
    completion after its prompt needs.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen()

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)

    return flash


def _torch_varlen():
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters  # differs between torch 2.11 and 2.13

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        options = {}
        if "window_size" in parameters:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            options["is_causal"] = causal
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in parameters:
                options["enable_gqa"] = True
            else:
                repeat = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    return flash
