"""Which flags make a run fit the memory of its GPU, by the plan's estimate."""

from collections.abc import Callable
from dataclasses import replace

import torch

USABLE = 15 / 16  # the rest is CUDA's own and what the allocator cannot use: 22.5 of 24 GB

# What lowers the peak, the least loss of speed first, and what it costs.
CHANGES = (
    ("tokens_per_pack", 8192, "shorter passes, more of them"),
    ("tokens_per_pack", 4096, "shorter passes, more of them"),
    ("freeze_vision", True, "the vision tower stays as it is; faster"),
    ("optim", "adamw_8bit", "no float32 masters, moments in 8 bits; weights rounded by chance"),
    ("cpu_offload", True, "masters, moments, reference in the CPU's memory; slower"),
    ("use_peft", True, "only adapters are trained (LoRA), at a higher --learning_rate"),
    ("beta", 0.0, "no KL term, no reference"),
    ("gradient_checkpointing", True, "a third more time"),
    ("reshard_after_forward", True, "more traffic between GPUs"),
    ("tokens_per_pack", 2048, "shorter passes, more of them"),
    ("prompts_per_step", 4, "fewer prompts a step"),
    ("load_in_4bit", True, "with --use_peft: frozen weights in 4 bits; decoding is slower"),
)
WITHOUT_PEFT = {"freeze_vision", "beta", "optim", "cpu_offload"}


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
    for name, value, cost in CHANGES:
        now = getattr(config, name)
        sharded = world > 1 and not config.use_peft
        no_effect = config.use_peft and name in WITHOUT_PEFT | {"use_peft"}
        no_effect |= name == "reshard_after_forward" and not sharded
        no_effect |= name == "load_in_4bit" and not config.use_peft
        if name == "optim":
            changes_it = now == "adamw_torch"
        else:
            changes_it = now is False if isinstance(value, bool) else now > value
        if no_effect or not changes_it:
            continue
        flag = f"--{name}" if value is True and name != "gradient_checkpointing" else ""
        shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
        found.append(({name: value}, flag or f"--{name} {shown}", cost))
    return found


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
    to be needed, each flag changed as little as will do; empty if all of them do not."""
    chosen = []
    for one in changes(config, world):
        if "use_peft" in one[0]:  # these have no effect with it
            chosen = [other for other in chosen if not other[0].keys() & WITHOUT_PEFT]
        chosen.append(one)
        if peak(applied(config, chosen), world) <= usable:
            break
    else:
        return []
    for one in list(chosen):
        rest = [other for other in chosen if other is not one]
        if rest and peak(applied(config, rest), world) <= usable:
            chosen = rest
    for one in changes(config, world):  # a smaller change of the same flag may do
        same = [one if one[0].keys() == other[0].keys() else other for other in chosen]
        if one not in chosen and same != chosen and peak(applied(config, same), world) <= usable:
            return same
    return chosen
