"""Qwen2-VL (Wang et al. 2024): its config.json and its vision tower."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
from models.fused import fused
from models.vision import PatchMerger, Tower, VisionBlock

MODEL_TYPE = "qwen2_vl"
ANSWERS_IN = "thousandths"  # of the image: the unit of the coordinates that it was taught
BOX_FORM = "Position"  # the key of a box in answers
PREFIXED_NAMES = False  # its weights are published as visual.* and model.*


def read(raw: dict, where: str) -> QwenVLConfig:
    """The sizes in `raw`, a config.json of this family. Raises UserError, its message beginning
    with `where`, for what is missing or not done here."""
    text, vision = decoder_part(raw, where), ConfigPart(raw.get("vision_config"), where)
    vision.allow("hidden_act", "quick_gelu")
    width = vision.size("embed_dim")
    fields = shared_fields(raw, where)
    return check_sizes(
        QwenVLConfig(
            family=MODEL_TYPE,
            **fields,
            **decoder_fields(raw, where, fields),
            max_position_embeddings=text.size("max_position_embeddings", default=32768),
            vision=VisionConfig(
                **shared_vision_fields(vision),
                embed_dim=width,
                hidden_size=vision.size("hidden_size"),
                intermediate_size=width * vision.size("mlp_ratio", default=4),
                patch_size=vision.size("patch_size", default=14),
            ),
        ),
        where,
    )


def decoder_fields(raw: dict, where: str, fields: dict) -> dict:
    """What the decoders of Qwen2-VL and Qwen2.5-VL have in common. Raises UserError."""
    rope, heads = rope_part(raw, where), fields["num_attention_heads"]
    if fields["hidden_size"] % heads:
        raise UserError(
            f"{where}: hidden_size {fields['hidden_size']} does not divide into {heads} heads"
        )
    places = ConfigPart(raw, where), ConfigPart(raw.get("text_config"), where)
    return {
        # at the top as published; transformers before 5 wrote it into text_config
        "tie_word_embeddings": any([part.flag("tie_word_embeddings") for part in places]),
        "head_dim": fields["hidden_size"] // heads,
        "attention_bias": True,
        "qk_norm": False,
        "rope_theta": rope.number("rope_theta", default=1_000_000.0),
        "mrope_section": rope.section((16, 24, 24)),
        "mrope_interleaved": False,
    }


def mixer(config: QwenVLConfig, index: int) -> type[Attention]:
    """The kind of decoder layer `index` (models/mixer.py)."""
    return Attention


@fused
def quick_gelu(x: Tensor) -> Tensor:
    return (1.702 * x).sigmoid_().mul_(x)


@fused
def quick_gelu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """x's gradient, in autograd's order."""
    share = (1.702 * x).sigmoid_()
    of_share = torch.ops.aten.sigmoid_backward(grad * x, share).mul_(1.702)
    return of_share.add_(share.mul_(grad))


class QuickGELU(torch.autograd.Function):
    """x sigmoid(1.702 x), which keeps x alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return quick_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return quick_gelu_backward(*ctx.saved_tensors, grad)


class QuickGELUMLP(nn.Module):
    """Feed-forward, (patches, embed_dim) -> the same."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(QuickGELU.apply(self.fc1(x)))


class VisionTower(Tower):
    """A vision transformer at the image's own resolution (Qwen2-VL, section 2.1)."""

    def __init__(self, config: VisionConfig):
        def norm() -> nn.Module:
            return nn.LayerNorm(config.embed_dim, eps=1e-6)

        def block() -> VisionBlock:
            return VisionBlock(config, norm, QuickGELUMLP(config))

        super().__init__(config, block)
        self.merger = PatchMerger(config, norm())

    def encode(self, x: Tensor, grids: list[list[int]], implementation: str) -> Tensor:
        cos_sin = self.rotary(grids, x)
        bounds = self.frames(grids, x, implementation)
        for block in self.blocks:
            x = self.run(block, x, *cos_sin, bounds)
        return self.merger(x)
