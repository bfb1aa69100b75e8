"""Qwen2.5-VL (Bai et al. 2025): its config.json and its vision tower with attention in windows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.errors import UserError
from models.attention import Attention
from models.config import (
    ConfigPart,
    QwenVLConfig,
    VisionConfig,
    check_sizes,
    decoder_part,
    shared_fields,
    shared_vision_fields,
)
from models.layers import RMSNorm, SwiGLU
from models.packed_attention import Bounds
from models.qwen2_vl import decoder_fields
from models.transfer import to_device
from models.vision import PatchMerger, Tower, VisionBlock

MODEL_TYPE = "qwen2_5_vl"
ANSWERS_IN = "resized"  # pixels of the image as it was resized for the model
BOX_FORM = "bbox_2d"  # the key of a box in answers
PREFIXED_NAMES = False  # its weights are published as visual.* and model.*


def read(raw: dict, where: str) -> QwenVLConfig:
    """The sizes in `raw`, a config.json of this family. Raises UserError, its message beginning
    with `where`, for what is missing or not done here."""
    text, vision = decoder_part(raw, where), ConfigPart(raw.get("vision_config"), where)
    vision.allow("hidden_act", "silu")
    depth, fields = vision.size("depth"), shared_fields(raw, where)
    config = QwenVLConfig(
        family=MODEL_TYPE,
        **fields,
        **decoder_fields(raw, where, fields),
        max_position_embeddings=text.size("max_position_embeddings", default=128000),
        vision=VisionConfig(
            **shared_vision_fields(vision),
            embed_dim=vision.size("hidden_size"),
            hidden_size=vision.size("out_hidden_size"),
            intermediate_size=vision.size("intermediate_size"),
            patch_size=vision.size("patch_size", "spatial_patch_size", default=14),
            window_size=vision.size("window_size", default=112),
            fullatt_block_indexes=vision.indexes("fullatt_block_indexes", depth),
        ),
    )
    vision = config.vision
    if vision.window_size < vision.spatial_merge_size * vision.patch_size:
        raise UserError(f"{where}: a window of {vision.window_size} pixels holds no token")
    return check_sizes(config, where)


def mixer(config: QwenVLConfig, index: int) -> type[Attention]:
    """The kind of decoder layer `index` (models/mixer.py)."""
    return Attention


class VisionTower(Tower):
    """RMSNorm, a gated feed-forward, and attention in windows in all but a few blocks (Qwen2.5-VL,
    section 2.1.1)."""

    def __init__(self, config: VisionConfig):
        def norm() -> nn.Module:
            return RMSNorm(config.embed_dim, eps=1e-6)

        def block() -> VisionBlock:
            mlp = SwiGLU(config.embed_dim, config.intermediate_size, bias=True)
            return VisionBlock(config, norm, mlp)

        super().__init__(config, block)
        self.merger = PatchMerger(config, norm())

    def encode(self, x: Tensor, grids: list[list[int]], implementation: str) -> Tensor:
        # Windows are rows of a packed tensor. The tokens of a window are brought together once;
        # an image's tokens stay together, so full attention does not mind.
        order, sizes = self.windows(grids)
        order = to_device(order, x.device)
        unit = self.config.spatial_merge_size**2  # patches of a token
        patches = (order[:, None] * unit + torch.arange(unit, device=x.device)).flatten()
        x, (cos, sin) = x[patches], (part[patches] for part in self.rotary(grids, x))
        full = self.frames(grids, x, implementation)
        rows = tuple((size * unit,) for size in sizes)
        windows = Bounds(rows, x.device, causal=False, implementation=implementation)
        for index, block in enumerate(self.blocks):
            within = full if index in self.config.fullatt_block_indexes else windows
            x = self.run(block, x, cos, sin, within)
        return self.merger(x)[order.argsort()]

    def pairs(self, index: int, grids: Sequence[tuple[int, int, int]]) -> int:
        if index in self.config.fullatt_block_indexes:
            return super().pairs(index, grids)
        merge = self.config.spatial_merge_size
        side = self.config.window_size // merge // self.config.patch_size * merge  # patches

        def squares(length: int) -> int:  # of the lengths that it is cut into
            return length // side * side**2 + (length % side) ** 2

        return sum(t * squares(h) * squares(w) for t, h, w in grids)

    def windows(self, grids: list[list[int]]) -> tuple[Tensor, list[int]]:
        """The tokens of all images, window after window, (tokens,) int64; each window's tokens.

        A frame is cut from its upper left corner, so windows at its right and lower edge may be
        smaller. Windows of one size follow each other: attention takes them as a batch.
        """
        merge = self.config.spatial_merge_size
        side = self.config.window_size // merge // self.config.patch_size
        order, sizes, first = [], [], 0
        for t, h, w in grids:
            for _ in range(t):
                frame = torch.arange(first, first + h * w // merge**2).view(h // merge, w // merge)
                cut = [part for row in frame.split(side) for part in row.split(side, dim=1)]
                cut.sort(key=lambda part: (-part.shape[0], -part.shape[1]))
                order += [part.flatten() for part in cut]
                sizes += [part.numel() for part in cut]
                first += frame.numel()
        return torch.cat(order), sizes
