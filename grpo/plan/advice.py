"""Which flags make a run fit the memory of its GPU, by the plan's estimate."""

from collections.abc import Callable
from dataclasses import replace

import torch

USABLE = 15 / 16  # the rest is CUDA's own and what the allocator cannot use: 22.5 of 24 GB

# With adapters these have no effect, and are refused.
LORA = {"use_peft": True, "optim": "adamw_torch", "cpu_offload": False, "freeze_vision": False}
# What lowers the peak, the least loss of speed first, and what it costs.
CHANGES = (
    ({"tokens_per_pack": 8192}, "shorter passes, more of them"),
    ({"tokens_per_pack": 4096}, "shorter passes, more of them"),
    ({"cuda_graphs": False}, "frees sampling's memory during training; slower sampling"),
    ({"freeze_vision": True}, "the vision tower stays as it is; faster"),
    ({"optim": "adamw_8bit"}, "no float32 masters, moments in 8 bits; weights rounded by chance"),
    ({"cpu_offload": True}, "masters, moments, reference in the CPU's memory; slower"),
    (LORA, "only adapters are trained (LoRA), at a higher --learning_rate"),
    ({"beta": 0.0}, "no KL term, no reference"),
    ({"gradient_checkpointing": True}, "a third more time"),
    ({"reshard_after_forward": True}, "more traffic between GPUs"),
    ({"tokens_per_pack": 2048}, "shorter passes, more of them"),
    ({"prompts_per_step": 4}, "fewer prompts a step"),
    (LORA | {"load_in_4bit": True}, "LoRA beside frozen weights in 4 bits; slower decoding"),
)
WITH_PEFT = ("tokens_per_pack", "cuda_graphs", "gradient_checkpointing")
WITH_PEFT += ("prompts_per_step", "load_in_4bit")


def gpu_gb(config, device: torch.device) -> float | None:
    """GB (1e9 bytes) of a GPU: --gpu_memory, else what this device has; None on a CPU."""
    if config.gpu_memory is not None:
        return config.gpu_memory
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def changes(config, world: int) -> list[tuple[dict, str, str]]:
    """(change of the config, as flags, what it costs) of all that may lower the peak here."""
    found = []
    for change, cost in CHANGES:
        change = {name: value for name, value in change.items() if getattr(config, name) != value}
        smaller = all(getattr(config, n) > v for n, v in change.items() if type(v) in (int, float))
        with_peft = not config.use_peft or all(name in WITH_PEFT for name in change)
        sharded = world > 1 and not config.use_peft
        if change and smaller and with_peft and (sharded or "reshard_after_forward" not in change):
            found.append((change, as_flags(change), cost))
    return found


def as_flags(change: dict) -> str:
    """`--name value` of each change; what goes back to its default is to be left out."""
    flags, left_out = [], []
    for name, value in change.items():
        if "use_peft" in change and LORA.get(name, True) is not True:
            left_out.append(f"--{name}")
        elif value is True:
            flags.append(f"--{name}" + " true" * (name == "gradient_checkpointing"))
        else:
            flags.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    return " ".join(flags) + f" (without {', '.join(left_out)})" * bool(left_out)


def advise(config, world: int, peak: Callable, gb: float) -> list[str]:
    """Whether the run fits a GPU of `gb` GB, and which flags would make it fit.

    peak: (config, number of ranks) -> GB on the fullest. Lines of text.
    """
    needed, usable = peak(config, world), gb * USABLE
    if needed <= usable:
        return [f"fits      {needed:.1f} of the {usable:.1f} GB that are usable of {gb:g}"]
    lines = [
        f"too much  {needed:.1f} GB, and {usable:.1f} are usable of {gb:g}. Each alone gives:",
        *lowered(config, world, peak),
    ]
    chosen = fitting(config, world, peak, usable)
    if chosen:
        flags = " ".join(flag for _, flag, _ in chosen)
        best = peak(applied(config, chosen), world)
        lines.append(f"  it fits with {flags}: {best:.1f} GB")
        return lines
    more = [n for n in (2, 4, 8, 16) if n > world and peak(config, n) <= usable]
    if more:
        lines.append(f"  it fits on {more[0]} such GPUs: {peak(config, more[0]):.1f} GB each")
    else:
        lines.append("  no flag makes it fit: take a smaller model or larger GPUs")
    return lines


def lowered(config, world: int, peak: Callable) -> list[str]:
    """A line for each change: its flag, the peak with it alone, what it costs."""
    return [
        f"  {flag:<32}{peak(replace(config, **change), world):6.1f} GB  {cost}"
        for change, flag, cost in changes(config, world)
    ]


def applied(config, chosen: list):
    """The config with all of these changes, in order."""
    for change, _, _ in chosen:
        config = replace(config, **change)
    return config


def fitting(config, world: int, peak: Callable, usable: float) -> list:
    """The first changes, in order, that make the run fit together, without those that turn out not
    to be needed; empty if all of them do not."""
    chosen = []
    for one in changes(config, world):
        if "use_peft" in one[0]:  # in the place of all that has no effect with it
            chosen = [other for other in chosen if other[0].keys() <= set(WITH_PEFT)]
        chosen.append(one)
        if peak(applied(config, chosen), world) <= usable:
            break
    else:
        return []
    for one in reversed(list(chosen)):  # the dearest first
        rest = [other for other in chosen if other is not one]
        if rest and peak(applied(config, rest), world) <= usable:
            chosen = rest
    return chosen
