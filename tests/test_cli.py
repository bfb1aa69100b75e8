"""Flags, YAML and how a run ends."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo.cli import ELSEWHERE, StopSignal, TrainingConfig, parse_config

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]
ROOT = Path(__file__).resolve().parent.parent


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
        (["--kl_alarm", "1", "--beta", "0"], "--kl_alarm is about the reference"),
        (["--betta", "1"], "unknown flag --betta: did you mean --beta"),
        (["--max-steps=5"], "write --max_steps"),
        (["--per_device_train_batch_size", "8"], "--prompts_per_step"),
        (["--deepspeed", "x.json"], "torchrun"),
        (["stray"], "unknown flag stray"),
        (["--max_steps", "many"], "max_steps"),
        (["--bf16", "perhaps"], "neither true nor false"),
        (["--loss_type", "ppo"], "loss_type"),
        (["--num_generations", "1"], "at least 2"),
        (["--temperature", "0"], "above 0"),
        (["--top_p", "1.5"], "at most 1"),
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
    ],
)
def test_mistakes_in_yaml_are_one_message(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        parse(*NEEDED, "--config", str(tmp_path / "a.yaml"))


def test_every_flag_is_read_somewhere():
    """No flag is accepted and ignored: each is used as an attribute outside of its definition."""
    code = "".join(path.read_text() for path in [*ROOT.glob("train_*.py"), *ROOT.glob("grpo/*.py")])
    used = {name for name in asdict(TrainingConfig()) if f"config.{name}" in code}
    assert used == asdict(TrainingConfig()).keys()
    assert not ELSEWHERE.keys() & used


def test_help_names_every_flag_and_default():
    out = subprocess.run(
        [sys.executable, ROOT / "train_cls.py", "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0
    text = " ".join(out.stdout.split())
    for name, value in asdict(TrainingConfig()).items():
        assert f"--{name} " in text
        if value is not None:
            assert f"(default: {value})" in text


RUN = """
from grpo.cli import run
def main(argv):
    {body}
run(main)
"""


@pytest.mark.parametrize(
    "body, code, shown, traceback",
    [
        ("return 0", 0, "", False),
        ("return 130", 130, "", False),
        ("import json; json.loads('{')", 1, "JSONDecodeError", True),
        ("from grpo.loss import per_token_kl; per_token_kl(0, 0, 'k4')", 2, "error: ", False),
        ("1 / 0", 1, "ZeroDivisionError", True),
        ("from grpo.log import rollout_metrics; rollout_metrics([['ab']])", 1, "Error", True),
        ("raise FloatingPointError('the norm is nan')", 3, "stopped: the norm is nan", False),
    ],
)
def test_user_errors_are_told_from_bugs(body, code, shown, traceback):
    """A ValueError raised by the project's code is the user's; one from a library is a bug."""
    out = subprocess.run(
        [sys.executable, "-c", RUN.format(body=body)], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == code
    assert shown in out.stderr and ("Traceback" in out.stderr) == traceback


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
        "import os, signal, time\nfrom grpo.cli import StopSignal\nstop = StopSignal()\n"
        "os.kill(os.getpid(), signal.SIGINT)\nstop.asked_at -= 3\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nprint('still here')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 130 and out.stdout == ""
