"""Which model a folder holds: config.json's `model_type` decides, never the folder's name."""

import json
from pathlib import Path
from types import ModuleType

from data.errors import UserError
from models import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from models.config import QwenVLConfig
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
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        what = "no config.json: this is not a model folder"
        if (Path(folder) / "adapter_config.json").is_file():
            what = (
                "an adapter, not a model: name its base as --model_name_or_path and this folder as "
            )
            what += "--adapter_name_or_path, with --use_peft"
        raise UserError(f"{folder}: {what}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no JSON object")
    return parse_config(raw, str(path))


def parse_config(raw: dict, where: str) -> QwenVLConfig:
    """`raw` as a QwenVLConfig; `where` opens each message. Raises UserError as `read_config`."""
    found = raw.get("model_type")
    if found not in FAMILIES:
        why = f": {REFUSED[found]}" if found in REFUSED else ""
        known = ", ".join(map(repr, FAMILIES))
        raise UserError(f"{where}: model_type is {found!r}{why}; this trainer knows {known}")
    if kind := raw.get("quantization_config"):
        method = kind.get("quant_method", "quantized") if isinstance(kind, dict) else kind
        raise UserError(
            f"{where}: the weights are quantized ({method}), and cannot be trained here; take "
            f"the checkpoint in bfloat16"
        )
    return FAMILIES[found].read(raw, where)


def published_name(name: str, config: QwenVLConfig) -> str:
    """A parameter's name here -> in the published files of its family."""
    if not family_of(config).PREFIXED_NAMES or name.startswith("lm_head"):
        return name
    return module_name(name)
