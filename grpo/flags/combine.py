"""Which flags go together: refused by name where one has no effect or contradicts another.

What each flag is, and the values that it takes alone, is in config.py; what the losses combine is a
table in grpo/loss.py.
"""

from data.errors import UserError
from grpo.flags.parser import own_flags
from grpo.loss import CLIPPED

# What does not go together. Each row: a flag; another flag; the values of the other with which the
# first may be anything but its default; and why with no others.
COMBINES = (
    ("epsilon", "loss_type", CLIPPED, "the others do not clip from below"),
    ("epsilon_high", "loss_type", (*CLIPPED, "cispo"), "sapo has a soft gate in its place"),
    ("delta", "loss_type", CLIPPED, "the others limit large ratios by themselves"),
    ("sapo_temperature_pos", "loss_type", ("sapo",), "the others have no gate"),
    ("sapo_temperature_neg", "loss_type", ("sapo",), "the others have no gate"),
    (
        "top_entropy_quantile",
        "importance_sampling_level",
        ("token", "sequence_token"),
        "one ratio of a whole completion gives every token of it a gradient",
    ),
    ("advantage_estimator", "scale_rewards", ("none",), "leave-one-out does not divide"),
    (
        "multi_objective_aggregation",
        "scale_rewards",
        ("group",),
        "each reward is divided by its own deviation in the group",
    ),
    (
        "multi_objective_aggregation",
        "advantage_estimator",
        ("grpo",),
        "leave-one-out compares sums of rewards",
    ),
    ("multi_objective_aggregation", "overlong_buffer", (0,), "the penalty is added to the sum"),
)

EVALUATION = (  # the flags that --eval_only looks at
    *("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split"),
    *("test_share", "prompt_template", "output_dir", "run_name", "report_to", "reward_weights"),
    *("max_prompt_length", "max_completion_length", "min_pixels", "max_pixels", "bf16"),
    *("use_peft", "load_in_4bit", "adapter_name_or_path", "attn_implementation", "timeout"),
    *("eval_samples", "eval_samples_per_prompt", "eval_only", "gpu_memory", "dry_run"),
)

RATIO = ("importance_sampling_level", "epsilon", "epsilon_high", "delta")
RATIO += ("sapo_temperature_pos", "sapo_temperature_neg")  # flags about a ratio that is not 1
OFF_POLICY = {"cispo": "dapo", "sapo": "grpo"}  # where every ratio is 1, the gradient is that one's


def check_loss(config) -> None:
    """Raises UserError naming flags of the loss that do not go together."""
    for name, other, allowed, why in COMBINES:
        value, others = getattr(config, name), getattr(config, other)
        if value != config.__dataclass_fields__[name].default and others not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise UserError(f"--{name} {value} needs --{other} {wanted}, not {others}: {why}")
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo" and (config.epsilon_high is None or high <= 1):
        raise UserError(
            "--loss_type cispo needs --epsilon_high above 1: here it is the largest ratio "
            "itself (ScaleRL takes 5), not its distance from 1"
            + (f"; it is {high:g}" if config.epsilon_high is not None else "")
        )
    if config.delta is not None and config.delta <= 1 + high:
        raise UserError(
            f"--delta {config.delta} is not above 1 + --epsilon_high, {1 + high:g}: it is there "
            "for ratios that --epsilon_high does not clip (INTELLECT-2 takes 4)"
        )


def unused(config) -> list[str]:
    """The flags that were given and that --eval_only does not look at."""
    drawn = (
        ("seed", "temperature", "top_p", "top_k", "overlong_buffer")
        if config.eval_samples_per_prompt
        else ()
    )
    read = {*EVALUATION, *drawn, *own_flags(config)}
    return sorted(name for name in config.given if name not in read)


def check_effects(config, world: int) -> None:
    """Raises UserError naming a flag that was given and has no effect with `world` ranks."""
    adapters = "it is for --use_peft"
    still = config.num_iterations == 1 and "with --num_iterations 1 every ratio is 1"
    unsharded = world == 1 and "with one rank nothing is sharded"
    unsharded = unsharded or (config.use_peft and "with --use_peft every rank holds all weights")
    no_effect = {
        "timeout": world == 1 and "with one rank there is no other to wait for",
        "shard_size": unsharded,
        "reshard_after_forward": unsharded,
        "cpu_offload": config.use_peft
        and "with --use_peft there is neither a reference nor a large optimizer",
        "optim": config.use_peft
        and "adapters are few, their masters and moments are float32 (adamw_torch)",
        "run_name": not config.trackers and "it names the run for --report_to",
        "freeze_vision": config.use_peft
        and "with --use_peft the vision tower stays as it is, "
        "but for layers that --lora_target_modules names",
        "load_in_4bit": not config.use_peft and adapters,
        "lora_r": not config.use_peft and adapters,
        "lora_alpha": not config.use_peft and adapters,
        "lora_target_modules": (not config.use_peft and adapters)
        or (config.adapter_name_or_path and "--adapter_name_or_path decides it"),
        "use_rslora": not config.use_peft and adapters,
        "adapter_name_or_path": not config.use_peft and adapters,
        "resume_from_checkpoint": config.eval_only and "--eval_only trains nothing",
        "gpu_memory": not config.dry_run and "it is for --dry_run",
        "loss_type": config.loss_type in OFF_POLICY and still,
        **dict.fromkeys(RATIO, still),
        "max_sampling_rounds": not config.dynamic_sampling and "it is for --dynamic_sampling",
    }
    for name, why in no_effect.items():
        changed = getattr(config, name) != config.__dataclass_fields__[name].default
        if why and changed and name in config.given:
            like = OFF_POLICY.get(getattr(config, name))
            instead = f"take --{name} {like}" if like else "leave it out"
            more = "take 2 or more, or " if why is still else ""
            raise UserError(f"--{name} has no effect here: {why}; {more}{instead}")
