"""Floating point operations of a model's matrix products, by the shapes of its passes.

Two for each multiplication with its addition. A linear layer's forward pass takes 2 x in x out a
token; its backward pass as many for its input's gradient, if anything before it is trained, and as
many for its weight's, if that is. What tokens do with each other is asked of the mixer
(`Mixer.products`), and twice that is its backward pass.

Not here: what an implementation computes besides (recomputed layers and logits, padding, rotations
by a matrix, the chunks of the delta rule), and all that is no product of matrices.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from models.lora import LoRALinear


class Pass(NamedTuple):
    """The shapes of a forward pass, of the decoder or of the vision tower.

    rows: tokens of each packed row, [P, C1, ..., CG]. read: of how many positions the head reads
    the hidden states. grids: frames, rows and columns of patches of each image. is_trained: a
    backward pass follows. is_adapted: adapters were on.
    """

    rows: tuple[tuple[int, ...], ...] = ()
    read: int = 0
    grids: tuple[tuple[int, int, int], ...] = ()
    is_trained: bool = False
    is_adapted: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.rows))


class Linears:
    """Operations of some linear layers for one token. adapters: of the forward pass, theirs
    alone."""

    def __init__(self):
        self.forward = self.adapters = self.backward = 0

    def add(self, layers: Sequence[nn.Module], flows: bool) -> bool:
        """Adds those of these modules, which have one input, that are linear.

        flows: whether the input has a gradient. Returns whether what comes after them has one.
        """
        for layer in layers:
            if isinstance(layer, nn.Linear):  # `weight` is None if it is in 4 bits
                is_trained = layer.weight is not None and layer.weight.requires_grad
                self.add_product(layer.in_features * layer.out_features, flows, is_trained)
            elif isinstance(layer, nn.Conv3d):  # patches do not overlap
                self.add_product(layer.weight.numel(), flows, layer.weight.requires_grad)
            if isinstance(layer, LoRALinear):
                down, up = 2 * layer.lora_A.numel(), 2 * layer.lora_B.numel()
                self.adapters += down + up
                self.backward += (1 + flows) * down + 2 * up
        own = [p for layer in layers for p in layer.parameters(recurse=False)]
        return flows or any(p.requires_grad for p in own)

    def add_product(self, numbers: int, flows: bool, is_trained: bool) -> None:
        """numbers: of the weight."""
        self.forward += 2 * numbers
        self.backward += 2 * numbers * (flows + is_trained)

    def of(self, one: Pass) -> int:
        """What a token takes in this pass, its backward pass included."""
        return self.forward + one.is_adapted * self.adapters + one.is_trained * self.backward


class Flops:
    """Counts passes of a `QwenVL`, which may be sharded, as it is trained now.

    patches, merged: a patch's linear layers in the vision tower, and those of an image's token.
    tokens, read: a token's in the decoder, and those that only positions pass which are read: the
    last layer behind its mixer, and the head.
    """

    def __init__(self, model: nn.Module):
        self.model, self.tower = model, model.visual
        self.patches, self.merged, self.tokens, self.read = (Linears() for _ in range(4))
        self.layers, self.trained_layers = Counter(), Counter()  # by kind of mixer
        self.trained_blocks: list[bool] = []
        flows = self._add_tower() if self.tower is not None else False
        flows |= model.model.embed_tokens.weight.requires_grad
        for layer in model.model.layers:
            flows = self._add_layer(layer, flows)
        flows = self.read.add([model.model.norm], flows)
        head = model.head_weight
        self.read.add_product(head.numel(), flows, head.requires_grad)

    def _add_tower(self) -> bool:
        """Returns whether features have a gradient."""
        flows = False  # pixels have none
        for group in same_input(self.tower.patch_embed):
            flows = self.patches.add(group, flows)
        for block in self.tower.blocks:
            for group in same_input(block):
                flows = self.patches.add(group, flows)
                if block.attn.qkv in group:
                    self.trained_blocks.append(flows)
        for name, part in self.tower.named_children():
            if name not in ("patch_embed", "blocks"):  # what hands features over
                for group in same_input(part):
                    flows = self.merged.add(group, flows)
        return flows

    def _add_layer(self, layer: nn.Module, flows: bool) -> bool:
        """A decoder layer. Returns whether its output has a gradient."""
        is_last, mixer = layer is self.model.model.layers[-1], layer.mixer
        inputs = [mixer.get_submodule(name) for names in mixer.JOINED for name in names]
        for group in same_input(layer):
            is_input = group[0] in inputs
            linears = self.read if is_last and not is_input else self.tokens
            flows = linears.add(group, flows)
            if is_input:
                self.layers[layer.kind] += 1
                self.trained_layers[layer.kind] += flows
        return flows

    def __call__(self, one: Pass) -> int:
        """Operations of a pass, and of its backward pass if it has one."""
        total = one.tokens * self.tokens.of(one) + one.read * self.read.of(one)
        for kind, layers in self.layers.items():
            times = layers + 2 * one.is_trained * self.trained_layers[kind]
            total += times * kind.products(self.model.config, one.rows)
        if not one.grids:
            return total
        patches = sum(t * h * w for t, h, w in one.grids)
        merged = patches // self.tower.config.spatial_merge_size**2
        total += patches * self.patches.of(one) + merged * self.merged.of(one)
        for index, is_trained in enumerate(self.trained_blocks):
            products = 4 * self.tower.config.embed_dim * self.tower.pairs(index, one.grids)
            total += (1 + 2 * (one.is_trained and is_trained)) * products
        return total


def same_input(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The module and those in it, in order; linear layers with one input (JOINED) together."""
    together = {}
    for part in module.modules():
        for names in getattr(part, "JOINED", ()):
            group = [part.get_submodule(name) for name in names]
            together |= dict.fromkeys(group, group)
    seen = set()
    for part in module.modules():
        if part not in seen:
            group = together.get(part, [part])
            seen.update(group)
            yield group
