"""Which flags go together: a contradiction is refused, a flag without effect is said in the plan.

A contradiction asks for what the run would not do: RLOO's advantage, divided. A flag without effect
asks for nothing that the run does not do anyway: a clip range where every ratio is 1. Whole command
lines are pasted, so it is said in one line and the run goes on. A flag at its default is never
mentioned.

Not here: what a flag is and which values it takes by itself (config.py); what depends on the data
or the device, which is checked where they are known.
"""

from typing import NamedTuple

from data.errors import UserError
from grpo.engine.adapters import vision_is_frozen
from grpo.loss import CLIPPED


class Needs(NamedTuple):
    """`flag` may differ from its default only where the flag `other` has one of `values`."""

    flag: str
    other: str
    values: tuple
    why: str


# Each with what would happen instead of what was asked for.
CONTRADICTIONS = (
    # The tokens that should be left out would be trained.
    Needs(
        "top_entropy_quantile",
        "importance_sampling_level",
        ("token", "sequence_token"),
        "one ratio of a whole completion gives every token of it a gradient",
    ),
    # The estimator would be ignored. (Before the next, which would send the user round in a circle:
    # the two want different --scale_rewards.)
    Needs(
        "multi_objective_aggregation",
        "advantage_estimator",
        ("grpo",),
        "leave-one-out compares sums of rewards",
    ),
    # Each reward would be divided all the same.
    Needs(
        "multi_objective_aggregation",
        "scale_rewards",
        ("group",),
        "each reward is divided by its own deviation in the group",
    ),
    # The penalty would be left out.
    Needs(
        "multi_objective_aggregation",
        "overlong_buffer",
        (0,),
        "the penalty is added to the sum of rewards",
    ),
    # Divided, it is GRPO's advantage times G / (G - 1).
    Needs(
        "advantage_estimator",
        "scale_rewards",
        ("none",),
        "leave-one-out does not divide",
    ),
    # Its value is biased: no ratio makes its gradient that of the KL divergence.
    Needs(
        "use_bias_correction_kl",
        "kl_estimator",
        ("k1", "k3"),
        "the value of k2 is biased, and the ratio cannot correct that",
    ),
    # All weights would be trained, in full precision.
    Needs(
        "load_in_4bit",
        "use_peft",
        (True,),
        "weights in 4 bits stay as they are, and adapters beside them are trained",
    ),
    # The adapter would be ignored, by an evaluation too.
    Needs(
        "adapter_name_or_path",
        "use_peft",
        (True,),
        "without it a run has no adapters",
    ),
    # The layers of the adapter would be trained, whatever the flag names.
    Needs(
        "lora_target_modules",
        "adapter_name_or_path",
        (None,),
        "an adapter has its layers already",
    ),
    # Another optimizer would run than the one that is named.
    Needs(
        "optim",
        "use_peft",
        (False,),
        "adapters are few, so their masters and moments are float32 (adamw_torch)",
    ),
    # Masters and moments would stay on the device.
    Needs(
        "cpu_offload",
        "use_peft",
        (False,),
        "adapters are few, so their masters and moments stay on the device, and the reference is "
        "the model itself",
    ),
    # --model_name_or_path would be evaluated, and not the checkpoint.
    Needs(
        "resume_from_checkpoint",
        "eval_only",
        (False,),
        "an evaluation continues no run, and takes a checkpoint as --model_name_or_path, or one of "
        "adapters as --adapter_name_or_path",
    ),
    # The run would be planned for another machine than its own.
    Needs(
        "gpu_memory",
        "dry_run",
        (True,),
        "it plans for a GPU that is not here",
    ),
)

TOKENS = 2e9  # of a step's completions: each has a random number in memory

ONE_UPDATE = (
    "with one update a step every ratio is 1; --num_iterations and --num_minibatches make more"
)
ON_POLICY = {"cispo": "dapo", "sapo": "grpo"}  # whose gradient it is where every ratio is 1


def check_combinations(config) -> None:
    """Raises UserError naming flags that contradict each other."""
    for flag, other, allowed, why in CONTRADICTIONS:
        value, found = getattr(config, flag), getattr(config, other)
        if value == _default(config, flag) or found in allowed:
            continue
        if not any(allowed):  # the other must be left out
            both = f"{_typed(flag, value)} does not go with --{other}"
            raise UserError(f"{both}: {why}; leave one of them out")
        wanted = " or ".join(str(one) for one in allowed)
        needs = f"--{other}" if allowed == (True,) else f"--{other} {wanted}, not {found}"
        raise UserError(f"{_typed(flag, value)} needs {needs}: {why}")
    tokens = config.prompts_per_step * config.num_generations * config.max_completion_length
    if tokens > TOKENS:
        raise UserError(
            f"--prompts_per_step x --num_generations x --max_completion_length are up to "
            f"{tokens:.1e} tokens a step, and at most {TOKENS:.0e} are sampled"
        )
    if config.num_minibatches > config.prompts_per_step:
        raise UserError(
            f"--num_minibatches {config.num_minibatches} is above --prompts_per_step "
            f"{config.prompts_per_step}: each part needs a prompt"
        )
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo" and (config.epsilon_high is None or high <= 1):
        raise UserError(
            "--loss_type cispo needs --epsilon_high above 1: here it is the largest ratio "
            "itself (ScaleRL takes 5), not its distance from 1"
            + (f"; it is {high:g}" if config.epsilon_high is not None else "")
        )
    if config.delta is not None and config.loss_type in CLIPPED and config.delta <= 1 + high:
        raise UserError(
            f"--delta {config.delta} is not above 1 + --epsilon_high, {1 + high:g}: it is there "
            "for ratios that --epsilon_high does not clip (INTELLECT-2 takes 4)"
        )


def without_effect(config, world: int) -> list[str]:
    """A sentence for each flag that was given and has no effect with the others as given.

    world: the number of ranks. A flag at its default is not mentioned, nor is one that a resumed
    run reads from its own config.yaml.
    """
    sentences = {}
    for flags, is_idle, why in _idle_flags(config, world):
        for flag in flags:
            changed = getattr(config, flag) != _default(config, flag)
            if is_idle and changed and flag in config.given:
                sentences.setdefault(flag, f"--{flag} has no effect: {why}")
    on_policy = config.updates_per_step == 1 and config.loss_type in ON_POLICY
    if on_policy and "loss_type" in config.given:
        gradient = f"the gradient is {ON_POLICY[config.loss_type]}'s"
        sentences["loss_type"] = f"--loss_type {config.loss_type}: {gradient}, as {ONE_UPDATE}"
    return list(sentences.values())


def _idle_flags(config, world: int) -> list[tuple[tuple[str, ...], bool, str]]:
    """(flags, whether they have no effect with the others as given, why), of all that may not."""
    loss, one_update, adapters = config.loss_type, config.updates_per_step == 1, config.use_peft
    temperatures = ("sapo_temperature_pos", "sapo_temperature_neg")
    ratio = ("importance_sampling_level", "epsilon", "delta", *temperatures)
    ratio += () if loss == "cispo" else ("epsilon_high",)  # cispo asks for it all the same
    lora = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora")
    kl = ("kl_estimator", "kl_alarm", "use_bias_correction_kl")
    sharding, one_set = ("shard_size", "reshard_after_forward"), len(config.dataset_name or ()) < 2
    clipped = f"it is for --loss_type {', '.join(CLIPPED[:-1])} or {CLIPPED[-1]}"
    epochs = f"--max_steps {config.max_steps} decides"
    return [
        (ratio, one_update, ONE_UPDATE),
        (("epsilon", "delta"), loss not in CLIPPED, clipped),
        (("epsilon_high",), loss == "sapo", "--loss_type sapo has a soft gate in its place"),
        (temperatures, loss != "sapo", "it is for --loss_type sapo"),
        (kl, config.beta == 0, "--beta 0 has no KL term"),
        (("max_sampling_rounds",), not config.dynamic_sampling, "it is for --dynamic_sampling"),
        (("num_train_epochs",), config.max_steps is not None, epochs),
        (lora, not adapters, "it is for --use_peft, without which all weights are trained"),
        (
            ("vision_learning_rate",),
            vision_is_frozen(config),
            "the vision tower is frozen, by --freeze_vision or as it has no adapters "
            "(--lora_target_modules visual.qkv)",
        ),
        (("freeze_vision",), adapters, "with --use_peft the vision tower is frozen anyway"),
        (("timeout",), world == 1, "with one rank there is no other to wait for"),
        (sharding, world == 1, "with one rank nothing is sharded"),
        (sharding, adapters, "with --use_peft every rank holds all weights"),
        (("dataset_weights",), one_set, "there is one data set"),
        (("run_name",), not config.trackers, "it names the run for --report_to"),
    ]


def _default(config, flag: str):
    return config.__dataclass_fields__[flag].default


def _typed(flag: str, value) -> str:
    """A flag as one would type it."""
    if value is True:
        return f"--{flag}"
    words = value if isinstance(value, list | tuple) else [value]
    return " ".join([f"--{flag}", *(f"{w:g}" if isinstance(w, float) else str(w) for w in words)])
