"""Where a model's weights lie in memory.

Decoding reads q, k and v as one matrix, and gate and up as another. Both are one block of memory of
which the published parameters are parts, so nothing is copied to join them. A sharded model keeps
each parameter by itself (grpo/engine/shard.py); only its full copy decodes.
"""

import torch
from torch import nn

from models.four_bit import FourBitLinear
from models.qwen_vl import QwenVL

JOINED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def allocate(model: QwenVL, dtype: torch.dtype, device: torch.device | str) -> QwenVL:
    """Gives a model on the meta device uninitialized memory in `dtype`; returns the model."""
    model = model.to(dtype)
    for layer in model.model.layers:
        for part, names in JOINED:
            linears = [getattr(layer, part).get_submodule(name) for name in names]
            if isinstance(linears[0], FourBitLinear):
                continue
            rows = [len(linear.weight) for linear in linears]
            block = torch.empty(sum(rows), linears[0].in_features, dtype=dtype, device=device)
            for linear, place in zip(linears, block.split(rows), strict=True):
                linear.weight = nn.Parameter(place, linear.weight.requires_grad)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
    return model
