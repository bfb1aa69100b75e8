"""The vision tower: flattened patches of any number of images -> one vector per 2 x 2 patches.

Images are packed end to end; each attends to itself only. Patches come in the order of the image
processor: blocks of merge x merge neighbours are contiguous. Video frames beyond the two that make
one still image are not handled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Bounds, attention
from models.config import VisionConfig
from models.layers import inverse_frequencies, rotate


class PatchEmbed(nn.Module):
    """A 3-D convolution whose stride is its kernel: one matrix product per patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel, kernel, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(patches, patch_dim) -> (patches, embed_dim)."""
        weight = self.proj.weight
        return F.linear(pixel_values.to(weight.dtype), weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds: Bounds) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, bounds)
        return self.proj(out.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden = config.embed_dim * config.mlp_ratio
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # "quick" GELU


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bounds: Bounds) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, bounds)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins merge x merge neighbouring patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    """Qwen2-VL's vision transformer at the image's own resolution (Qwen2-VL, section 2.1)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, implementation: str) -> Tensor:
        """Image tokens of all images, in order.

        pixel_values: (patches, patch_dim), normalized. image_grid_thw: (images, 3) int64 on the
        CPU: frames, rows and columns of patches of each image. Returns (patches / merge^2, hidden).
        """
        grids = image_grid_thw.tolist()
        frames = tuple((h * w,) for t, h, w in grids for _ in range(t))
        bounds = Bounds(frames, pixel_values.device, causal=False, implementation=implementation)
        x = self.patch_embed(pixel_values)
        cos, sin = self._rotary(grids, x)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, bounds, use_reentrant=False)
            else:
                x = block(x, cos, sin, bounds)
        return self.merger(x)

    def _rotary(self, grids: list[list[int]], x: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the angles turn with a patch's row, half with its column: (patches, D / 2) each.

        They stay in float32 at least, as in the published model.
        """
        merge = self.config.spatial_merge_size
        rows, columns = [], []
        for t, h, w in grids:
            index = torch.arange(h * w, device=x.device)
            # the processor's order: blocks of merge x merge, row-major outside and inside
            index = index.view(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
            rows.append((index // w).repeat(t))
            columns.append((index % w).repeat(t))
        positions = torch.stack((torch.cat(rows), torch.cat(columns)), dim=1).float()
        quarter = inverse_frequencies(
            self.config.embed_dim // self.config.num_heads // 2, 10_000.0, x.device
        )
        angles = (positions[:, :, None] * quarter).flatten(1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)
