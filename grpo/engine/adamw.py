"""AdamW in little memory: matrices in bf16 without float32 masters, moments in bf16 or 8 bits.

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    w = (1 - rate decay) w - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

(Loshchilov and Hutter 2019, algorithm 2.) The arithmetic is float32, on a slice of a matrix at a
time; what is stored is rounded. An update of 1e-6 is far smaller than the distance between two bf16
numbers: rounded to the nearest, a weight would never move. So weights are rounded stochastically,
up or down with probabilities that make the expected value exact (Gupta et al. 2015, section 3.1).

Bytes per number besides weight (2) and gradient (2): 4 with bf16 moments, 2.03 in 8 bits; with
float32 masters and moments 12. Not here: vectors, which have float32 masters (optimizer.py).
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from grpo.engine.join import prints_here
from grpo.engine.shard import local_shard

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # PyTorch's
# |m| <= LARGEST sqrt(v) whatever the gradients (Cauchy-Schwarz), unless v was rounded to 0
LARGEST = (1 - BETA1) / ((1 - BETA2) * (1 - BETA1**2 / BETA2)) ** 0.5
NUMBERS = 2**23  # of a matrix that are updated at once: 32 MB in float32
BLOCK = 256  # numbers that share a scale


class Bf16Moment:
    """A moment (rows, columns) in bf16, rounded stochastically: rounded to the nearest, v would
    never decay."""

    def __init__(self, weight: Tensor, columns: int, signed: bool, device: torch.device | None):
        self.values = zeros_beside(weight, columns, torch.bfloat16, device)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.values}

    def load(self, rows: slice, device: torch.device) -> Tensor:
        return local_shard(self.values)[0][rows].to(device, torch.float32)

    def store(self, rows: slice, value: Tensor, noise: "Noise") -> None:
        local_shard(self.values)[0][rows].copy_(noise.rounded(value, torch.bfloat16))


class EightBitMoment:
    """A moment (rows, columns) in one byte a number: the index of an entry of `code_values`. The
    number is that entry times the largest number of its block of 256 (Dettmers et al. 2021,
    sections 2.1 and 2.2).

    Unlike in the paper the root of v is stored: the smallest entry is 3e-7, and where v is rounded
    to 0 and m is not the update is wrong (docs/LOG.md has numbers). A block lies within one row of
    the matrix, whose last block is padded with zeros: blocks are then the same for any number of
    ranks. Codes are bytes, held as float8 because the writer of checkpoints knows floating point
    only.
    """

    def __init__(self, weight: Tensor, columns: int, signed: bool, device: torch.device | None):
        self.columns, self.padding, self.signed = columns, -columns % BLOCK, signed
        padded = columns + self.padding
        self.codes = zeros_beside(weight, padded, torch.float8_e4m3fn, device)
        self.scales = zeros_beside(weight, padded // BLOCK, torch.float32, device)

    def tensors(self) -> dict[str, Tensor]:
        return {".codes": self.codes, ".scales": self.scales}

    def load(self, rows: slice, device: torch.device) -> Tensor:
        codes, scales = (local_shard(t)[0][rows].to(device) for t in (self.codes, self.scales))
        values = code_values(self.signed, device)[codes.view(torch.uint8).int()]
        values.unflatten(1, (-1, BLOCK)).mul_(scales[:, :, None])
        values = values[:, : self.columns]
        return values if self.signed else values.square_()

    def store(self, rows: slice, value: Tensor, noise: "Noise") -> None:
        value = value if self.signed else value.sqrt()
        blocks = F.pad(value, (0, self.padding)).unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(2)
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
        borders = code_borders(self.signed, value.device)
        codes = torch.bucketize(shares.flatten(1), borders, out_int32=True)
        local_shard(self.codes)[0][rows].view(torch.uint8).copy_(codes)
        local_shard(self.scales)[0][rows].copy_(scales)


@functools.cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """The number that each code stands for, ascending, (256,) float32: 0, 1 and seven decades, each
    divided twice as finely as the one below it (dynamic tree quantization; Dettmers et al. 2021,
    section 1.3)."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        decades.append(10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat(decades)
    negative = [-positive] if signed else []
    return torch.cat([*negative, positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@functools.cache
def code_borders(signed: bool, device: torch.device) -> Tensor:
    """The midpoints between neighbours of `code_values`, (255,) float32."""
    entries = code_values(signed, device)
    return (entries[1:] + entries[:-1]) / 2


# bytes of both moments of a number
MOMENT_BYTES = {"adamw_anyprecision": 4, "adamw_8bit": 2 + 2 * 4 / BLOCK}
MOMENTS = {"adamw_anyprecision": Bf16Moment, "adamw_8bit": EightBitMoment}


def zeros_beside(
    weight: Tensor, columns: int, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """Zeros (len(weight), columns), sharded as `weight` is. device: None is the weight's own."""
    shard = local_shard(weight.detach())[0]
    device = device or shard.device
    if not isinstance(weight, DTensor):
        return torch.zeros(len(shard), columns, dtype=dtype, device=device)
    # on meta first: `from_local` moves what is not on the mesh's device, as with --cpu_offload
    empty = DTensor.from_local(
        torch.empty(len(shard), columns, dtype=dtype, device="meta"),
        device_mesh=weight.device_mesh,
        placements=weight.placements,
        run_check=False,
        shape=torch.Size((len(weight), columns)),
        stride=(columns, 1),
    )
    return torch.zeros_like(empty, device=device)


def seed_of(key: str) -> int:
    """The seed of SplitMix64, a signed number of 64 bits."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


class Noise:
    """Random bits for rounding the numbers `first` to `first + count - 1` of a tensor.

    Number i gets the i-th output of SplitMix64 (Steele et al. 2014, figure 16) seeded by `key`, on
    any rank and device, and however many are asked for at a time.
    """

    def __init__(self, key: str, first: int, count: int, device: torch.device):
        self.key, self.first, self.count, self.device = key, first, count, device
        self.used = 0  # how many times 16 of the 64 bits have been used

    @functools.cached_property
    def bits(self) -> Tensor:
        """(count,) int64."""
        start, end = self.first + 1, self.first + self.count + 1
        z = torch.arange(start, end, device=self.device).mul_(-0x61C8864680B583EB)
        z.add_(seed_of(self.key))
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
        return z

    def rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A float32 tensor in `dtype`; to bf16 it is rounded stochastically.

        bf16 is float32 without its last 16 bits: a random number below 2^16 is added before they
        are dropped. Works for up to four tensors, each with 16 bits of its own.
        """
        if dtype != torch.bfloat16:
            return value
        random = (self.bits >> 16 * self.used).bitwise_and_(2**16 - 1).to(torch.int32)
        self.used += 1
        bits = random.view(value.shape).add_(value.contiguous().view(torch.int32))
        return bits.bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class LightAdamW:
    """AdamW on matrices without float32 masters, with the moments that `optim` names (MOMENTS).

    weights: name -> parameter, sharded or not, of two dimensions or more. seed: of the stochastic
    rounding. device: of the moments; None is the weights' own. `kernel`: what updates a matrix in
    one pass, None at first (`one_pass`).
    """

    kernel: Callable | None = None

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optim: str,
        weight_decay: float,
        seed: int,
        device: torch.device | None = None,
    ):
        self.weights, self.weight_decay, self.seed = weights, weight_decay, seed
        self.optim = optim
        kind = MOMENTS[optim]
        self.state = {
            name: [kind(w, math.prod(w.shape[1:]), signed, device) for signed in (True, False)]
            for name, w in weights.items()
        }  # m is signed, v is not

    def tensors(self) -> dict[str, Tensor]:
        """The moments' tensors by the names that they have in a checkpoint."""
        return {
            f"{kind}.{name}{part}": tensor
            for name, moments in self.state.items()
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
            for part, tensor in moment.tensors().items()
        }

    @torch.no_grad()
    def step(
        self, rate: float, update: int, scale: float, names: Iterable[str] | None = None
    ) -> None:
        """One update of every weight by its gradient times `scale`.

        update: its number, from 1 on; it decides the random numbers. names: of the weights that
        are updated; None is all.
        """
        for name in self.weights if names is None else names:
            if self._update_in_one_pass(name, rate, update, scale):
                continue
            weight = self.weights[name]
            rows, columns = local_shard(weight.detach())[0].flatten(1).shape
            at_once = max(1, NUMBERS // columns)
            for start in range(0, rows, at_once):
                part = slice(start, min(start + at_once, rows))
                self._update(name, part, rate, update, scale)

    def _update(self, name: str, rows: slice, rate: float, update: int, scale: float) -> None:
        """`step` for some rows of this rank's shard of a weight."""
        weight, (m, v) = self.weights[name], self.state[name]
        w, g = (local_shard(t.detach())[0].flatten(1) for t in (weight, weight.grad))
        first, columns = local_shard(weight.detach())[1], w.shape[1]
        key, count = f"{self.seed}/{update}/{name}", (rows.stop - rows.start) * columns
        noise = Noise(key, (first + rows.start) * columns, count, w.device)
        gradient = g[rows].float() * scale
        mean = m.load(rows, w.device).lerp_(gradient, 1 - BETA1)
        square = v.load(rows, w.device).mul_(BETA2)
        square.addcmul_(gradient, gradient, value=1 - BETA2)
        m.store(rows, mean, noise)
        v.store(rows, square, noise)
        size = square.div_(1 - BETA2**update).sqrt_().add_(EPS)
        move = mean.div_(1 - BETA1**update).div_(size).clamp_(-LARGEST, LARGEST)
        moved = w[rows].float().mul_(1 - rate * self.weight_decay).sub_(move, alpha=rate)
        w[rows] = noise.rounded(moved, w.dtype)

    def _update_in_one_pass(self, name: str, rate: float, update: int, scale: float) -> bool:
        """`_update` for all rows of this rank's shard of a weight, by `kernel`; False if it cannot.

        Triton compiles it anew for other dtypes, alignments and widths than `one_pass` has tried.
        If that fails nothing has been changed, and from then on no kernel is called.
        """
        shard, first = local_shard(self.weights[name].detach())
        if self.kernel is None or not shard.is_contiguous():
            return False
        try:
            self._call_kernel(name, shard.flatten(1), first, rate, update, scale)
        except Exception as error:
            self.kernel = None
            tell_slower(self.optim, f"{type(error).__name__}: {error}")
        return self.kernel is not None

    def _call_kernel(
        self, name: str, w: Tensor, first: int, rate: float, update: int, scale: float
    ) -> None:
        """w: this rank's shard of the weight, (rows, columns), whose first row is `first`."""
        g = local_shard(self.weights[name].grad)[0].flatten(1)
        self.kernel(
            w,
            g.contiguous(),
            [[local_shard(t)[0] for t in moment.tensors().values()] for moment in self.state[name]],
            code_tables(w.device),
            BLOCK,
            first=first * w.shape[1],
            seed=seed_of(f"{self.seed}/{update}/{name}"),
            scale=scale,
            kept=1 - rate * self.weight_decay,
            rate=rate,
            m_part=1 - BETA1**update,
            v_part=1 - BETA2**update,
            BETA1=BETA1,
            BETA2=BETA2,
            EPS=EPS,
            LARGEST=LARGEST,
        )


@functools.cache
def code_tables(device: torch.device) -> Tensor:
    """`code_values` and `code_borders` of m and of v, (2, 2, 256) float32."""
    tables = [
        (code_values(s, device), F.pad(code_borders(s, device), (0, 1))) for s in (True, False)
    ]
    return torch.stack([torch.stack(pair) for pair in tables])


def one_pass(light: LightAdamW) -> Callable | None:
    """The kernel that updates a matrix of `light` in one pass; None if its tensors are not all on
    one GPU, or the kernel does not do there what a CPU does (a line says why)."""
    weights = list(light.weights.values())
    tensors = [local_shard(t.detach())[0] for t in [*weights, *light.tensors().values()]]
    if {t.device.type for t in tensors} != {"cuda"}:
        return None
    return _checked(light.optim, weights[0].dtype, tensors[0].device)


@functools.cache
def _checked(optim: str, dtype: torch.dtype, device: torch.device) -> Callable | None:
    try:
        from grpo.engine import adamw_kernel  # Triton may be missing

        apart = disagreement(adamw_kernel.update, optim, dtype, device)
        if apart <= 1e-2:  # a root that is rounded otherwise changes a code now and then
            return adamw_kernel.update
        why = f"{apart:.1%} of the numbers differ from those of the CPU"
    except Exception as error:  # of Triton, of its compiler or of the driver
        why = f"{type(error).__name__}: {error}"
    tell_slower(optim, why)
    return None


def tell_slower(optim: str, why: str) -> None:
    if prints_here():
        tqdm.write(
            f"note: --optim {optim} updates operation by operation, which is slower than in one "
            f"pass: the Triton kernel for that does not work here ({why.splitlines()[0]})"
        )


def disagreement(kernel: Callable, optim: str, dtype: torch.dtype, device: torch.device) -> float:
    """The share of numbers, weights and moments, in which two updates of small matrices by the
    kernel on `device` differ from those of the CPU, operation by operation."""
    differ = []
    for columns in (512, 300):  # whole blocks, and one with rest
        generator, found = torch.Generator().manual_seed(0), []
        start, gradient = torch.randn(2, 9, columns, generator=generator).to(dtype)
        for place, update in ((torch.device("cpu"), None), (device, kernel)):
            weight = nn.Parameter(start.to(place, copy=True))
            light = LightAdamW({"w": weight}, optim, 0.1, seed=0)
            light.kernel = update
            for number in (1, 2):
                weight.grad = gradient.to(place)
                light.step(1e-3, number, 0.5)
            moments = [moment.load(slice(0, 9), place) for moment in light.state["w"]]
            found.append([t.detach().cpu().double() for t in (weight, *moments)])
        differ += [~one.isclose(two, rtol=1e-6, atol=0) for one, two in zip(*found, strict=True)]
    return torch.cat([t.flatten() for t in differ]).double().mean().item()
