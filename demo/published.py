"""Writes a model as a checkpoint folder, in the form in which its family is published.

For the demos' models, the benchmarks and the tests. Not here: what a run writes, which copies the
config.json of the model that it began with (models/load.py).
"""

import json
from pathlib import Path

import torch

from models.config import QwenVLConfig, VisionConfig
from models.families import published_name
from models.load import save_tensors
from models.qwen_vl import QwenVL

ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
IN_FLOAT32 = (".A_log", ".linear_attn.norm.weight")  # whatever the other weights are
# Keys of config.json that are attributes of our config, by the same names.
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
DECODER = (
    *("bos_token_id", "eos_token_id", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size"),
)
TOWER = ("depth", "num_heads", "in_channels", "patch_size", "temporal_patch_size")
TOWER += ("spatial_merge_size",)


def config_dict(config: QwenVLConfig, dtype: str = "float32") -> dict:
    """The content of config.json as the family is published. dtype: of the weights on disk."""
    decoder = {name: getattr(config, name) for name in DECODER}
    decoder |= {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True}
    section = list(config.mrope_section)
    top = {"architectures": [ARCHITECTURES[config.family]], "model_type": config.family}
    top |= {name: getattr(config, name) for name in TOKEN_IDS}
    top["vision_config"] = vision_dict(config.vision, config.family)
    if config.family in ("qwen3_vl", "qwen3_5"):  # nested
        rope = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True}
        decoder |= {"model_type": f"{config.family}_text", "attention_bias": False, "dtype": dtype}
        decoder |= {"head_dim": config.head_dim, "rope_scaling": rope}
        if config.family == "qwen3_5":
            decoder |= delta_dict(config)
            rope = {**decoder.pop("rope_scaling"), "rope_theta": decoder.pop("rope_theta")}
            rope |= {"partial_rotary_factor": config.partial_rotary_factor}
            decoder |= {"rope_parameters": rope}
        return top | {"tie_word_embeddings": config.tie_word_embeddings, "text_config": decoder}
    rope = {"type": "mrope", "mrope_section": section}
    decoder |= {"rope_scaling": rope, "torch_dtype": dtype, "use_sliding_window": False}
    return top | decoder


def delta_dict(config: QwenVLConfig) -> dict:
    """The keys of Qwen3.5's config.json that say what its layers are."""
    delta = config.delta
    return {
        "attn_output_gate": True,
        "layer_types": list(config.layer_types),
        "linear_conv_kernel_dim": delta.kernel,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_num_key_heads": delta.keys,
        "linear_num_value_heads": delta.values,
        "mamba_ssm_dtype": "float32",
    }


def vision_dict(vision: VisionConfig, family: str) -> dict:
    """The content of config.json's `vision_config` as the family is published."""
    tower = {"model_type": family, **{name: getattr(vision, name) for name in TOWER}}
    if family not in ("qwen3_vl", "qwen3_5"):
        tower |= {"in_chans": vision.in_channels, "spatial_patch_size": vision.patch_size}
    if family == "qwen2_vl":
        tower |= {"embed_dim": vision.embed_dim, "hidden_size": vision.hidden_size}
        ratio = vision.intermediate_size // vision.embed_dim
        return tower | {"hidden_act": "quick_gelu", "mlp_ratio": ratio}
    tower |= {"hidden_size": vision.embed_dim, "out_hidden_size": vision.hidden_size}
    tower["intermediate_size"] = vision.intermediate_size
    if family == "qwen2_5_vl":
        blocks = list(vision.fullatt_block_indexes)
        tower |= {"hidden_act": "silu", "window_size": vision.window_size}
        return tower | {"fullatt_block_indexes": blocks}
    tower |= {"num_position_embeddings": vision.num_position_embeddings}
    if family == "qwen3_vl":
        tower |= {"deepstack_visual_indexes": list(vision.deepstack_visual_indexes)}
    return tower | {"hidden_act": "gelu_pytorch_tanh"}


def save_model(model: QwenVL, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json and the weights in `dtype`, for transformers to load as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_dict(model.config, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        published_name(name, model.config): weight.detach().to(
            torch.float32 if name.endswith(IN_FLOAT32) else dtype
        )
        for name, weight in model.named_parameters()
    }
    save_tensors(weights, folder)
