"""Flags, YAML and how a run ends."""

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields

import pytest
import yaml

from grpo.flags.combine import CONTRADICTIONS, without_effect
from grpo.flags.config import TrainingConfig
from grpo.flags.elsewhere import ELSEWHERE
from grpo.flags.parser import flag, own_flags, parse_config
from grpo.run.exits import StopSignal
from grpo.run.folder import check_output
from models.decoding.draw import Sampling
from tests.runs import ROOT

GDPO = ["--multi_objective_aggregation", "normalize_then_sum"]
NEEDED = ["--dataset_name", "d", "--model_name_or_path", "m"]


def parse(*argv, demo=None):
    return parse_config(TrainingConfig, [*argv], demo)


def test_flags_override_yaml_which_overrides_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model_name_or_path: ${here}/model\ndataset_name: d\nlearning_rate: 1e-5\n"
        "beta: 0\nbf16: false\nmax_steps: 7\nreward_weights: [1, 0.5]\n"
    )
    config, path = parse("--config", str(file), "--beta", "0.1", "--max_steps", "9")
    assert path == file
    assert config.model_name_or_path == str(tmp_path / "model")
    assert (config.learning_rate, config.beta, config.max_steps) == (1e-5, 0.1, 9)
    assert config.bf16 is False and config.reward_weights == [1.0, 0.5]
    assert config.epsilon == TrainingConfig.epsilon


def test_the_demo_is_taken_only_where_nothing_else_is_named(tmp_path):
    demo = tmp_path / "demo.yaml"
    demo.write_text("model_name_or_path: a\ndataset_name: b\nseed: 3\n")
    config, path = parse("--max_steps", "5", demo=demo)
    assert path == demo and (config.seed, config.max_steps) == (3, 5)
    config, path = parse(*NEEDED, demo=demo)
    assert path is None and config.seed == TrainingConfig.seed
    with pytest.raises(ValueError, match="--dataset_name is needed"):
        parse("--model_name_or_path", "m", demo=demo)


def test_a_resumed_run_takes_its_own_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("model_name_or_path: a\ndataset_name: b\nseed: 3\n")
    config, path = parse("--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto")
    assert path == tmp_path / "config.yaml" and config.seed == 3


def test_auto_starts_the_demo_where_no_run_is_to_be_resumed(tmp_path):
    demo = tmp_path / "demo.yaml"
    demo.write_text("model_name_or_path: a\ndataset_name: b\nseed: 3\n")
    auto = ["--resume_from_checkpoint", "auto", "--output_dir", str(tmp_path / "run")]
    config, path = parse(*auto, demo=demo)
    assert path == demo and config.seed == 3
    wanted = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match="no .*config.yaml, so no run to continue"):
        parse("--resume_from_checkpoint", wanted, demo=demo)


def test_where_a_resumed_run_is(tmp_path):
    """`auto` is looked for in a run folder; a checkpoint's own is its parent."""
    for flags in ([], NEEDED):
        with pytest.raises(ValueError, match="auto needs --output_dir"):
            parse(*flags, "--resume_from_checkpoint", "auto")
    config, _ = parse(*NEEDED, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert config.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16", "False"], False),
        ([], None),
    ],
)
def test_booleans(argv, expected):
    assert parse(*NEEDED, *argv)[0].bf16 is expected


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--betta", "1"], "unknown flag --betta: did you mean --beta"),
        (["--per_device_train_batch_size", "8"], "--prompts_per_step"),
        (["--generation_batch_size", "64"], "it is generation_batch_size / num_generations"),
        (
            ["--steps_per_generation", "8"],
            "use --num_minibatches, .* it is steps_per_generation / gradient_accumulation_steps",
        ),
        (["--ppo_mini_batch_size", "64"], "use --num_minibatches, the rollout's prompts over"),
        (["--deepspeed", "x.json"], "torchrun"),
        (["--vllm_mode", "colocate"], "unknown flag --vllm_mode: there is no inference server"),
        (["--warmup_steps", "10"], "use --warmup_ratio"),
        (["stray"], "unknown flag stray"),
        (["--max_steps", "many"], "max_steps"),
        (["--bf16", "perhaps"], "neither true nor false"),
        (["--loss_type", "ppo"], "--loss_type 'ppo' is none of grpo, dapo, dr_grpo, cispo, sapo"),
        (["--loss_type", "bnpo"], "dapo divides by those of the whole update"),
        (["--loss_type", "vespo"], "docs/change-the-loss.md says how"),
        (
            ["--loss_type", "cispo"],
            "cispo needs --epsilon_high above 1: here it is the largest ratio",
        ),
        (["--loss_type", "cispo", "--epsilon_high", "0.28"], "the largest ratio itself .* 0.28"),
        (["--delta", "1.1"], "--delta 1.1 is not above 1 . --epsilon_high, 1.2"),
        (["--advantage_estimator", "rloo"], "rloo needs --scale_rewards none, not group"),
        (["--entropy_coef_max", "1"], "--entropy_coef stays as it is"),
        (
            [*GDPO, "--overlong_buffer", "9"],
            "normalize_then_sum does not go with --overlong_buffer: the penalty is added to the",
        ),
        (
            ["--top_entropy_quantile", "0.2", "--importance_sampling_level", "sequence"],
            "needs --importance_sampling_level token or sequence_token, not sequence",
        ),
        (
            [*GDPO, "--scale_rewards", "none"],
            "normalize_then_sum needs --scale_rewards group, not none",
        ),
        (
            [*GDPO, "--advantage_estimator", "rloo", "--scale_rewards", "none"],
            "normalize_then_sum needs --advantage_estimator grpo, not rloo: leave-one-out compares",
        ),
        (["--load_in_4bit"], "--load_in_4bit needs --use_peft: weights in 4 bits stay as they"),
        (["--adapter_name_or_path", "a"], "--adapter_name_or_path a needs --use_peft: without it"),
        (
            ["--use_peft", "--adapter_name_or_path", "a", "--lora_target_modules", "q_proj", "x"],
            "--lora_target_modules q_proj x does not go with --adapter_name_or_path: an adapter",
        ),
        (
            ["--use_peft", "--optim", "adamw_8bit"],
            "--optim adamw_8bit does not go with --use_peft: adapters are few, so",
        ),
        (["--use_peft", "--cpu_offload"], "--cpu_offload does not go with --use_peft: adapters"),
        (
            ["--eval_only", "--resume_from_checkpoint", "checkpoint-3"],
            "--resume_from_checkpoint checkpoint-3 does not go with --eval_only: an evaluation",
        ),
        (["--gpu_memory", "24"], "--gpu_memory 24 needs --dry_run: it plans for a GPU that is not"),
        (["--num_generations", "1"], "at least 2"),
        (["--temperature", "0"], "at least 1e-06"),
        (["--top_p", "1.5"], "at most 1"),
        (["--min_p", "-0.1"], "--min_p is -0.1; it must be at least 0 and at most 1"),
        (["--stop", ""], "--stop is an empty text"),
        (["--stop", "x" * 10_000], "--stop: 10,000 bytes of UTF-8 in all; at most 250"),
        (["--stop", "-x"], "unknown flag -x: .* one is written --flag=-value"),
        (["--stop_strings", "</answer>"], "unknown flag --stop_strings: use --stop"),
        (["--max_steps", "0"], "at least 1"),
        (["--beta", "-1"], "at least 0"),
        (["--learning_rate", "nan"], "must be finite"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_mistakes_are_one_message(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*NEEDED, *argv)


@pytest.mark.parametrize(
    "text, message",
    [
        ("betta: 1", "unknown key betta: did you mean beta"),
        ("beta: [1]", "beta is"),
        ("beta: much", "beta is 'much', not float"),
        ("max_steps: 1.5", "max_steps is 1.5, not int"),
        ("bf16: 1", "bf16 is 1, not bool"),
        ("max_steps: true", "max_steps is True, not int"),
        ("temperature:", "temperature is None, not float"),
        ("max_steps: .inf", "max_steps is inf, not int"),
        ("learning_rate: .nan", "learning_rate is nan; it must be finite"),
        ("reward_weights: '12'", "reward_weights is '12', not a list of float"),
        ("reward_weights: [1, .nan]", "reward_weights is nan"),
        ("- beta", "no `flag: value` lines"),
        ("beta: {", "not a readable YAML"),
        ("loss_type: ppo", "none of grpo, dapo, dr_grpo"),
        ("stop: yes", "stop is True, not a list of str"),
        ("stop: ['']", "--stop is an empty text"),
        ("? [stop]\n: 3", "not a readable YAML"),
    ],
)
def test_mistakes_in_yaml_are_one_message(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        parse(*NEEDED, "--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "words, listed",
    [
        (["--stop", "</answer>"], "[</answer>]"),
        (["--stop", "a, b", "'c'", "[d]", " "], "['a, b', '''c''', '[d]', ' ']"),
        (["--stop=-x", "y", "--stop=--end", "--stop", "---"], "[-x, y, --end, '---']"),
        (["--stop=a=b", "007", "1e-5"], "[a=b, 007, 1e-5]"),
        (["--stop", "007"], "007"),  # YAML has it as 7
        (["--stop", "0x10", "1_0", "1.50", "2020-01-01"], "[0x10, 1_0, 1.50, 2020-01-01]"),
        (["--stop", "\n\n"], '"\\n\\n"'),
        ([], ""),
    ],
)
def test_texts_are_taken_as_they_are_typed(tmp_path, words, listed):
    """On the command line and in YAML. Other lists are split at commas, and lose their quotes."""
    expected = [word.removeprefix("--stop=") for word in words if word != "--stop"] or None
    assert parse(*NEEDED, *words)[0].stop == expected
    (tmp_path / "a.yaml").write_text(f"stop: {listed}\n")
    assert parse(*NEEDED, "--config", str(tmp_path / "a.yaml"))[0].stop == expected


def test_every_flag_is_read_somewhere():
    """No flag is accepted and ignored: each is used outside of its definition."""
    files = [*ROOT.glob("train_*.py"), *ROOT.glob("grpo/**/*.py"), ROOT / "data" / "check.py"]
    defined = ROOT / "grpo" / "flags"
    code = "".join(path.read_text() for path in files if defined not in path.parents)
    sampling = inspect.getsource(Sampling.of)  # by name
    flags = asdict(TrainingConfig()).keys()
    used = {name for name in flags if f"config.{name}" in code or f'"{name}"' in sampling}
    assert used == flags
    assert not ELSEWHERE.keys() & used


def values_outside(facts: dict) -> list[float]:
    """A value just beyond each bound of a flag."""
    return [
        *([facts["least"] - 1] if facts["least"] is not None else []),
        *([facts["above"]] if facts["above"] is not None else []),
        *([facts["most"] + 1] if facts["most"] is not None else []),
        *([facts["below"]] if facts["below"] is not None else []),
    ]


BOUNDED = {f.name: values_outside(f.metadata) for f in fields(TrainingConfig)}
BOUNDED = {name: values for name, values in BOUNDED.items() if values}


def test_numbers_have_bounds():
    """Those without: a seed is any number, a reward may count against, entropy may be lowered."""
    numbers = {f.name for f in fields(TrainingConfig) if re.search("int|float", str(f.type))}
    assert numbers - BOUNDED.keys() == {
        "seed",
        "reward_weights",
        "entropy_coef",
    }


@pytest.mark.parametrize("name", BOUNDED)
def test_a_value_beyond_a_bound_is_named(name):
    for value in BOUNDED[name]:
        with pytest.raises(ValueError, match=rf"^--{name} is {value}(\.0)?; it must be "):
            parse(*NEEDED, f"--{name}={value}")


ONE_UPDATE = (
    "with one update a step every ratio is 1; --num_iterations and --num_minibatches make more"
)
SAPO = ["--loss_type", "sapo", "--num_iterations", "2"]
CISPO = ["--loss_type", "cispo", "--epsilon_high", "5"]


@pytest.mark.parametrize(
    "argv, world, sentences",
    [
        (["--epsilon_high", "0.28"], 1, [f"--epsilon_high has no effect: {ONE_UPDATE}"]),
        (["--delta", "4"], 1, [f"--delta has no effect: {ONE_UPDATE}"]),
        (
            ["--importance_sampling_level", "sequence"],
            1,
            [f"--importance_sampling_level has no effect: {ONE_UPDATE}"],
        ),
        (
            ["--loss_type", "sapo"],
            1,
            [f"--loss_type sapo: the gradient is grpo's, as {ONE_UPDATE}"],
        ),
        (CISPO, 1, [f"--loss_type cispo: the gradient is dapo's, as {ONE_UPDATE}"]),
        ([*CISPO, "--num_iterations", "2"], 1, []),
        ([*CISPO, "--num_minibatches", "2"], 1, []),
        (
            ["--use_bias_correction_kl", "--beta", "0"],
            1,
            ["--use_bias_correction_kl has no effect: --beta 0 has no KL term"],
        ),
        (["--num_iterations", "2", "--epsilon", "0.1", "--epsilon_high", "0.3"], 1, []),
        (
            [*SAPO, "--epsilon", "0.1", "--epsilon_high", "0.28", "--delta", "4"],
            1,
            [
                "--epsilon has no effect: it is for --loss_type grpo, dapo or dr_grpo",
                "--delta has no effect: it is for --loss_type grpo, dapo or dr_grpo",
                "--epsilon_high has no effect: --loss_type sapo has a soft gate in its place",
            ],
        ),
        (
            [*CISPO, "--num_iterations", "2", "--delta", "4"],
            1,
            ["--delta has no effect: it is for --loss_type grpo, dapo or dr_grpo"],
        ),
        (
            ["--num_iterations", "2", "--sapo_temperature_neg", "2"],
            1,
            ["--sapo_temperature_neg has no effect: it is for --loss_type sapo"],
        ),
        (["--kl_alarm", "1", "--beta", "0"], 1, ["--kl_alarm has no effect: --beta 0 has no KL"]),
        (
            ["--kl_estimator", "k1", "--beta", "0"],
            1,
            ["--kl_estimator has no effect: --beta 0 has"],
        ),
        (
            ["--num_train_epochs", "2", "--max_steps", "9"],
            1,
            ["--num_train_epochs has no effect: --max_steps 9 decides"],
        ),
        (
            ["--max_sampling_rounds", "3"],
            2,
            ["--max_sampling_rounds has no effect: it is for --dy"],
        ),
        (["--run_name", "x"], 2, ["--run_name has no effect: it names the run for --report_to"]),
        (["--timeout", "9"], 1, ["--timeout has no effect: with one rank there is no other"]),
        (
            ["--shard_size", "1"],
            1,
            ["--shard_size has no effect: with one rank nothing is sharded"],
        ),
        (
            ["--reshard_after_forward", "false"],
            1,
            ["--reshard_after_forward has no effect: with one rank nothing is sharded"],
        ),
        (
            ["--use_peft", "--shard_size", "2", "--freeze_vision"],
            2,
            [
                "--freeze_vision has no effect: with --use_peft the vision tower is frozen anyway",
                "--shard_size has no effect: with --use_peft every rank holds all weights",
            ],
        ),
        (
            ["--lora_r", "8", "--lora_target_modules", "q_proj", "--use_rslora"],
            1,
            [
                "--lora_r has no effect: it is for --use_peft, without which all weights are",
                "--lora_target_modules has no effect: it is for --use_peft",
                "--use_rslora has no effect: it is for --use_peft",
            ],
        ),
        (
            ["--vision_learning_rate", "1e-6", "--freeze_vision"],
            1,
            ["--vision_learning_rate has no effect: the vision tower is frozen, by --f"],
        ),
        (
            ["--vision_learning_rate", "1e-6", "--use_peft"],
            1,
            ["--vision_learning_rate has no effect: the vision tower is frozen, by --freeze_v"],
        ),
        (
            [
                *("--vision_learning_rate", "1e-6", "--use_peft"),
                *("--lora_target_modules", "q_proj", "visual.qkv"),
            ],
            1,
            [],
        ),
        (["--vision_learning_rate", "1e-6"], 1, []),
        # at their defaults
        (["--epsilon", "0.2", "--timeout", "1800", "--lora_r", "16"], 1, []),
    ],
)
def test_a_flag_without_effect_is_said(tmp_path, argv, world, sentences):
    """Typed or in --config; a resumed run's own config.yaml may come from more ranks."""
    typed = parse(*NEEDED, *argv)[0]
    said = without_effect(typed, world)
    assert len(said) == len(sentences)
    for sentence, begin in zip(said, sentences, strict=True):
        assert sentence.startswith(begin)
    names = [word[2:] for word in argv if word.startswith("--")]
    values = {name: getattr(typed, name) for name in names}
    settings = {"model_name_or_path": "m", "dataset_name": "d", **values}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = parse("--config", str(tmp_path / "config.yaml"))[0]
    assert without_effect(config, world) == said
    own = parse("--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto")[0]
    assert {name: getattr(own, name) for name in names} == values
    assert without_effect(own, world) == []


def test_flags_that_have_an_effect_are_not_mentioned():
    argv = ["--timeout", "9", "--shard_size", "1", "--cpu_offload", "--report_to", "tensorboard"]
    argv += ["--run_name", "x", "--dynamic_sampling", "--max_sampling_rounds", "3"]
    argv += ["--num_iterations", "2", "--epsilon_high", "0.28", "--delta", "4", "--freeze_vision"]
    assert without_effect(parse(*NEEDED, *argv)[0], 2) == []
    argv = ["--use_peft", "--lora_r", "8", "--load_in_4bit"]
    assert without_effect(parse(*NEEDED, *argv)[0], 1) == []


def test_no_default_contradicts_another():
    names = {f.name for f in fields(TrainingConfig)}
    assert all({row.flag, row.other} <= names for row in CONTRADICTIONS)
    parse(*NEEDED)


@dataclass
class Counting(TrainingConfig):
    """A third script's flags."""

    most: int = flag(9, "the largest number that is asked for", least=1)


def test_a_third_script_has_flags_of_its_own_and_grpo_flags_knows_none(tmp_path):
    config, _ = parse_config(Counting, [*NEEDED, "--most", "5", "--epsilon_high", "0.28"])
    assert own_flags(config) == {"most"} and config.most == 5
    assert without_effect(config, 1) == [f"--epsilon_high has no effect: {ONE_UPDATE}"]
    with pytest.raises(ValueError, match="unknown flag --mst: did you mean --most"):
        parse_config(Counting, [*NEEDED, "--mst", "5"])
    sources = [*(ROOT / "grpo" / "flags").glob("*.py"), *(ROOT / "rewards").glob("*.py")]
    for path in sources:
        assert not re.search(r"train_(cls|det)\b", path.read_text()), path.name


@pytest.mark.parametrize(
    "names, message",
    [
        ("none wandb", "none wandb: name each once, or none alone"),
        ("tensorboard none", "none alone"),
        ("wandb wandb", "each once"),
        ("mlflow", "--report_to 'mlflow' is none of none, "),
    ],
)
def test_names_of_trackers_that_do_not_go_together(names, message):
    with pytest.raises(ValueError, match=message):
        parse(*NEEDED, "--report_to", *names.split())


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    assert parse(*NEEDED)[0].trackers == parse(*NEEDED, "--report_to", "none")[0].trackers == []
    config, _ = parse(*NEEDED, "--report_to", "tensorboard", "trackio")
    assert config.trackers == ["tensorboard", "trackio"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else 1)
    with pytest.raises(ValueError, match="--report_to trackio: pip install trackio"):
        check_output(tmp_path / "run", False, config.report_to)


@pytest.mark.slow
def test_help_names_every_flag_and_default():
    out = subprocess.run(
        [sys.executable, ROOT / "train_cls.py", "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0
    text = " ".join(out.stdout.split())
    for name, value in asdict(TrainingConfig()).items():
        assert f"--{name} " in text
        value = " ".join(value) if isinstance(value, tuple) else value
        if value is not None:
            assert f"(default: {value})" in text


RUN = """
from grpo.run.exits import run_and_exit
def main(argv):
    {body}
run_and_exit(main)
"""

ENDINGS = [
    ("return 0", 0, "", False),
    ("return 130", 130, "", False),
    ("import json; json.loads('{')", 1, "JSONDecodeError", True),
    ("from data.errors import UserError; raise UserError('no such flag')", 2, "error: no", False),
    ("from grpo.loss import per_token_kl; per_token_kl(0, 0, 'k4')", 1, "ValueError", True),
    ("raise ValueError('what?')", 1, "ValueError", True),
    ("1 / 0", 1, "ZeroDivisionError", True),
    ("from grpo.run.metrics import rollout_metrics as m; m([['ab']])", 1, "Error", True),
    ("raise FloatingPointError('the norm is nan')", 3, "stopped: the norm is nan", False),
]


@pytest.mark.parametrize("body, code, shown, is_bug", ENDINGS)
def test_user_errors_are_told_from_bugs(body, code, shown, is_bug, capsys):
    """A UserError is a message; everything else leaves as it is, whoever raised it."""
    with pytest.raises(BaseException) as caught:  # noqa: B017, PT011
        exec(RUN.format(body=body), {})
    if is_bug:
        assert shown in caught.type.__name__
    else:
        assert caught.type is SystemExit and caught.value.code == code
        assert shown in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("body, code, shown, is_bug", ENDINGS[2:4])
def test_what_a_shell_sees_of_a_bug_and_of_a_user_error(body, code, shown, is_bug):
    command = [sys.executable, "-c", RUN.format(body=body)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == code
    assert shown in out.stderr and ("Traceback" in out.stderr) == is_bug


def test_two_signals_at_once_are_one_and_a_later_one_leaves():
    previous = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        stop = StopSignal()
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.asked
    finally:
        signal.signal(signal.SIGINT, previous[0])
        signal.signal(signal.SIGTERM, previous[1])
    code = (
        "import os, signal, time\nfrom grpo.run.exits import StopSignal\nstop = StopSignal()\n"
        "os.kill(os.getpid(), signal.SIGINT)\nstop.asked_at -= 3\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nprint('still here')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 130 and out.stdout == ""
