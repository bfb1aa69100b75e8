"""A dataclass as command-line flags and YAML; how user errors and Ctrl-C end a run.

Flags carry the names that TRL and transformers gave them. A flag this trainer has no use for is an
error that says what to use instead; none is accepted and ignored.
"""

import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

USER_ERROR, DIVERGED, RANK_LOST, INTERRUPTED = 2, 3, 4, 130
ROOT = Path(__file__).resolve().parent.parent
OWN_CODE = ("grpo", "models", "rewards", "data")


def flag(default, help: str, **metadata):
    """A dataclass field with its help text; `choices` may follow."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingConfig:
    """What every training script can be told. Lengths are in tokens unless they say otherwise."""

    model_name_or_path: str | None = flag(None, "checkpoint folder or hub name of a Qwen2-VL model")
    dataset_name: str | None = flag(
        None,
        "ViRFT data set: a save_to_disk folder, a parquet, JSON or JSONL file or a folder of them, "
        "or a hub name",
    )
    dataset_train_split: str = flag("train", "split to train on")
    dataset_test_split: str | None = flag(
        None, "held-out split to evaluate on; by default `test` where the data set has one"
    )
    output_dir: str | None = flag(None, "run folder; by default runs/<script>-<date and time>")
    run_name: str | None = flag(None, "name for --report_to; by default the run folder's")
    report_to: str = flag("none", "also send metrics to", choices=("none", "tensorboard", "wandb"))
    seed: int = flag(42, "fixes the order of prompts and every sample's random numbers")

    max_steps: int | None = flag(None, "steps to train; overrides --num_train_epochs")
    num_train_epochs: float = flag(1.0, "passes over the training split")
    prompts_per_step: int = flag(8, "prompts per step, over all ranks")
    num_generations: int = flag(8, "completions per prompt: the group size G")
    num_iterations: int = flag(1, "updates per rollout")
    tokens_per_pack: int = flag(
        16384, "tokens in one forward and backward pass; lower saves memory"
    )

    dynamic_sampling: bool = flag(
        False, "replace prompts whose completions all earn the same (DAPO, section 3.2)"
    )
    max_sampling_rounds: int = flag(4, "rounds of prompts that --dynamic_sampling draws at most")
    mask_truncated_completions: bool = flag(False, "leave truncated completions out of the loss")
    overlong_buffer: int = flag(
        0, "tokens before --max_completion_length over which up to 1 is taken off (DAPO, eq. 13)"
    )
    diagnose_after: int = flag(10, "explain a reward that is flat for so many steps; 0 never")

    temperature: float = flag(1.0, "sampling temperature, of the training log-probs too")
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this probability")
    top_k: int = flag(0, "sample from this many most likely tokens; 0 is off")
    max_prompt_length: int | None = flag(1024, "a longer prompt, image included, is refused")
    max_completion_length: int = flag(256, "a completion is cut at this length")
    min_pixels: int | None = flag(None, "least height x width of a resized image (checkpoint's)")
    max_pixels: int | None = flag(401408, "most height x width of a resized image")

    loss_type: str = flag("dapo", "how tokens are averaged", choices=("grpo", "dapo", "dr_grpo"))
    epsilon: float = flag(0.2, "clip range of the ratio, below 1")
    epsilon_high: float | None = flag(None, "clip range above 1; by default --epsilon")
    beta: float = flag(0.04, "weight of the KL term; 0 loads no reference model")
    kl_estimator: str = flag("k3", "estimator of the KL term", choices=("k1", "k2", "k3"))
    scale_rewards: str = flag(
        "group", "what rewards are divided by", choices=("group", "batch", "none")
    )
    reward_weights: list[float] | None = flag(
        None, "one weight per reward, in the order in which the script lists them; by default 1"
    )

    learning_rate: float = flag(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: str = flag(
        "linear", "how the rate falls to 0", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = flag(0.0, "share of the steps over which the rate rises from 0")
    weight_decay: float = flag(0.0, "decay of weight matrices")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm at this; 0 does not clip")
    bf16: bool | None = flag(
        None, "compute in bfloat16 with float32 master weights; by default on CUDA only"
    )
    gradient_checkpointing: bool = flag(
        True, "recompute each layer in the backward pass; saves memory, costs a third more time"
    )
    freeze_vision: bool = flag(
        False, "leave the vision tower as it is: each image is encoded once a step, not three times"
    )
    attn_implementation: str = flag(
        "auto", "attention kernel", choices=("auto", "flash_attention_2", "sdpa")
    )

    shard_size: int | None = flag(
        None, "ranks over which the model is sharded, such as those of a node; by default all"
    )
    reshard_after_forward: bool = flag(
        True, "gather layers again in the backward pass; false saves traffic and costs memory"
    )
    cpu_offload: bool = flag(False, "keep shards, gradients and moments in the CPU's memory")
    timeout: float = flag(1800.0, "seconds that ranks wait for one that is dead or stuck")
    max_bad_steps: int = flag(
        3, "end the run after so many steps in a row whose gradient is not finite"
    )
    kl_alarm: float | None = flag(
        None, "name a step's token of largest KL, in nats, where it is above this"
    )

    logging_steps: int = flag(1, "print and report every so many steps (metrics.jsonl has all)")
    save_steps: int = flag(100, "write checkpoint-N every so many steps; 0: only on an early end")
    save_total_limit: int | None = flag(
        None, "keep the newest N checkpoints and the best by evaluation"
    )
    resume_from_checkpoint: str | None = flag(
        None, "continue the run in --output_dir: `auto` for its newest checkpoint, or a folder"
    )
    eval_steps: int = flag(0, "evaluate every so many steps; 0 only before and after")
    eval_samples: int | None = flag(None, "evaluate on the first so many held-out rows only")
    dry_run: bool = flag(False, "check flags, data and model, print the plan and stop")


# What people type who come from TRL or Visual-RFT, and what they want here.
ELSEWHERE = {
    "per_device_train_batch_size": "--prompts_per_step counts prompts over all ranks",
    "gradient_accumulation_steps": "--tokens_per_pack cuts a step into passes by itself",
    "generation_batch_size": "--prompts_per_step counts prompts over all ranks",
    "steps_per_generation": "--num_iterations says how often a rollout is used",
    "deepspeed": "start several ranks with torchrun --nproc_per_node=N",
    "use_vllm": "there is no inference server: sampling uses the model in training",
    "fp16": "use --bf16",
    "freeze_vision_modules": "use --freeze_vision",
    "max_steps_per_epoch": "use --max_steps",
    "eval_strategy": "use --eval_steps N",
    "save_strategy": "use --save_steps N",
    "torch_dtype": "use --bf16 true or --bf16 false",
    "dataset_config": "give --dataset_name the folder or file itself",
    "reward_funcs": "the rewards stand in the script's score(): edit it there",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_config(cls: type, argv: list[str], demo: Path | None = None):
    """An instance of the dataclass `cls` from flags, over `--config FILE.yaml`, over its defaults.

    Where neither a YAML file nor a model nor a data set is named, a run that is resumed takes its
    own config.yaml and any other takes `demo`. The second value returned is the YAML file's path,
    or None.

    Raises ValueError for unknown flags and keys (naming the nearest one), values of the wrong type
    and values that cannot be meant.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = _Parser(
        description=cls.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="flags as YAML; flags override it")
    for f in fields.values():
        _add_flag(parser, f)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        raise ValueError(_unknown(word.split("=")[0], fields, "flag", "--"))
    given = {k: v for k, v in vars(known).items() if k != "config" and v is not None}
    path = Path(known.config) if known.config else None
    wanted = given.get("resume_from_checkpoint")
    if wanted not in (None, "auto"):
        given.setdefault("output_dir", str(Path(wanted).parent))
    if path is None and not {"model_name_or_path", "dataset_name"} & given.keys():
        path = demo
        if wanted is not None and "output_dir" in given:
            path = Path(given["output_dir"]) / "config.yaml"
            if not path.is_file():
                raise ValueError(f"--resume_from_checkpoint: no {path}, so no run to continue")
    values = {**_read_yaml(path, fields), **given} if path else given
    config = cls(**values)
    _check(config, fields)
    return config, path


def _add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field) -> None:
    kind, is_list = _kind(f.type)
    default = "" if f.default is None else f" (default: {f.default})"
    options = {"help": f.metadata["help"].replace("%", "%%") + default, "default": None}
    if kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        options |= {"type": kind, "choices": f.metadata.get("choices")}
        options |= {"nargs": "+"} if is_list else {}
        if not options["choices"]:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    parser.add_argument(f"--{f.name}", **options)


def _kind(annotation) -> tuple[type, bool]:
    """(int, False) for `int | None`, (float, True) for `list[float] | None` and so on."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _unknown(word: str, fields: dict, what: str, prefix: str = "") -> str:
    name = word.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, fields, n=1)
    if name in ELSEWHERE:
        hint = ELSEWHERE[name]
    elif name in fields:
        hint = f"write {prefix}{name}"
    else:
        hint = f"did you mean {prefix}{near[0]}?" if near else "--help lists them all"
    return f"unknown {what} {word}: {hint}"


def _read_yaml(path: Path, fields: dict) -> dict:
    """The keys of a YAML file, checked against the dataclass; `${here}` is the file's folder."""
    import yaml

    try:
        text = path.read_text().replace("${here}", str(path.resolve().parent))
        raw = yaml.safe_load(text) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: not a readable YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"--config {path}: holds no `flag: value` lines")
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise ValueError(f"--config {path}: {_unknown(str(key), fields, 'key')}")
        kind, is_list = _kind(fields[key].type)
        if value is None and isinstance(fields[key].type, types.UnionType):
            continue
        try:
            if is_list != isinstance(value, list):
                raise TypeError
            values[key] = [_cast(v, kind) for v in value] if is_list else _cast(value, kind)
        except (TypeError, ValueError, OverflowError):
            wanted = f"a list of {kind.__name__}" if is_list else kind.__name__
            raise ValueError(f"--config {path}: {key} is {value!r}, not {wanted}") from None
    return values


def _cast(value, kind: type):
    """`value` as `kind` where nothing is lost: 1e-6 is a string to YAML, and true is no number."""
    if isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is str and not isinstance(value, str | int | float):
        raise TypeError
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return kind(float(value)) if kind is int else kind(value)


def _check(config, fields: dict) -> None:
    """Values that no run can mean. Raises ValueError naming the flag."""
    for f in fields.values():
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"--{f.name} {value!r} is none of {', '.join(choices)}")
    bounds = {
        "prompts_per_step": 1,
        "num_iterations": 1,
        "tokens_per_pack": 1,
        "max_completion_length": 1,
        "max_prompt_length": 1,
        "max_steps": 1,
        "min_pixels": 1,
        "max_pixels": 1,
        "logging_steps": 1,
        "save_total_limit": 1,
        "eval_samples": 1,
        "max_sampling_rounds": 1,
        "max_bad_steps": 1,
        "shard_size": 1,
        "kl_alarm": 0,
        "overlong_buffer": 0,
        "diagnose_after": 0,
        "save_steps": 0,
        "eval_steps": 0,
        "top_k": 0,
        "beta": 0,
        "epsilon": 0,
        "epsilon_high": 0,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "warmup_ratio": 0,
    }
    for f in fields.values():
        value, (low, high) = getattr(config, f.name), f.metadata.get("between", (None, None))
        if low is not None and not low <= value < high:
            raise ValueError(f"--{f.name} is {value}; it must be at least {low} and below {high}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{f.name} is {number}; it must be finite")
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if config.num_generations < 2:
        raise ValueError(
            f"--num_generations is {config.num_generations}: an advantage compares the completions "
            f"of a group, so it takes at least 2"
        )
    positive = ("temperature", "top_p", "num_train_epochs", "timeout")
    for name in positive:
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be above 0")
    for name in ("top_p", "warmup_ratio"):
        if getattr(config, name) > 1:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be at most 1")
    if config.kl_alarm is not None and config.beta == 0:
        raise ValueError("--kl_alarm is about the reference, and --beta 0 has none")
    if config.resume_from_checkpoint == "auto" and config.output_dir is None:
        raise ValueError("--resume_from_checkpoint auto needs --output_dir, the run folder")
    for name in ("model_name_or_path", "dataset_name"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed")


def run(main: Callable[[list[str]], int]) -> None:
    """Calls main(argv) and exits with its code.

    A ValueError that this project's own code raised is a user error: one message, exit code 2. One
    from inside a library is a bug and keeps its traceback (as all do under GRPO_TRACEBACK=1). Where
    a collective fails the message says which rank was missing: exit code 4.
    """
    ranks, code = None, 0
    try:
        code = main(sys.argv[1:])
    except (ValueError, FloatingPointError, RuntimeError) as error:
        ranks = _joined()
        if ranks and ranks.collective_failed(error):
            first = str(error).splitlines()[0]
            print(
                f"stopped: in {ranks.doing}: {ranks.who_is_missing()} ({first})\n"
                f"Go on from the last checkpoint with --resume_from_checkpoint auto; "
                f"--timeout sets how long ranks wait.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(RANK_LOST)  # a process group that lost a member cannot be left in order
        if ranks:
            ranks.leave(str(error).splitlines()[0])
        if isinstance(error, FloatingPointError):
            advice = "go on from an earlier checkpoint with --resume_from_checkpoint checkpoint-N"
            print(f"stopped: {error}: {advice}", file=sys.stderr, flush=True)
            code = DIVERGED
        elif _meant_for_users(error) and not os.environ.get("GRPO_TRACEBACK"):
            main_says = ranks and ranks.said_by_main(str(error).splitlines()[0])
            if not main_says and (ranks or int(os.environ.get("RANK", 0)) == 0):
                print(f"error: {error}", file=sys.stderr, flush=True)
            code = USER_ERROR
        else:
            raise
    except KeyboardInterrupt:  # before the loop, where there is nothing to keep
        code = INTERRUPTED
    if _joined():
        # at once: others may be in the middle of a collective, and taking the communication's
        # threads down in order now and then ends in an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _meant_for_users(error: Exception) -> bool:
    """Whether a `raise` in this project's own code made it, rather than a library or a slip."""
    if not isinstance(error, ValueError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(frame.filename).resolve()
    ours = file.parent == ROOT or any(file.is_relative_to(ROOT / name) for name in OWN_CODE)
    return ours and (frame.line or "").startswith("raise ")


def _joined():
    """This process's Ranks where it is one of several, else None."""
    module = sys.modules.get("grpo.dist")
    return module.joined if module else None


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step at hand.

    A later one leaves at once. Repeats within two seconds are one request: torchrun passes on a
    signal that the terminal has delivered already.
    """

    def __init__(self):
        self.asked_at: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if os.environ.get("RANK", "0") == "0":  # print() is not for signal handlers
                os.write(2, b"\nstopping after the step at hand; a second signal leaves at once\n")
        elif now - self.asked_at > 2:
            os._exit(INTERRUPTED)

    @property
    def asked(self) -> bool:
        return self.asked_at is not None
