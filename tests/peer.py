"""transformers' model with the weights of ours, and what it reads."""

import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_5 import modeling_qwen3_5
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


def token_by_token(query, key, value, g, beta, initial_state=None, **_):
    """The gated delta rule as its equations are written, in the dtype of what comes: in place of
    transformers' chunks, which are float32. (B, T, heads, D) each, g and beta (B, T, heads)."""
    repeats = value.shape[2] // query.shape[2]
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    q, k = (x.repeat_interleave(repeats, 2) for x in (q / q.shape[-1] ** 0.5, k))
    state = value.new_zeros(*value.shape[::2], q.shape[-1], value.shape[-1])
    state, outputs = state if initial_state is None else initial_state, []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        seen = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        correction = beta[:, t, :, None] * (value[:, t] - seen)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def exact_qwen3_5(monkeypatch):
    """transformers' Qwen3.5 in float64 throughout."""
    code, to_float32 = modeling_qwen3_5, torch.Tensor.float

    def norm_and_gate(self, x, gate):
        x = x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * x * torch.nn.functional.silu(gate)

    def rotate(q, k, cos, sin):
        return code.apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", token_by_token)
    monkeypatch.setattr(code.Qwen3_5RMSNormGated, "forward", norm_and_gate)
    monkeypatch.setattr(code, "apply_rotary_pos_emb_vision", rotate)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float32(x)
    )


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
