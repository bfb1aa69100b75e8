"""Which flags lower the peak of memory, what each leaves by the plan's estimate, and what it costs.

The plan takes its advice from here before a run, and the message after memory has run out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from grpo.flags.config import TrainingConfig

USABLE = 15 / 16  # the rest is CUDA's own and what the allocator cannot use: 22.5 of 24 GB

# What a change makes smaller: what a rank holds throughout, what passes over a pack hold, what
# sampling holds.
STAYS, PASSES, SAMPLING, EVALUATION = "stays", "passes", "sampling", "evaluation"
PHASES = {"rollout": SAMPLING, "evaluation": EVALUATION}
PHASES |= dict.fromkeys(("loading", "optimizer", "gather", "saving"), STAYS)  # others: PASSES


@dataclass(frozen=True)
class Change:
    """Flags that lower the peak, what that costs, and what it makes smaller."""

    flags: dict
    cost: str
    of: str


# With adapters these flags must have their defaults.
LORA = {"use_peft": True, "optim": "adamw_torch", "cpu_offload": False, "freeze_vision": False}
# The least loss of speed first.
CHANGES = (
    Change({"tokens_per_pack": 8192}, "shorter passes, more of them", PASSES),
    Change({"tokens_per_pack": 4096}, "shorter passes, more of them", PASSES),
    Change(
        {"cuda_graphs": False}, "frees sampling's memory during training; slower sampling", STAYS
    ),
    Change({"freeze_vision": True}, "the vision tower stays as it is; faster", STAYS),
    Change(
        {"optim": "adamw_8bit"},
        "no float32 masters, moments in 8 bits; stochastic rounding of weights",
        STAYS,
    ),
    Change({"cpu_offload": True}, "masters, moments, reference in the CPU's memory; slower", STAYS),
    Change(LORA, "only adapters are trained (LoRA), at a higher --learning_rate", STAYS),
    Change({"beta": 0.0}, "no KL term, no reference", STAYS),
    Change({"gradient_checkpointing": True}, "a third more time", PASSES),
    Change({"reshard_after_forward": True}, "more traffic between GPUs", PASSES),
    Change({"tokens_per_pack": 2048}, "shorter passes, more of them", PASSES),
    Change({"prompts_per_step": 4}, "fewer prompts a step", SAMPLING),
    Change(
        LORA | {"load_in_4bit": True},
        "LoRA beside frozen weights in 4 bits; slower decoding",
        STAYS,
    ),
)
WITH_PEFT = ("tokens_per_pack", "cuda_graphs", "gradient_checkpointing")
WITH_PEFT += ("prompts_per_step", "load_in_4bit")
ON_GPUS = ("cuda_graphs", "cpu_offload")
# What else helps: by how much depends on the data, or is not a flag.
BESIDES = {
    STAYS: ("more ranks", "a smaller model"),
    PASSES: ("a smaller --max_pixels",),
    SAMPLING: tuple(
        f"a smaller --{name}" for name in ("num_generations", "max_completion_length", "max_pixels")
    ),
    EVALUATION: ("a smaller --max_completion_length", "a smaller --max_pixels"),
}


def gpu_gb(config: TrainingConfig, device: torch.device) -> float | None:
    """GB (1e9 bytes) of a GPU: --gpu_memory, else what this device has; None on a CPU."""
    if config.gpu_memory is not None:
        return config.gpu_memory
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def changes(config: TrainingConfig, world: int, device: str = "cuda") -> list[Change]:
    """All that may lower the peak of a run with this config, without what is so already."""
    found = []
    for change in CHANGES:
        flags = {n: value for n, value in change.flags.items() if getattr(config, n) != value}
        numbers = {n: value for n, value in flags.items() if type(value) in (int, float)}
        smaller = all(getattr(config, name) > value for name, value in numbers.items())
        with_peft = not config.use_peft or all(name in WITH_PEFT for name in flags)
        sharded = world > 1 and not config.use_peft
        possible = sharded or "reshard_after_forward" not in flags
        parts = config.num_minibatches  # each needs a prompt
        possible &= flags.get("prompts_per_step", parts) >= parts
        possible &= device == "cuda" or not any(name in ON_GPUS for name in flags)
        if flags and smaller and with_peft and possible:
            found.append(replace(change, flags=flags))
    return found


def typed(flags: dict) -> str:
    """`--name value` of each; what goes back to its default is to be left out."""
    words, left_out = [], []
    for name, value in flags.items():
        if "use_peft" in flags and LORA.get(name, True) is not True:
            left_out.append(f"--{name}")
        elif value is True:
            words.append(f"--{name}" + " true" * (name == "gradient_checkpointing"))
        else:
            words.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
    return " ".join(words) + f" (without {', '.join(left_out)})" * bool(left_out)


def what_helps(config: TrainingConfig, world: int, device: str) -> dict[str, str]:
    """For each of STAYS, PASSES, SAMPLING and EVALUATION: what makes it smaller, as a list in
    words."""
    helps = {kind: [] for kind in BESIDES}
    for change in changes(config, world, device):
        text = typed(change.flags)
        for name, value in change.flags.items():
            if type(value) is int:  # one of several values that would do
                text = f"a smaller --{name} (it is {getattr(config, name)})"
        if text not in helps[change.of]:
            helps[change.of].append(text)
    words = {kind: [*found, *BESIDES[kind]] for kind, found in helps.items()}
    return {
        kind: ", ".join(found[:-1]) + " or " * (len(found) > 1) + found[-1]
        for kind, found in words.items()
    }


def advise(config: TrainingConfig, world: int, peak: Callable, gb: float) -> list[str]:
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
        flags = " ".join(typed(change.flags) for change in chosen)
        best = peak(applied(config, chosen), world)
        lines.append(f"  it fits with {flags}: {best:.1f} GB")
        return lines
    more = [n for n in (2, 4, 8, 16) if n > world and peak(config, n) <= usable]
    if more:
        lines.append(f"  it fits on {more[0]} such GPUs: {peak(config, more[0]):.1f} GB each")
    else:
        lines.append("  no flag makes it fit: take a smaller model or larger GPUs")
    return lines


def lowered(config: TrainingConfig, world: int, peak: Callable) -> list[str]:
    """A line for each change: its flags, the peak with it alone, what it costs."""
    return [
        f"  {typed(change.flags):<32}{peak(applied(config, [change]), world):6.1f} GB  "
        f"{change.cost}"
        for change in changes(config, world)
    ]


def applied(config: TrainingConfig, chosen: list[Change]) -> TrainingConfig:
    """The config with all of these changes, in order."""
    for change in chosen:
        config = replace(config, **change.flags)
    return config


def fitting(config: TrainingConfig, world: int, peak: Callable, usable: float) -> list[Change]:
    """The first changes, in order, that make the run fit together, without those that turn out not
    to be needed; empty if all of them do not."""
    chosen: list[Change] = []
    for change in changes(config, world):
        if "use_peft" in change.flags:  # in place of all that does not go with it
            chosen = [other for other in chosen if other.flags.keys() <= set(WITH_PEFT)]
        chosen.append(change)
        if peak(applied(config, chosen), world) <= usable:
            break
    else:
        return []
    for change in reversed(list(chosen)):  # the dearest first
        rest = [other for other in chosen if other is not change]
        if rest and peak(applied(config, rest), world) <= usable:
            chosen = rest
    return chosen
