"""Qwen2-VL: the vision tower, the decoder and the head, over packed tokens.

The module tree carries the published weight names (`visual.*`, `model.*`, `lm_head.weight`). The
forward pass ends at the hidden states: who needs log-probs forms logits for the positions that are
read and no others (`head_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.attention import Bounds
from models.cache import KVCache
from models.config import QwenVLConfig
from models.decoder import Decoder
from models.vision import VisionTower

if TYPE_CHECKING:
    from models.processor import Prompt


class QwenVL(nn.Module):
    """A Qwen2-VL model. `implementation` is "flash_attention_2" or "sdpa".

    With always_encodes, `hidden_states` runs the vision tower even where no prompt has an image:
    ranks that share the weights then gather them equally often (grpo/dist.py). compute_device:
    where it computes, if its weights lie elsewhere between passes.
    """

    def __init__(self, config: QwenVLConfig, implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        self.implementation = implementation
        self.always_encodes = False
        self.compute_device: torch.device | None = None
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, hidden): the embedding itself where the head is tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def initialize(self, generator: torch.Generator | None = None) -> QwenVL:
        """Draws fresh weights N(0, initializer_range); norms 1 and biases 0. Returns itself."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name or ".ln_q." in name:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        return self

    def bounds(self, rows: list[tuple[int, ...]]) -> Bounds:
        """Bounds of packed rows [P, C1, ..., CG] on this model's device and kernel."""
        return Bounds(tuple(rows), self.device, implementation=self.implementation)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(patches, patch_dim) and (images, 3) on the CPU -> image tokens (tokens, hidden)."""
        pixels = pixel_values.to(self.device, self.dtype)
        return self.visual(pixels, image_grid_thw, self.implementation)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        bounds: Bounds,
        prompts: Sequence[Prompt],
        cache: KVCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """`forward` of packed prompts, their images encoded first.

        One method, because a sharded model's weights are there only within one.
        """
        features = image_features(self, prompts)
        if features is None and self.always_encodes:  # one image, none of whose tokens are used
            merge = self.config.vision.spatial_merge_size
            pixels = torch.zeros(merge**2, self.config.vision.patch_dim)
            features = self.encode_images(pixels, torch.tensor([[1, merge, merge]]))[:0]
        return self.forward(input_ids, position_ids, bounds, features, cache, read)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        bounds: Bounds,
        image_features: Tensor | None = None,
        cache: KVCache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm: (T, hidden), or (R, hidden) at the positions `read`.

        input_ids: (T,) int64 packed; position_ids: (3, T) int64; image_features: (image tokens in
        input_ids, hidden) in order of appearance, None where there are none. bounds, cache and
        read: see models/decoder.py.
        """
        x = self.model.embed_tokens(input_ids)
        if image_features is not None:
            where = (input_ids == self.config.image_token_id).nonzero().squeeze(1)
            assert len(where) == len(image_features), "image tokens and features differ in number"
            x = x.index_copy(0, where, image_features.to(x.dtype))
        return self.model(x, position_ids, bounds, cache, read)


def image_features(model: QwenVL, prompts: Sequence[Prompt]) -> Tensor | None:
    """Image tokens (n, hidden) of all prompts in order; each distinct image is encoded once, and
    not again where its prompt carries its features.

    None where no prompt has an image.
    """
    known = [prompt.image_features for prompt in prompts if prompt.image_features is not None]
    if known:
        assert len(known) == len(prompts)
        return torch.cat(known)
    pixels, grids, place = [], [], {}
    for prompt in prompts:
        sizes = prompt.image_grid_thw.prod(1).tolist()
        for key, grid, patches in zip(
            prompt.image_keys, prompt.image_grid_thw, prompt.pixel_values.split(sizes), strict=True
        ):
            if key not in place:
                place[key] = len(place)
                pixels.append(patches)
                grids.append(grid)
    if not pixels:
        return None
    features = model.encode_images(torch.cat(pixels), torch.stack(grids))
    keys = [key for prompt in prompts for key in prompt.image_keys]
    if len(keys) == len(place):
        return features
    merged = model.config.vision.spatial_merge_size**2
    tokens = features.split([int(grid.prod()) // merged for grid in grids])
    return torch.cat([tokens[place[key]] for key in keys])


def mrope_position_ids(
    input_ids: Tensor, image_grid_thw: Tensor, config: QwenVLConfig
) -> tuple[Tensor, int]:
    """M-RoPE ids (3, P) int64 of one prompt and the position of the token after it.

    Text advances all three axes by one a token. An image's tokens share the time at which it
    begins and carry their row and column from there; what follows goes on after the larger of its
    sides (Qwen2-VL, section 2.1, figure 3). input_ids: (P,) int64; image_grid_thw: (images, 3).

    Raises ValueError where image tokens and grids do not match.
    """
    merge = config.vision.spatial_merge_size
    is_image = (input_ids == config.image_token_id).tolist()
    parts, index, position = [], 0, 0
    for t, h, w in image_grid_thw.tolist():
        start = is_image.index(True, index) if True in is_image[index:] else len(is_image)
        text = torch.arange(start - index).expand(3, -1) + position
        position += start - index
        h, w = h // merge, w // merge
        index = start + t * h * w
        if index > len(is_image) or not all(is_image[start:index]):
            raise ValueError("the prompt holds fewer image tokens than its images need")
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts += [text, torch.stack(axes).flatten(1) + position]
        position += max(t, h, w)
    if True in is_image[index:]:
        raise ValueError("the prompt holds more image tokens than its images need")
    rest = len(is_image) - index
    parts.append(torch.arange(rest).expand(3, -1) + position)
    return torch.cat(parts, dim=1), position + rest
