"""Which model a folder holds: config.json's `model_type` decides, never the folder's name."""

import os
from pathlib import Path
from types import ModuleType

from data import files
from data.errors import UserError, shown
from models import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from models.config import QwenVLConfig
from models.folder import no_config
from models.mixer import Mixer
from models.names import module_name

FAMILIES = {module.MODEL_TYPE: module for module in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5)}
EXPERTS = "a mixture of experts, which is not written here; the dense models are"
REFUSED = {
    "qwen3_vl_moe": EXPERTS,
    "qwen3_5_moe": EXPERTS,
    "qwen3_5_moe_text": EXPERTS,
    "qwen3_5_text": "a decoder without its vision tower; take the model with both (qwen3_5)",
    "qwen4_exp": "an architecture that is not written here",
}


def family_of(config: QwenVLConfig) -> ModuleType:
    """The file with this model's `read`, `mixer`, `VisionTower` and what it was taught."""
    return FAMILIES[config.family]


def mixers_of(config: QwenVLConfig) -> list[type[Mixer]]:
    """The kind of each decoder layer."""
    return [family_of(config).mixer(config, index) for index in range(config.num_hidden_layers)]


def read_config(folder: Path) -> QwenVLConfig:
    """The config of the checkpoint in `folder`.

    Raises UserError if config.json is missing or unreadable, where `model_type` is another
    family's, if a needed key is missing, or if it asks for what this model does not do.
    """
    path = Path(folder) / "config.json"
    if not os.path.lexists(path):
        raise UserError(f"{folder}: {no_config(Path(folder))}")
    raw = files.read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no JSON object")
    return parse_config(raw, str(path))


def parse_config(raw: dict, where: str) -> QwenVLConfig:
    """`raw` as a QwenVLConfig; `where` opens each message. Raises UserError as `read_config`."""
    found = raw.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        why = f": {REFUSED[found]}" if isinstance(found, str) and found in REFUSED else ""
        known = ", ".join(map(repr, FAMILIES))
        raise UserError(f"{where}: model_type is {shown(found)}{why}; this trainer knows {known}")
    if kind := raw.get("quantization_config") or raw.get("compression_config"):
        method = kind.get("quant_method", "quantized") if isinstance(kind, dict) else kind
        raise UserError(
            f"{where}: the weights are quantized ({str(method)[:80]}), and cannot be trained here; "
            f"take the checkpoint in bfloat16 that it was made from (--load_in_4bit quantizes it "
            f"for LoRA)"
        )
    return FAMILIES[found].read(raw, where)


def published_name(name: str, config: QwenVLConfig) -> str:
    """A parameter's name here -> in the published files of its family."""
    if not family_of(config).PREFIXED_NAMES or name.startswith("lm_head"):
        return name
    return module_name(name)
