"""Keys and values of B prompts, each held once, and of the samples that grow from them."""

import torch
from torch import Tensor

from models.attention import Bounds, attention


class KVCache:
    """Filled by one packed prefill, then extended by one token per live sample and step.

    The prompt part is (B, KH, P, D) per layer, padded to the longest prompt and never copied per
    sample; the samples' own part is (N, KH, capacity, D), allocated once. Samples that finish are
    dropped by `keep`.
    """

    def __init__(self, num_layers: int, group: int, capacity: int):
        self.group, self.capacity = group, capacity
        self.prompt: list[tuple[Tensor, Tensor]] = [None] * num_layers
        self.own: list[tuple[Tensor, Tensor]] = [None] * num_layers
        self.slot: Tensor | None = None  # (N,): prompt * group + member of each live sample
        self.prompt_mask: Tensor | None = None  # (B, 1, 1, P) float32, 0 or -inf
        self.length = 0  # tokens in the own part

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
        """Stores k, v (T, KH, D) and returns the attention of q (T, H, D) over all it may see.

        With `bounds` this is the prefill of packed prompts; without, T = N and each sample has one
        new token.
        """
        if bounds is not None:
            self._store_prompts(layer, k, v, bounds)
            return attention(q, k, v, bounds)
        return self._decode(layer, q, k, v)

    def _store_prompts(self, layer: int, k: Tensor, v: Tensor, bounds: Bounds) -> None:
        lengths = [row[0] for row in bounds.rows]
        longest = max(lengths)
        shape = (len(lengths), longest, *k.shape[1:])
        keys, values = k.new_zeros(shape), v.new_zeros(shape)
        for prompt, where in enumerate(bounds.slices):
            keys[prompt, : lengths[prompt]] = k[where]
            values[prompt, : lengths[prompt]] = v[where]
        self.prompt[layer] = (
            keys.transpose(1, 2).contiguous(),
            values.transpose(1, 2).contiguous(),
        )
        samples = len(lengths) * self.group
        own = (samples, k.shape[1], self.capacity, k.shape[2])
        self.own[layer] = (k.new_empty(own), v.new_empty(own))
        if self.slot is None:
            self.slot = torch.arange(samples, device=k.device)
            valid = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
            mask = torch.zeros(valid.shape).masked_fill(~valid, float("-inf"))
            self.prompt_mask = mask[:, None, None].to(k.device)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over two sets of keys: the prompt's, read once per group, and the own."""
        prompt_k, prompt_v = self.prompt[layer]
        own_k, own_v = self.own[layer]
        own_k[:, :, self.length] = k
        own_v[:, :, self.length] = v
        own_k, own_v = own_k[:, :, : self.length + 1], own_v[:, :, : self.length + 1]
        samples, heads, dim = q.shape
        kv_heads = prompt_k.shape[1]
        repeat = heads // kv_heads
        q = q.view(samples, kv_heads, repeat, dim) * dim**-0.5

        # Laid out as a (B, G) rectangle, so that one matmul per prompt serves its whole group.
        shared = self._to_rectangle(q) @ prompt_k.transpose(2, 3)
        shared = self._to_samples(shared.float() + self.prompt_mask, repeat)
        own = (q @ own_k.transpose(2, 3)).float()
        weights = torch.cat((shared, own), dim=-1).softmax(-1).to(v.dtype)
        shared, own = weights.split((shared.shape[-1], own.shape[-1]), dim=-1)
        out = self._to_samples(self._to_rectangle(shared) @ prompt_v, repeat) + own @ own_v
        return out.reshape(samples, heads, dim)

    def _to_rectangle(self, x: Tensor) -> Tensor:
        """(N, KH, R, X) of the live samples -> (B, KH, G * R, X), zero where a sample is gone."""
        size = self.prompt_mask.shape[0] * self.group
        if len(x) < size:
            x = x.new_zeros(size, *x.shape[1:]).index_copy(0, self.slot, x)
        x = x.unflatten(0, (-1, self.group)).transpose(1, 2)
        return x.flatten(2, 3)

    def _to_samples(self, x: Tensor, repeat: int) -> Tensor:
        """The inverse of `_to_rectangle`."""
        x = x.unflatten(2, (self.group, repeat)).transpose(1, 2).flatten(0, 1)
        return x if len(self.slot) == len(x) else x[self.slot]

    def advance(self) -> None:
        """Call once per decode step, after the last layer."""
        self.length += 1

    def keep(self, index: Tensor) -> None:
        """Drops all samples but those at `index` (M,) of the live ones, in that order."""
        self.slot = self.slot[index]
        self.own = [(k[index], v[index]) for k, v in self.own]
