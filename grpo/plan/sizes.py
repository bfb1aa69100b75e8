"""What the memory plan starts from: facts of a run, and the sizes of its model's parts."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from grpo.engine.adamw import BLOCK
from models.config import QwenVLConfig
from models.four_bit import packable
from models.lora import LoRALinear, is_adapter
from models.qwen_vl import QwenVL


@dataclass(frozen=True)
class Facts:
    """What memory depends on besides the flags.

    longest_prompt: tokens, of which at most image_tokens are of images; all prompts and completions
    count as the longest. bf16: whether the model computes in it, else in float32. world: ranks.
    device: "cpu" or "cuda". kernel: of attention, as `choose_implementation` names it.
    """

    model: QwenVLConfig
    longest_prompt: int
    image_tokens: int
    bf16: bool
    world: int
    device: str
    kernel: str


@dataclass(frozen=True)
class Counts:
    """Numbers in parts of a model; adapters count for themselves alone.

    whole: all; of it vision: the vision tower; in_layers: all decoder layers and vision blocks;
    largest_layer: one of these; decoder_matrices: what --load_in_4bit packs. adapters, and adapted:
    the weights that they belong to. padding: what `adamw_8bit` adds to the rows of all matrices, to
    fill whole blocks.
    """

    whole: int
    vision: int
    in_layers: int
    largest_layer: int
    decoder_matrices: int
    adapters: int
    adapted: int
    padding: int


def count(model: QwenVL) -> Counts:
    """Counts of a model, which may be on the meta device."""
    layers = [*model.model.layers, *model.visual.blocks]
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    matrices = [p for p in own(model) if p.ndim > 1]
    return Counts(
        whole=numbers(own(model)),
        vision=numbers(own(model.visual)),
        in_layers=sum(numbers(own(layer)) for layer in layers),
        largest_layer=max(numbers(own(layer)) for layer in layers),
        decoder_matrices=numbers(layer.weight for *_, layer in packable(model.model.layers)),
        adapters=numbers(p for layer in adapted for p in (layer.lora_A, layer.lora_B)),
        adapted=numbers(layer.weight for layer in adapted),
        padding=sum(len(p) * (-p[0].numel() % BLOCK) for p in matrices),
    )


def own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module, without adapters."""
    return [p for name, p in module.named_parameters() if not is_adapter(name)]


def numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
