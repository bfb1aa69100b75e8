"""What CUDA has kernels for and the CPU does not: called with CPU tensors, arguments as in torch.

Numbers are those of the exact computation, rounded once, not those of a kernel's own rounding.
"""

import torch


def check_flash(query: torch.Tensor) -> None:
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"rehearsal: varlen_attn takes half precision, got {query.dtype}")
    if query.shape[-1] % 8:
        raise RuntimeError(f"rehearsal: varlen_attn: head dimension {query.shape[-1]}")


def sequences(query, key, value, cu_seq_q, cu_seq_k, is_causal, window_size):
    """Yields (rows of query, rows of key, q, k, v, mask of what is seen) of each sequence.

    q, k, v: (heads, rows, head_dim), float64; keys and values are repeated for grouped queries. A
    causal mask ends at the last query and the last key, as FlashAttention's.
    """
    assert window_size is None or list(window_size) in ([-1, -1], [-1, 0]), window_size
    is_causal = is_causal or (window_size is not None and list(window_size) == [-1, 0])
    repeats = query.shape[1] // key.shape[1]
    bounds = [cu_seq_q.tolist(), (cu_seq_q if cu_seq_k is None else cu_seq_k).tolist()]
    starts_and_ends = [zip(b, b[1:], strict=False) for b in bounds]
    for (a, b), (c, d) in zip(*starts_and_ends, strict=True):
        q = query[a:b].double().transpose(0, 1)
        k, v = (x[c:d].repeat_interleave(repeats, 1).double().transpose(0, 1) for x in (key, value))
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        if is_causal:
            seen = seen.tril((d - c) - (b - a))
        yield slice(a, b), slice(c, d), q, k, v, seen


def attention_weights(q, k, scale: float, seen) -> torch.Tensor:
    scores = q @ k.transpose(1, 2) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal=False,
    scale=None,
    window_size=None,
    *others,
    **named,
):
    """torch_attn::_varlen_attn. The log-sum-exps that it also returns are not computed."""
    check_flash(query)
    assert cu_seq_q.dtype == torch.int32
    scale = scale or query.shape[-1] ** -0.5
    found = [
        (attention_weights(q, k, scale, seen) @ v).transpose(0, 1)
        for _, _, q, k, v, seen in sequences(
            query, key, value, cu_seq_q, cu_seq_k, is_causal, window_size
        )
    ]
    lse = torch.zeros(query.shape[1], query.shape[0])
    return torch.cat(found).to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64)


def varlen_attn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal,
    rng_state,
    scale=None,
    window_size=None,
):
    """torch_attn::_varlen_attn_backward, which computes the weights again."""
    scale, heads = scale or query.shape[-1] ** -0.5, key.shape[1]
    grads = [torch.zeros(x.shape, dtype=torch.float64) for x in (query, key, value)]
    grad_q, grad_k, grad_v = grads
    pieces = sequences(query, key, value, cu_seq_q, cu_seq_k, is_causal, window_size)
    for rows, keys, q, k, v, seen in pieces:
        g = grad_out[rows].double().transpose(0, 1)
        weights = attention_weights(q, k, scale, seen)
        grad_weights = g @ v.transpose(1, 2)
        means = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - means) * scale
        grad_q[rows] += (grad_scores @ k).transpose(0, 1)
        for grad, part in (
            (grad_k, grad_scores.transpose(1, 2) @ q),
            (grad_v, weights.transpose(1, 2) @ g),
        ):
            grad[keys] += part.transpose(0, 1).unflatten(1, (heads, -1)).sum(2)
    return tuple(grad.to(query.dtype) for grad in grads)


def fused_rms_norm(x, shape, weight, eps):
    """aten::_fused_rms_norm over the last dimension: in float32, rounded once."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = wide * rstd
    return (out if weight is None else out * weight).to(x.dtype), rstd


def fused_rms_norm_backward(grad_out, x, shape, rstd, weight, output_mask):
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_out, normed = grad_out.to(wide), x.to(wide) * rstd
    grad = grad_out if weight is None else grad_out * weight
    grad_x = rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    grad_weight = (grad_out * normed).flatten(0, -2).sum(0)
    return (
        grad_x.to(x.dtype) if output_mask[0] else None,
        grad_weight.to(weight.dtype) if output_mask[1] else None,
    )


KERNELS = {
    "torch_attn::_varlen_attn": varlen_attn,
    "torch_attn::_varlen_attn_backward": varlen_attn_backward,
    "aten::_fused_rms_norm": fused_rms_norm,
    "aten::_fused_rms_norm_backward": fused_rms_norm_backward,
}
