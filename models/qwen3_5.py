"""Qwen3.5, dense, with Qwen3.6 and Qwen3.8 of the same architecture: its config.json.

Three layers of four are a gated delta net (models/delta_net.py), the fourth is attention with a
gate. The vision tower is Qwen3-VL's without DeepStack.
"""

from data.errors import UserError, shown
from models.attention import Attention
from models.config import (
    ConfigPart,
    DeltaHeads,
    QwenVLConfig,
    check_sizes,
    decoder_part,
    rope_part,
    shared_fields,
)
from models.delta_net import GatedDeltaNet
from models.mixer import Mixer
from models.qwen3_vl import VisionTower as VisionTower
from models.qwen3_vl import read_vision

MODEL_TYPE = "qwen3_5"
ANSWERS_IN = "thousandths"  # of the image: the unit of the coordinates that it was taught
BOX_FORM = "bbox_2d"  # the key of a box in answers
PREFIXED_NAMES = True  # its weights are published as model.visual.* and model.language_model.*
UNTRAINED = "mtp."  # published weights that predict a second token, which nothing here does

KINDS = {"linear_attention": GatedDeltaNet, "full_attention": Attention}


def read(raw: dict, where: str) -> QwenVLConfig:
    """The sizes in `raw`, a config.json of this family. Raises UserError, its message beginning
    with `where`, for what is missing or not done here."""
    text, rope = decoder_part(raw, where), rope_part(raw, where)
    text.allow("attention_bias", False)
    text.allow("attn_output_gate", True)
    rope.allow("mrope_interleaved", True)
    config = QwenVLConfig(
        family=MODEL_TYPE,
        **shared_fields(raw, where),
        head_dim=text.size("head_dim", default=256),
        tie_word_embeddings=ConfigPart(raw, where).flag("tie_word_embeddings"),
        attention_bias=False,
        qk_norm=True,
        rope_theta=rope.number("rope_theta"),
        mrope_section=rope.section((11, 11, 10)),
        mrope_interleaved=True,
        max_position_embeddings=text.size("max_position_embeddings", default=32768),
        vision=read_vision(ConfigPart(raw.get("vision_config"), where), deepstack=False),
        layer_types=layer_types(text),
        partial_rotary_factor=rotated_share(text, rope),
        attn_output_gate=True,
        zero_centred_norms=True,
        delta=DeltaHeads(
            keys=text.size("linear_num_key_heads", default=16),
            values=text.size("linear_num_value_heads", default=32),
            key_dim=text.size("linear_key_head_dim", default=128),
            value_dim=text.size("linear_value_head_dim", default=128),
            kernel=text.size("linear_conv_kernel_dim", default=4),
        ),
    )
    if config.vision.deepstack_visual_indexes:
        raise UserError(f"{where}: deepstack_visual_indexes are not supported in this family")
    if config.delta.values % config.delta.keys:
        raise UserError(
            f"{where}: {config.delta.values} heads of values and {config.delta.keys} of keys in "
            f"linear attention do not divide"
        )
    return check_sizes(config, where)


def rotated_share(text: ConfigPart, rope: ConfigPart) -> float:
    """The share of a head's numbers that is rotated, wherever it stands. Raises UserError."""
    name = "partial_rotary_factor"
    share = rope.get(name, default=text.get(name, default=0.25))
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise UserError(f"{text.where}: {name} is {shown(share)}, not a number above 0 and up to 1")
    return share


def layer_types(text: ConfigPart) -> tuple[str, ...]:
    """The kind of each layer: a key of KINDS. Raises UserError."""
    layers, every = text.size("num_hidden_layers"), text.size("full_attention_interval", default=4)
    named = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    named = text.get("layer_types", default=named)
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not is_list or len(named) != layers or not set(named) <= KINDS.keys():
        raise UserError(
            f"{text.where}: layer_types is {shown(named)}, not one of {', '.join(KINDS)} for each "
            f"of {layers} layers"
        )
    return tuple(named)


def mixer(config: QwenVLConfig, index: int) -> type[Mixer]:
    """The kind of decoder layer `index` (models/mixer.py)."""
    return KINDS[config.layer_types[index]]
