"""One token more for every sample: what Decoder.forward computes, written for few tokens.

A decode step reads every weight for one token per sample, so its cost is reading and the number of
operations. Activations are therefore columns, (features, N): `W @ x` reads W as it is stored (on a
CPU in two thirds of the time of `linear`). q, k and v are one product, gate and up are one, q and k
turn together. The numbers are the decoder's up to rounding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache import KVCache
from models.layers import mrope
from models.qwen_vl import QwenVL


class LayerWeights(NamedTuple):
    """A decoder layer's weights; norms and biases as columns (features, 1)."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    o_proj: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down_proj: Tensor


class DecodeStep:
    """The decoder with its weights of this moment; q|k|v and gate|up are copies.

    Make a new one after each change of the weights.
    """

    def __init__(self, model: QwenVL):
        self.config = model.config
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight[:, None]
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            self.layers.append(
                LayerWeights(
                    layer.input_layernorm.weight[:, None],
                    torch.cat([part.weight for part in qkv]),
                    torch.cat([part.bias for part in qkv])[:, None],
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight[:, None],
                    torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
                    mlp.down_proj.weight,
                )
            )

    def __call__(self, tokens: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """Hidden states after the final norm, (hidden, N).

        tokens: (N,) int64, one of each live sample of `cache`; position_ids: (3, N) int64. The
        cache grows by one token.
        """
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        x = self.embedding[tokens].T.contiguous()
        cos, sin = mrope(position_ids, config.mrope_section, config.rope_theta, x.dtype)
        cos, sin = (
            cache.spread(torch.cat(x, 1).T) for x in ((cos, cos), (-sin, sin))
        )  # (D, B * G)
        for index, w in enumerate(self.layers):
            qkv = torch.addmm(w.qkv_bias, w.qkv, self._normed(x, w.input_norm))
            qkv = cache.spread(qkv).view(heads + 2 * kv_heads, config.head_dim, -1)
            qk, v = qkv.split((heads + kv_heads, kv_heads))
            qk = torch.addcmul(qk * cos, qk.roll(config.head_dim // 2, 1), sin)
            out = cache.attend(index, *qk.split((heads, kv_heads)), v)
            x = torch.addmm(x, w.o_proj, cache.gather(out.flatten(0, 1)))
            gate, up = torch.mm(w.gate_up, self._normed(x, w.post_norm)).chunk(2)
            x = torch.addmm(x, w.down_proj, F.silu(gate).mul_(up))
        cache.advance()
        return self._normed(x, self.norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over columns."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(0, keepdim=True).add_(self.config.rms_norm_eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight)
