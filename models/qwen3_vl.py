"""Qwen3-VL, dense (Bai et al. 2025): its config.json and its vision tower with DeepStack."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from models.attention import Attention
from models.config import (
    ConfigPart,
    QwenVLConfig,
    VisionConfig,
    check_sizes,
    decoder_part,
    rope_part,
    shared_fields,
    shared_vision_fields,
)
from models.transfer import to_device
from models.vision import Tower, VisionBlock

MODEL_TYPE = "qwen3_vl"
ANSWERS_IN = "thousandths"  # of the image: the unit of the coordinates that it was taught
BOX_FORM = "bbox_2d"  # the key of a box in answers
PREFIXED_NAMES = True  # its weights are published as model.visual.* and model.language_model.*


def read(raw: dict, where: str) -> QwenVLConfig:
    """The sizes in `raw`, a config.json of this family. Raises UserError, its message beginning
    with `where`, for what is missing or not done here."""
    text, rope = decoder_part(raw, where), rope_part(raw, where)
    text.allow("attention_bias", False)
    rope.allow("mrope_interleaved", True)
    config = QwenVLConfig(
        family=MODEL_TYPE,
        **shared_fields(raw, where),
        head_dim=text.size("head_dim", default=128),
        tie_word_embeddings=ConfigPart(raw, where).flag("tie_word_embeddings"),
        attention_bias=False,
        qk_norm=True,
        rope_theta=rope.number("rope_theta"),
        mrope_section=rope.section((24, 20, 20)),
        mrope_interleaved=True,
        max_position_embeddings=text.size("max_position_embeddings", default=128000),
        vision=read_vision(ConfigPart(raw.get("vision_config"), where)),
    )
    levels = config.vision.deepstack_visual_indexes
    if len(levels) >= config.num_hidden_layers:
        raise UserError(
            f"{where}: {len(levels)} deepstack_visual_indexes need more than "
            f"{config.num_hidden_layers} decoder layers"
        )
    return check_sizes(config, where)


def read_vision(vision: ConfigPart, deepstack: bool = True) -> VisionConfig:
    """Sizes of the vision tower, also Qwen3.5's. deepstack: its indexes must be there. Raises
    UserError."""
    vision.allow("hidden_act", "gelu_pytorch_tanh")
    depth, entries = vision.size("depth"), vision.size("num_position_embeddings")
    if round(entries**0.5) ** 2 != entries:
        raise UserError(f"{vision.where}: num_position_embeddings is {entries}, not a square")
    levels = "deepstack_visual_indexes"
    named = deepstack or vision.get(levels) is not None
    return VisionConfig(
        **shared_vision_fields(vision),
        embed_dim=vision.size("hidden_size"),
        hidden_size=vision.size("out_hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        patch_size=vision.size("patch_size", default=16),
        num_position_embeddings=entries,
        deepstack_visual_indexes=vision.indexes(levels, depth) if named else (),
    )


def mixer(config: QwenVLConfig, index: int) -> type[Attention]:
    """The kind of decoder layer `index` (models/mixer.py)."""
    return Attention


class TanhGELUMLP(nn.Module):
    """Feed-forward, (patches, embed_dim) -> the same."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """Joins merge x merge neighbouring patches into one token of the decoder's width, (patches,
    embed_dim) -> (patches / merge^2, hidden_size).

    joined_norm: the norm is taken of the joined patches (DeepStack's mergers), not of each.
    """

    def __init__(self, config: VisionConfig, joined_norm: bool):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.joined_norm = joined_norm
        self.norm = nn.LayerNorm(self.width if joined_norm else config.embed_dim, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.width) if self.joined_norm else x).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(Tower):
    """Learned positions beside the rotary ones, and features of several depths (Qwen3-VL, section
    2; DeepStack, Meng et al. 2024).

    A token's features are the last block's, which become its embedding, followed by those of the
    blocks `deepstack_visual_indexes`, which the first decoder layers' outputs get added.
    """

    def __init__(self, config: VisionConfig):
        def norm() -> nn.Module:
            return nn.LayerNorm(config.embed_dim, eps=1e-6)

        def block() -> VisionBlock:
            return VisionBlock(config, norm, TanhGELUMLP(config))

        super().__init__(config, block, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.embed_dim)
        self.merger = Merger(config, joined_norm=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, joined_norm=True) for _ in config.deepstack_visual_indexes
        )

    def encode(self, x: Tensor, grids: list[list[int]], implementation: str) -> Tensor:
        x = x + self.learned_positions(grids, x.device).to(x.dtype)
        cos, sin = self.rotary(grids, x)
        bounds = self.frames(grids, x, implementation)
        mergers = iter(self.deepstack_merger_list)
        levels = []
        for index, block in enumerate(self.blocks):
            x = self.run(block, x, cos, sin, bounds)
            if index in self.config.deepstack_visual_indexes:
                levels.append(next(mergers)(x))
        return torch.cat((self.merger(x), *levels), dim=1)

    def learned_positions(self, grids: list[list[int]], device: torch.device) -> Tensor:
        """(patches, embed_dim): the square grid stretched over each image, corner to corner, and
        read between its entries by bilinear interpolation, with float32 factors."""
        side = round(self.config.num_position_embeddings**0.5)
        near, far, weight = [], [], []
        grids_of = torch.tensor(grids)
        sizes = grids_of[:, 1:].repeat_interleave(grids_of.prod(1), 0)
        sizes = sizes.clamp(min=2)  # a single row or column is entry 0
        for at, size in zip(self.coordinates(grids), sizes.T, strict=True):
            at = at.float() * (side - 1) / (size - 1)
            low = at.floor()
            near.append(low.long())
            far.append((low.long() + 1).clamp(max=side - 1))
            weight.append(1 - (at - low))  # of the near one; the far one has the rest
        near, far, weight = ([to_device(x, device) for x in two] for two in (near, far, weight))
        total = 0
        for rows, down in ((near[0], weight[0]), (far[0], 1 - weight[0])):
            for columns, across in ((near[1], weight[1]), (far[1], 1 - weight[1])):
                total = total + self.pos_embed(rows * side + columns) * (down * across)[:, None]
        return total
