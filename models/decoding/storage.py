"""Where a model's weights lie in memory.

Decoding reads linear layers with one input as one matrix: q, k and v, or gate and up. Their weights
are parts of one block of memory, so nothing is copied to join them. A sharded model keeps each
parameter by itself (grpo/engine/shard.py); only its full copy decodes.
"""

import torch
from torch import nn

from models.four_bit import FourBitLinear
from models.layers import at_least_float32
from models.qwen_vl import QwenVL


def cast(model: QwenVL, dtype: torch.dtype) -> QwenVL:
    """The model in `dtype`, but for its `float32_names`: in float32, or a wider `dtype`."""
    wide, kept = at_least_float32(dtype), float32_names(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.to(wide if name in kept else dtype)
    return model


def float32_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are float32 whatever the model's dtype is: those that their
    modules name in FLOAT32."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in getattr(module, "FLOAT32", ())
    }


def allocate(model: QwenVL, dtype: torch.dtype, device: torch.device | str) -> QwenVL:
    """Gives a model on the meta device uninitialized memory, `cast` to `dtype`; returns the
    model."""
    model = cast(model, dtype)
    for layer in model.model.layers:
        for linears in layer.joined:
            if isinstance(linears[0], FourBitLinear):
                continue
            sizes = [len(linear.weight) for linear in linears]
            block = torch.empty(sum(sizes), linears[0].in_features, dtype=dtype, device=device)
            for linear, part in zip(linears, block.split(sizes), strict=True):
                linear.weight = nn.Parameter(part, linear.weight.requires_grad)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
    return model
