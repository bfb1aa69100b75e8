"""Small functions of tensors that a GPU computes in one pass over memory.

Between two matrix products a GPU's time goes into reading and writing activations, once for each
operation of PyTorch. A function under `@fused` is PyTorch on a CPU; on a GPU torch.compile makes
one kernel of it, if its result is that of the function itself. Not here: gradients. Who needs them
writes a torch.autograd.Function whose two passes are such functions (models/layers.py).
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

DEVICES = {"cuda"}  # kinds of devices for which a faster form pays
LEAST = 2**20  # numbers; with fewer, launches take longer than memory does
ROWS = 64  # on which a faster form is tried


class Fused:
    """A function of tensors, its first argument one, and a faster form of it for a GPU.

    The function works on each row of its arguments by itself; what is no tensor of as many rows as
    the first belongs to all rows. It returns tensors, or writes into contiguous arguments.

    make_faster: function -> its faster form, by default torch.compile's for any sizes. It is tried
    on the first rows of the first arguments of each kind. If it raises or its numbers differ by
    more than rounding, a line on stderr says so, and from then on the function itself is called:
    ranks that do and do not have the faster form differ by rounding.
    """

    def __init__(self, function: Callable, make_faster: Callable[[Callable], Callable]):
        functools.update_wrapper(self, function)
        self.function, self.make_faster = function, make_faster
        self.forms: dict[tuple, Callable] = {}  # by the kind of the arguments

    def __call__(self, *args):
        if args[0].device.type not in DEVICES or args[0].numel() < LEAST:
            return self.function(*args)
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        kind = tuple(map(kind_of, args))
        if kind not in self.forms:
            self.forms[kind] = self.choose(args)
        return self.forms[kind](*args)

    def choose(self, args: Sequence) -> Callable:
        """The faster form if it agrees for arguments of this kind, else the function."""
        if self.function in self.forms.values():
            return self.function  # said once
        try:
            faster = self.make_faster(self.function)
            why = difference(*(run(form, args) for form in (self.function, faster)))
        except Exception as error:  # whatever a compiler may do: training goes on
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if why is None:
            return faster
        print(f"{self.__name__} runs uncompiled, which is slower: {why}", file=sys.stderr)
        return self.function


def compiled(function: Callable) -> Callable:
    # one process: what is compiled is small, and a pool of compilers is started for each rank
    return torch.compile(function, dynamic=True, options={"compile_threads": 1})


def fused(function: Callable) -> Fused:
    return Fused(function, compiled)


def kind_of(x):
    """What a compiled form is specialized to."""
    return (x.dtype, x.dim(), x.is_contiguous()) if isinstance(x, Tensor) else x


def run(form: Callable, args: Sequence) -> list[Tensor]:
    """What it returns for the first rows, and makes of its arguments, copies of them."""
    rows = len(args[0])
    copies = [x[:ROWS] if isinstance(x, Tensor) and len(x) == rows else x for x in args]
    # a view of other strides would become another kind
    copies = [x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for x in copies]
    return [x for x in tree_leaves((form(*copies), copies)) if isinstance(x, Tensor)]


def difference(expected: list[Tensor], found: list[Tensor]) -> str | None:
    """What is wrong with the second: nothing, or how it differs by more than rounding."""
    for right, x in zip(expected, found, strict=True):
        if (x.shape, x.dtype) != (right.shape, right.dtype):
            return f"{x.dtype} {tuple(x.shape)} and not {right.dtype} {tuple(right.shape)}"
        share = 16 * torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        wide, right = x.double(), right.double()
        most = right.nan_to_num(0, 0, 0).abs().max() if x.numel() else 0
        if not torch.allclose(wide, right, rtol=share, atol=share * float(most), equal_nan=True):
            worst = float((wide - right).abs().max())
            return f"its compiled form differs by {worst:.2g} where {float(most):.2g} is largest"
    return None
