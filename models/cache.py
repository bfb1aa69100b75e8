"""Keys and values of B prompts, each held once, and of the samples that grow from them."""

import torch
from torch import Tensor

from models.attention import Bounds, attention


class KVCache:
    """Filled by one packed prefill, then extended by one token per live sample and step.

    The samples stand in a rectangle of B prompts x G places, so that one matmul per prompt serves
    all its samples. The prompt part is (B, KH, P, D) per layer, padded to the longest prompt and
    never copied per sample; the samples' own part is (B, KH, G, capacity, D), allocated once.
    Samples that finish are dropped by `keep`; the rectangle shrinks with them.
    """

    def __init__(self, num_layers: int, group: int, capacity: int):
        self.group, self.capacity = group, capacity
        self.prompt: list[tuple[Tensor, Tensor]] = [None] * num_layers
        self.own: list[tuple[Tensor, Tensor]] = [None] * num_layers
        self.slot: Tensor | None = None  # (N,): the place of each live sample, prompt * G + member
        self.padding: Tensor | None = None  # (B * KH, 1, P): 0, -inf beyond a prompt
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
        prompts, longest, kv_heads = len(lengths), max(lengths), k.shape[1]
        keys, values = (k.new_zeros(prompts, longest, *k.shape[1:]) for _ in range(2))
        for prompt, where in enumerate(bounds.slices):
            keys[prompt, : lengths[prompt]] = k[where]
            values[prompt, : lengths[prompt]] = v[where]
        self.prompt[layer] = tuple(x.transpose(1, 2).contiguous() for x in (keys, values))
        own = (prompts, kv_heads, self.group, self.capacity, k.shape[2])
        self.own[layer] = (k.new_empty(own), v.new_empty(own))
        if self.slot is None:
            self.slot = torch.arange(prompts * self.group, device=k.device)
            missing = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
            padding = torch.zeros(missing.shape).masked_fill(missing, float("-inf"))
            self.padding = padding[:, None].to(k).repeat_interleave(kv_heads, 0)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over two sets of keys: the prompt's, read once per group, and the own."""
        prompt_k, prompt_v = (x.flatten(0, 1) for x in self.prompt[layer])  # (B * KH, P, D)
        own_k, own_v = self.own[layer]
        prompts, kv_heads, group = own_k.shape[:3]
        samples, heads, dim = q.shape
        full = samples == prompts * group
        if not full:  # some places are empty
            q, k, v = (
                x.new_zeros(prompts * group, *x.shape[1:]).index_copy_(0, self.slot, x)
                for x in (q, k, v)
            )
        q, k, v = (x.view(prompts, group, kv_heads, -1, dim).transpose(1, 2) for x in (q, k, v))
        own_k[:, :, :, self.length] = k[:, :, :, 0]
        own_v[:, :, :, self.length] = v[:, :, :, 0]
        own_k, own_v = (x[:, :, :, : self.length + 1].flatten(0, 2) for x in (own_k, own_v))

        by_prompt = q.reshape(prompts * kv_heads, -1, dim)  # all samples of a prompt at once
        by_sample = by_prompt.view(prompts * kv_heads * group, -1, dim)
        shared = torch.baddbmm(self.padding, by_prompt, prompt_k.transpose(1, 2), alpha=dim**-0.5)
        own = by_sample @ own_k.transpose(1, 2) * dim**-0.5
        weights = torch.cat((shared, own.view(*by_prompt.shape[:2], -1)), dim=-1)
        weights = weights.float().softmax(-1).to(v.dtype)
        shared, own = weights.split((shared.shape[-1], own.shape[-1]), dim=-1)
        out = (shared @ prompt_v).view_as(by_sample)
        out = torch.baddbmm(out, own.reshape(len(own_k), -1, own_k.shape[1]), own_v)
        out = out.view(prompts, kv_heads, group, -1, dim).transpose(1, 2)
        out = out.reshape(prompts * group, heads, dim)
        return out if full else out[self.slot]

    def advance(self) -> None:
        """Call once per decode step, after the last layer."""
        self.length += 1

    def keep(self, index: Tensor) -> None:
        """Drops all samples but those at `index` (M,) of the live ones, in that order."""
        self.slot = self.slot[index]
        prompts, _, group = self.own[0][0].shape[:3]
        places = self.slot.tolist()
        alive = [[p % group for p in places if p // group == b] for b in range(prompts)]
        left = [b for b in range(prompts) if alive[b]]
        widest = max((len(members) for members in alive), default=0)
        if not places or (len(left) == prompts and widest == group):
            return
        # fewer prompts or fewer places: move what is left together, a prompt's samples to the front
        device = self.slot.device
        rows = torch.tensor(left, device=device)
        members = [alive[b] + [0] * (widest - len(alive[b])) for b in left]
        members = torch.tensor(members, device=device)[:, :, None]
        self.prompt = [(k[rows], v[rows]) for k, v in self.prompt]
        self.padding = self.padding.unflatten(0, (prompts, -1))[rows].flatten(0, 1)
        heads = torch.arange(self.own[0][0].shape[1], device=device)
        pick = rows[:, None, None], heads[None, :, None], members.transpose(1, 2)
        self.own = [(k[pick], v[pick]) for k, v in self.own]
        moved = {
            b * group + m: i * widest + j
            for i, b in enumerate(left)
            for j, m in enumerate(alive[b])
        }
        self.slot = torch.tensor([moved[place] for place in places], device=device)
