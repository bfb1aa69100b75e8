"""The language model's layers over packed tokens: no padding, no batch dimension."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Bounds, attention
from models.cache import KVCache
from models.config import QwenVLConfig
from models.layers import RMSNorm, SwiGLU, mrope, rotate


class Attention(nn.Module):
    """Grouped-query attention with multimodal rotary positions."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bounds: Bounds,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            cache.store_prompts(layer, k, v, bounds)
        return self.o_proj(attention(q, k, v, bounds).flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings in, hidden states after the final norm out."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        bounds: Bounds,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(T, hidden) embeddings at position_ids (3, T) int64 -> (T, hidden).

        `bounds` says who attends to whom. A `cache` keeps the keys and values of every layer, for
        models/decode.py to go on from.
        """
        cos, sin = mrope(position_ids, self.config.mrope_section, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            inputs = (x, cos, sin, bounds, cache, index)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.norm(x)
