"""The model's sizes, read from a Hugging Face config.json and written back in the published form.

Two forms are read: the flat one of the published Qwen2-VL checkpoints, and the nested one
(`text_config`, `rope_parameters`) that transformers 5 writes. The family comes from `model_type`
alone, never from a folder's name. What the hand-written model does not do (sliding-window
attention, rope scaling other than M-RoPE, another activation) is refused here, by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. Pixels where a size is a length in the image."""

    depth: int
    embed_dim: int
    hidden_size: int  # width of what the merger hands to the decoder
    num_heads: int
    mlp_ratio: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class QwenVLConfig:
    """Sizes and token ids of a Qwen2-VL model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    vision: VisionConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self, dtype: str = "float32") -> dict:
        """The flat config.json of the published checkpoints; `dtype` is the weights' on disk."""
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": self.vision.depth,
                "embed_dim": self.vision.embed_dim,
                "hidden_size": self.vision.hidden_size,
                "hidden_act": "quick_gelu",
                "mlp_ratio": self.vision.mlp_ratio,
                "num_heads": self.vision.num_heads,
                "in_channels": self.vision.in_channels,
                "in_chans": self.vision.in_channels,
                "patch_size": self.vision.patch_size,
                "spatial_patch_size": self.vision.patch_size,
                "temporal_patch_size": self.vision.temporal_patch_size,
                "spatial_merge_size": self.vision.spatial_merge_size,
            },
        }


def read_config(folder: Path) -> QwenVLConfig:
    """The config of the checkpoint in `folder`.

    Raises ValueError where config.json is missing or unreadable, where `model_type` is another
    family's, where a needed key is absent, or where it asks for what this model does not do.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no config.json: this is not a model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen2_vl":
        found = raw.get("model_type") if isinstance(raw, dict) else raw
        raise ValueError(
            f"{path}: model_type is {found!r}; this trainer knows 'qwen2_vl' (Qwen2-VL) only"
        )
    return parse_config(raw, str(path))


def parse_config(raw: dict, where: str) -> QwenVLConfig:
    """`raw` as a QwenVLConfig; `where` opens each message. Raises ValueError as `read_config`."""
    text = {**raw, **(raw.get("text_config") or {})}
    vision = raw.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}

    def need(table: dict, *names: str):
        for name in names:
            if table.get(name) is not None:
                return table[name]
        raise ValueError(f"{where}: key {names[0]!r} is missing")

    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "rope type": rope_type not in ("default", "mrope") and rope_type,
        "hidden_act": text.get("hidden_act", "silu") != "silu" and text.get("hidden_act"),
        "vision hidden_act": vision.get("hidden_act", "quick_gelu") != "quick_gelu"
        and vision.get("hidden_act"),
        "use_sliding_window": text.get("use_sliding_window") or False,
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"{where}: {name} = {value!r} is not supported")

    def size(table: dict, *names: str, default: int | None = None) -> int:
        value = default if default and not any(map(table.get, names)) else need(table, *names)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {names[0]} is {value!r}, not a positive whole number")
        return value

    heads = size(text, "num_attention_heads")
    config = QwenVLConfig(
        vocab_size=size(text, "vocab_size"),
        hidden_size=size(text, "hidden_size"),
        intermediate_size=size(text, "intermediate_size"),
        num_hidden_layers=size(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size(text, "num_key_value_heads", default=heads),
        rms_norm_eps=need(text, "rms_norm_eps"),
        rope_theta=rope.get("rope_theta") or text.get("rope_theta") or 1_000_000.0,
        mrope_section=tuple(rope.get("mrope_section") or (16, 24, 24)),
        max_position_embeddings=text.get("max_position_embeddings", 32768),
        # transformers <= 4 kept the switch in text_config, the published files at the top
        tie_word_embeddings=bool(
            raw.get("tie_word_embeddings")
            or (raw.get("text_config") or {}).get("tie_word_embeddings")
        ),
        initializer_range=text.get("initializer_range", 0.02),
        bos_token_id=text.get("bos_token_id"),
        eos_token_id=text.get("eos_token_id"),
        image_token_id=size(raw, "image_token_id"),
        video_token_id=size(raw, "video_token_id"),
        vision_start_token_id=size(raw, "vision_start_token_id"),
        vision_end_token_id=size(raw, "vision_end_token_id"),
        vision=VisionConfig(
            depth=size(vision, "depth"),
            embed_dim=size(vision, "embed_dim"),
            hidden_size=size(vision, "hidden_size"),
            num_heads=size(vision, "num_heads"),
            mlp_ratio=size(vision, "mlp_ratio", default=4),
            in_channels=size(vision, "in_channels", "in_chans", default=3),
            patch_size=size(vision, "patch_size", default=14),
            temporal_patch_size=size(vision, "temporal_patch_size", default=2),
            spatial_merge_size=size(vision, "spatial_merge_size", default=2),
        ),
    )
    if config.hidden_size % heads or heads % config.num_key_value_heads:
        raise ValueError(
            f"{where}: hidden_size {config.hidden_size}, {heads} heads and "
            f"{config.num_key_value_heads} key/value heads do not divide"
        )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise ValueError(
            f"{where}: mrope_section {list(config.mrope_section)} must sum to half of the head "
            f"dimension {config.head_dim}"
        )
    if config.vision.hidden_size != config.hidden_size:
        raise ValueError(
            f"{where}: the vision tower hands over {config.vision.hidden_size} numbers a token, "
            f"the decoder takes {config.hidden_size}"
        )
    return config
