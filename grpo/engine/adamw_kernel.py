"""An update of a matrix by adamw.py as one Triton kernel, which reads and writes each number once.

`LightAdamW._update` on a CPU is the definition, and this is the same bit for bit: the same
operations in the same order, divisions and roots rounded as IEEE 754 says, and a product and a sum
rounded once (`tl.fma`) where PyTorch's own lerp, addcmul and sub do so; the compiler joins no
others. Needs Triton, which a CUDA build of PyTorch brings. Not here: whether it works on a device
(`one_pass` in adamw.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 4  # blocks of a program


@triton.jit
def _random(number, seed):
    """The number's output of SplitMix64, as `Noise` has it."""
    z = (number + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _rounded(value, random):
    """float32 in bf16, rounded stochastically by the last 16 bits of `random`."""
    bits = value.to(tl.uint32, bitcast=True) + (random & 0xFFFF).to(tl.uint32)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decoded(codes, scales, table, place, block, is_block):
    code = tl.load(codes + place, mask=is_block[:, None], other=0).to(tl.int32)
    return tl.load(table + code) * tl.load(scales + block, mask=is_block, other=0.0)[:, None]


@triton.jit
def _encode(value, codes, scales, table, place, block, is_block):
    """Stores each number's code, by a binary search among 255 borders, and each block's scale."""
    scale = tl.max(tl.abs(value), axis=1)
    share = tl.div_rn(value, tl.maximum(scale, 2.0**-126)[:, None])
    code = tl.zeros_like(value).to(tl.int32)
    for i in tl.static_range(8):
        step = 128 >> i
        border = tl.load(table + 256 + (code + step - 1))
        code = tl.where(border >= share, code, code + step)
    tl.store(codes + place, code.to(tl.uint8), mask=is_block[:, None])
    tl.store(scales + block, scale, mask=is_block)


@triton.jit(do_not_specialize=["first", "seed", "blocks"])
def _kernel(
    weights,
    gradients,
    m,
    m_scales,
    v,
    v_scales,
    tables,
    first,
    seed,
    columns,
    blocks,
    scale,
    kept,
    rate,
    m_part,
    v_part,
    EIGHT_BITS: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_block, in_row = block < blocks, tl.cdiv(columns, BLOCK)
    inside = tl.arange(0, BLOCK)[None, :]
    column = (block % in_row)[:, None] * BLOCK + inside
    number = (block // in_row).to(tl.int64)[:, None] * columns + column
    padded = block.to(tl.int64)[:, None] * BLOCK + inside
    real = is_block[:, None] & (column < columns)

    gradient = tl.load(gradients + number, mask=real, other=0.0).to(tl.float32) * scale
    if EIGHT_BITS:
        mean = _decoded(m, m_scales, tables, padded, block, is_block)
        root = _decoded(v, v_scales, tables + 512, padded, block, is_block)
        square = root * root
    else:
        mean = tl.load(m + number, mask=real, other=0.0).to(tl.float32)
        square = tl.load(v + number, mask=real, other=0.0).to(tl.float32)
    mean = tl.fma(gradient - mean, 1 - BETA1, mean)
    square = tl.fma(gradient * (1 - BETA2), gradient, square * BETA2)

    random = _random(first + number, seed)
    if EIGHT_BITS:
        _encode(tl.where(real, mean, 0.0), m, m_scales, tables, padded, block, is_block)
        root = tl.where(real, tl.sqrt_rn(square), 0.0)
        _encode(root, v, v_scales, tables + 512, padded, block, is_block)
    else:
        tl.store(m + number, _rounded(mean, random), mask=real)
        tl.store(v + number, _rounded(square, random >> 16), mask=real)
        random = random >> 32

    size = tl.sqrt_rn(tl.div_rn(square, v_part)) + EPS
    move = tl.div_rn(tl.div_rn(mean, m_part), size)
    move = tl.minimum(tl.maximum(move, -LARGEST), LARGEST)
    moved = tl.load(weights + number, mask=real, other=0.0).to(tl.float32) * kept
    moved = tl.fma(move, -rate, moved)
    if weights.dtype.element_ty == tl.bfloat16:
        moved = _rounded(moved, random)
    tl.store(weights + number, moved, mask=real)


def update(
    weight: Tensor,
    gradient: Tensor,
    moments: list[list[Tensor]],
    tables: Tensor,
    block: int,
    **numbers: float,
) -> None:
    """One launch updates `weight` (rows, columns) and its moments in place.

    gradient: of that shape, finite. moments: m's tensors and v's, those of adamw.py. tables:
    (2, 2, 256) float32, of m and of v the values of codes and the borders between them. block:
    numbers that share a scale. numbers: the other arguments of `_kernel`. All is contiguous.
    """
    (m, *m_scales), (v, *v_scales) = moments
    if m_scales:
        m, v = m.view(torch.uint8), v.view(torch.uint8)
    blocks = len(weight) * triton.cdiv(weight.shape[1], block)
    if blocks:
        _kernel[(triton.cdiv(blocks, AT_ONCE),)](
            weight,
            gradient,
            m,
            *(m_scales or [m]),
            v,
            *(v_scales or [v]),
            tables,
            columns=weight.shape[1],
            blocks=blocks,
            EIGHT_BITS=bool(m_scales),
            BLOCK=block,
            AT_ONCE=AT_ONCE,
            enable_fp_fusion=False,
            **numbers,
        )
