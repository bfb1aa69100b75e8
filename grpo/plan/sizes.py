"""How many numbers the parts of a model have, by its config alone: for the memory plan."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from grpo.engine.adamw import BLOCK
from grpo.engine.adapters import lora_of
from grpo.flags.config import TrainingConfig
from models.config import QwenVLConfig
from models.decoder import Decoder, DecoderLayer
from models.families import family_of
from models.lora import LoRALinear, check_fit
from models.qwen_vl import QwenVL


def adapter_parameters(config: TrainingConfig, model: QwenVLConfig) -> tuple[int, int]:
    """Numbers in the adapters of --use_peft, and in the weights that they belong to; 0, 0 without
    it."""
    lora = lora_of(config)
    if lora is None:
        return 0, 0
    with torch.device("meta"):
        whole = QwenVL(model)
        whole.adapt(lora)
    if config.adapter_name_or_path:
        check_fit(Path(config.adapter_name_or_path), whole)
    layers = [module for module in whole.modules() if isinstance(module, LoRALinear)]
    adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    return adapters, sum(layer.weight.numel() for layer in layers)


@cache
def block_padding(model: QwenVLConfig) -> int:
    """Numbers that adamw_8bit adds to the rows of all matrices, to fill whole blocks."""
    with torch.device("meta"):
        matrices = [p for p in QwenVL(model).parameters() if p.ndim > 1]
    return sum(len(p) * (-p[0].numel() % BLOCK) for p in matrices)


@cache
def decoder_matrices(model: QwenVLConfig) -> int:
    """Numbers in all matrices of the decoder's layers."""
    with torch.device("meta"):
        layers = Decoder(model).layers
    return sum(p.numel() for p in layers.parameters() if p.ndim > 1)


@cache
def root_and_layer(model: QwenVLConfig, parameters: int) -> tuple[int, int]:
    """Numbers outside of layers and blocks (embedding, head, the tower's ends), and in the larger
    of a layer and a block: what several ranks gather, throughout a pass and one after the other."""
    layers = [decoder_layer_parameters(model, index) for index in range(model.num_hidden_layers)]
    block = vision_block_parameters(model)
    return parameters - sum(layers) - model.vision.depth * block, max(*layers, block)


@cache
def decoder_layer_parameters(model: QwenVLConfig, index: int = 0) -> int:
    """Numbers in decoder layer `index`."""
    with torch.device("meta"):
        return sum(p.numel() for p in DecoderLayer(model, index).parameters())


@cache
def vision_block_parameters(model: QwenVLConfig) -> int:
    """Numbers in one block of the vision tower."""
    with torch.device("meta"):
        tower = family_of(model).VisionTower(replace(model.vision, depth=1))
    return sum(p.numel() for p in tower.blocks.parameters())
