"""The small parts that the vision tower and the decoder are made of.

Shapes: T packed tokens, H heads, D head dimension. No part here knows where a sequence ends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, (..., hidden) -> (..., hidden) (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """Gated feed-forward, (T, hidden) -> (T, hidden) (Shazeer 2020, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotary angular frequencies theta^(-2i/dim), (dim / 2,) float32 (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return 1.0 / theta**exponents


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + D/2}) of (T, H, D) by the angle whose cosine and sine are given.

    cos, sin: (T, D / 2) in x's dtype or wider; the result has x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def mrope(position_ids: Tensor, sections: tuple[int, int, int], theta: float, dtype: torch.dtype):
    """Cosine and sine of multimodal rotary positions (Qwen2-VL, section 2.1), each (T, D / 2).

    position_ids: (3, T) int64: time, row and column of each token. `sections` says how many
    frequencies each of the three axes turns; they sum to D / 2.
    """
    frequencies = inverse_frequencies(2 * sum(sections), theta, position_ids.device)
    axis = torch.repeat_interleave(
        torch.arange(3, device=position_ids.device),
        torch.tensor(sections, device=position_ids.device),
        output_size=sum(sections),
    )
    angles = position_ids.float()[axis].T * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
