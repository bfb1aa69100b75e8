"""transformers' model with the weights of ours, and what it reads."""

import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from demo.published import config_dict
from models.names import parameter_name
from models.qwen_vl import image_features
from tests.tiny import IMAGE

NORMS = {
    modeling_qwen2_vl: "Qwen2VLRMSNorm",
    modeling_qwen2_5_vl: "Qwen2_5_VLRMSNorm",
    modeling_qwen3_vl: "Qwen3VLTextRMSNorm",
}


def reference_model(model, dtype):
    """transformers' model with the same weights, loaded through a saved state dict's names."""
    config = transformers.CONFIG_MAPPING[model.config.family](**config_dict(model.config))
    peer = transformers.AutoModelForImageTextToText.from_config(config).to(dtype).eval()
    weights = {parameter_name(name): tensor for name, tensor in peer.state_dict().items()}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                tensor.copy_(own[name])
    return peer


def reference_inputs(prompt, dtype):
    ids = prompt.input_ids[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    inputs["attention_mask"] = torch.ones_like(ids)
    if len(prompt.image_grid_thw):
        inputs["pixel_values"] = prompt.pixel_values.to(dtype)
        inputs["image_grid_thw"] = prompt.image_grid_thw
    return inputs


def own_hidden(model, prompts):
    return model(
        torch.cat([p.input_ids for p in prompts]),
        torch.cat([p.position_ids for p in prompts], dim=1),
        model.bounds([(len(p),) for p in prompts]),
        image_features(model, prompts),
    )
