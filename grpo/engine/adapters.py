"""The LoRA adapters that --use_peft and its flags ask for.

Not here: layers with adapters and their files (models/lora.py).
"""

from dataclasses import replace
from pathlib import Path

from data.errors import UserError
from models.lora import LoRA, read_adapter


def lora_of(config) -> LoRA | None:
    """The adapters that --use_peft trains; None without it.

    Raises UserError for an --adapter_name_or_path that cannot be used, and for flags that
    contradict it.
    """
    if config.lora_dropout:
        raise UserError(
            f"--lora_dropout is {config.lora_dropout}; it must be 0: what is trained would not be "
            f"what was sampled"
        )
    if not config.use_peft:
        return None
    folder = config.adapter_name_or_path
    if folder is None:
        lora = LoRA(
            r=config.lora_r,
            alpha=config.lora_alpha,
            targets=tuple(config.lora_target_modules or ()),
            use_rslora=config.use_rslora,
            base=config.model_name_or_path,
        )
    else:
        lora = _named_adapter(config, Path(folder))
    if lora.in_tower and config.freeze_vision:
        source = f"the adapter in {folder}" if folder else "--lora_target_modules"
        raise UserError(
            f"--freeze_vision does not go with {source}, which has layers of the vision tower"
        )
    return lora


def _named_adapter(config, folder: Path) -> LoRA:
    """The adapter in --adapter_name_or_path. Raises UserError as `lora_of`."""
    if not folder.is_dir():
        raise UserError(
            f"--adapter_name_or_path {folder}: no such folder; fetch it from the hub first"
        )
    adapter = read_adapter(folder)
    flags = {"lora_r": adapter.r, "lora_alpha": adapter.alpha, "use_rslora": adapter.use_rslora}
    for name, value in flags.items():
        given, default = getattr(config, name), type(config).__dataclass_fields__[name].default
        # a run's own config.yaml names every flag, so a default need not be what the user wants
        if name in config.given and given not in (value, default):
            raise UserError(f"--{name} {given}: the adapter in {folder} has {value}; leave it out")
    return replace(adapter, base=config.model_name_or_path)


def vision_is_frozen(config) -> bool:
    """Whether the vision tower is not trained: by --freeze_vision, or as it has no adapters."""
    lora = lora_of(config)
    return config.freeze_vision or (lora is not None and not lora.in_tower)
