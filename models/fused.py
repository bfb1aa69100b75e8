"""Small functions of tensors that a GPU computes in one pass over memory.

Between two matrix products a GPU's time goes into reading and writing activations, once for each
operation of PyTorch. A function under `@fused` is PyTorch on a CPU; on a GPU torch.compile makes
one kernel of it, if its result is that of the function itself. Not here: gradients. Who needs them
writes a torch.autograd.Function whose two passes are such functions (models/layers.py).
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

DEVICES = {"cuda"}  # kinds of devices for which a faster form pays
LEAST = 2**20  # numbers; with fewer, launches take longer than memory does
ROWS = 64  # whose results are compared


def on_gpu(x: Tensor) -> bool:
    return x.device.type in DEVICES


def pays(x: Tensor) -> bool:
    """Whether it is large, and on a device for which a faster form pays."""
    return on_gpu(x) and x.numel() >= LEAST


class Fused:
    """A function of tensors, its first argument one, that torch.compile makes one kernel of.

    The function changes none of its arguments and computes each row by itself. An argument that is
    not a tensor with as many rows as the first is shared by all rows.

    What is compiled serves any sizes. On the first arguments of a kind (dtypes, contiguous or not)
    the first rows of its result are compared with the function's. If compiling fails, or numbers
    differ by more than rounding, a line on stderr says so, and from then on the function itself is
    called: ranks that do and that do not have the compiled form differ by rounding.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self.function, self.compiled = function, None
        self.agreed: set[tuple] = set()  # kinds of arguments

    def __call__(self, *args):
        if self.compiled is self.function or not pays(args[0]):
            return self.function(*args)
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        kind = tuple(map(kind_of, args))
        try:  # also where its numbers have agreed: other sizes may be compiled anew
            return self.compiled(*args) if kind in self.agreed else self.compare(args, kind)
        except Exception as error:  # whatever a compiler may do: training goes on
            tell(f"{self.__name__} is not compiled, which is slower", error)
            self.compiled = self.function
            return self.function(*args)

    def compare(self, args: list, kind: tuple):
        """The compiled form's result. Raises ValueError if it is not the function's."""
        if self.compiled is None:
            # one process: what is compiled is small, and each rank would start a pool of compilers
            one = {"compile_threads": 1}
            self.compiled = torch.compile(self.function, dynamic=True, options=one)
        result, rows = self.compiled(*args), len(args[0])
        first = [x[:ROWS] if isinstance(x, Tensor) and len(x) == rows else x for x in args]
        pairs = zip(tree_leaves(result), tree_leaves(self.function(*first)), strict=True)
        for found, expected in pairs:
            if isinstance(expected, Tensor):
                check_close(found[:ROWS], expected)
        self.agreed.add(kind)
        return result


fused = Fused  # the decorator


def tell(what: str, error: Exception) -> None:
    why = (str(error).splitlines() or [""])[0][:200]
    print(f"{what}: {type(error).__name__}: {why}", file=sys.stderr, flush=True)


def kind_of(x):
    return (x.dtype, x.dim(), x.is_contiguous()) if isinstance(x, Tensor) else x


def check_close(found: Tensor, expected: Tensor) -> None:
    """Raises ValueError if they differ by more than rounding."""
    same = found.dtype == expected.dtype and found.shape == expected.shape
    most = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    share = max(4 * torch.finfo(expected.dtype).eps, 1e-5)  # sums of many numbers
    close = {"rtol": share, "atol": share * most, "equal_nan": True}
    if not same or not torch.allclose(found, expected, **close):
        raise ValueError(f"its numbers are others; the largest should be {most:.3g}")


def subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, D) -= left (V, C) @ right (C, D); total in float32, the others in bf16.

    On a GPU cuBLAS subtracts as it multiplies: the product is neither rounded nor written.
    """
    if pays(total) and multiplies_into_float32(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=-1, out=total)
    else:
        total.sub_(left @ right)


@functools.cache
def multiplies_into_float32(device: torch.device) -> bool:
    """Whether this PyTorch can, on this device; a line on stderr says if not."""
    total = torch.ones(64, 64, device=device)
    ones = torch.ones_like(total, dtype=torch.bfloat16)
    try:  # transposed as in the head's gradient
        torch.addmm(total, ones.T, ones, out_dtype=total.dtype, alpha=-1, out=total)
        check_close(total, torch.full_like(total, -63.0))
    except Exception as error:
        tell("the head's gradient takes another pass over memory", error)
        return False
    return True
