"""A run from its flags to its files: folder, resuming, trackers."""

import importlib.machinery
import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train_cls
from data.flowers import rows
from grpo.flags.config import TrainingConfig
from grpo.run.checkpoint import State
from grpo.run.resume import read_state
from grpo.run.trackers import verbatim
from rewards.cls import accuracy_reward
from tests.runs import (
    CHECKPOINT,
    ROOT,
    SHORT,
    logits_here_and_in_transformers,
    read_lines,
    read_steps,
    timeless,
    torchrun,
    train,
)


@pytest.mark.slow
def test_the_run_folder(tmp_path):
    run = tmp_path / "run"
    lines = train(run, *SHORT, "--save_steps", "1", "--eval_steps", "1", "--save_total_limit", "1")
    assert [line["step"] for line in lines] == [0, 1, 2]
    raw = read_lines(run / "metrics.jsonl")
    assert [(line["step"], "eval/accuracy" in line, "loss" in line) for line in raw] == [
        (0, True, False),
        (1, False, True),
        (1, True, False),
        (2, False, True),
        (2, True, False),
    ]
    assert {p.name for p in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "completions.jsonl",
        "run.json",
        "eval-0.jsonl",
        "eval-1.jsonl",
        "eval-2.jsonl",
        "checkpoint-2",
        "final",
    }
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in lines[1] | lines[2]:
        assert f"`{name}`" in documented or "/" in name and _family(name) in documented, name
    assert lines[2]["sampling/logp_difference_max"] < 1e-4
    assert "eval/accuracy" in lines[1]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["max_steps"] == 2 and saved["learning_rate"] == 2e-4

    completions = read_lines(run / "completions.jsonl")
    assert len(completions) == 2 * 2 * 4
    for step in (1, 2):
        for prompt in (0, 1):
            group = [c for c in completions if (c["step"], c["prompt"]) == (step, prompt)]
            assert [c["sample"] for c in group] == [0, 1, 2, 3]
            assert len({(c["row"], c["truth"]) for c in group}) == 1
            assert abs(sum(c["advantage"] for c in group)) < 1e-6
            for c in group:
                assert c["reward"] == c["rewards"]["accuracy"] + c["rewards"]["format"]
                assert c["rewards"]["accuracy"] == accuracy_reward(c["completion"], c["truth"])
    mean = sum(c["reward"] for c in completions[:8]) / 8
    assert lines[1]["reward"] == pytest.approx(mean)


def _family(name: str) -> str:
    """`rewards/<term>/mean` for rewards/accuracy/mean, `time/<phase>_s` for time/rollout_s."""
    kind, rest = name.split("/", 1)
    return {
        "rewards": f"`rewards/<term>/{rest.split('/')[-1]}`",
        "time": "`time/<phase>_s`",
        "memory": "`memory/<phase>_gb`",
        "eval": "`eval/<term>`",
        "parse_failures": "`parse_failures/<reason>`",
    }.get(kind, name)


@pytest.mark.slow
def test_final_is_a_checkpoint_for_transformers(tmp_path):
    train(tmp_path / "run", *SHORT)
    row = rows("test", 1)[0]
    for folder in (tmp_path / "run" / "final", CHECKPOINT):
        ours, theirs = logits_here_and_in_transformers(folder, row["image"], row["problem"])
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    start = load_file(CHECKPOINT / "model.safetensors")
    assert trained.keys() == start.keys()
    moved = [name for name in start if not torch.equal(trained[name], start[name].float())]
    assert len(moved) == len(start), "every weight is trained"


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    options = [*SHORT, "--max_steps", "4", "--save_steps", "2", "--num_iterations", "2"]
    whole = train(tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    shutil.rmtree(tmp_path / "cut" / "final")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a kill in mid-line
    resumed = train(tmp_path / "cut", "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(whole)
    one, two = (read_lines(tmp_path / n / "completions.jsonl") for n in ("whole", "cut"))
    assert one == two
    one, two = (load_file(tmp_path / n / "final/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_from_before_a_flag_existed_is_resumed_at_its_default(tmp_path):
    config = TrainingConfig(max_steps=4)
    saved = asdict(State(step=2, steps=4, config=asdict(config)))
    del saved["config"]["min_p"], saved["config"]["stop"]
    folder = tmp_path / "checkpoint-2"
    assert read_state(folder, saved, config, 4, {}).step == 2
    with pytest.raises(ValueError, match="--min_p: 0.0 then, 0.1 now"):
        read_state(folder, saved, replace(config, min_p=0.1), 4, {})


@pytest.mark.slow
def test_resuming_refuses_another_run(tmp_path):
    run = tmp_path / "run"
    train(run, *SHORT, "--save_steps", "2")
    with pytest.raises(ValueError, match="already holds a run"):
        train(run, *SHORT)
    again = ["--resume_from_checkpoint", "auto"]
    with pytest.raises(ValueError, match=r"--seed: 0 then, 1 now\n  --beta: 0.04 then, 0.1 now"):
        train(run, *again, "--beta", "0.1", "--seed", "1")
    with pytest.raises(ValueError, match=r"no state\.json"):
        train(run, "--resume_from_checkpoint", str(CHECKPOINT))
    wanted = str(tmp_path / "other" / "checkpoint-1")
    with pytest.raises(ValueError, match="no run to continue"):
        train(tmp_path / "other", *SHORT, "--resume_from_checkpoint", wanted)
    started = train(tmp_path / "other", *SHORT, *again)  # nothing to resume: it starts
    assert [line["step"] for line in started] == [0, 1, 2]
    assert len(train(run, *again, "--max_steps", "3")) == 4  # a longer run is no other run


@pytest.mark.slow
def test_going_on_from_an_earlier_checkpoint_leaves_the_later_branch(tmp_path):
    run = tmp_path / "run"
    train(run, *SHORT, "--max_steps", "3", "--save_steps", "1")
    first = ["--resume_from_checkpoint", str(run / "checkpoint-1"), "--save_total_limit", "1"]
    train(run, *first)
    names = {path.name[:20] for path in run.iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-3", "abandoned-checkpoint"}
    lines = train(run, "--resume_from_checkpoint", "auto", "--max_steps", "4")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_keeps_the_run_so_far(tmp_path, monkeypatch):
    run, judge, calls = tmp_path / "run", train_cls.judge, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 3:  # in the second step, after the evaluation and the first
            os.kill(os.getpid(), signal.SIGINT)
        return judge(*args)

    monkeypatch.setattr(train_cls, "judge", interrupting)
    argv = ["--output_dir", str(run), *SHORT, "--max_steps", "3"]
    assert train_cls.main(argv) == 130
    assert (run / "checkpoint-1").is_dir() and not (run / "final").exists()
    assert [line["step"] for line in read_steps(run)] == [0, 1]
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(train(tmp_path / "whole", *argv[2:]))


def test_wandb_is_told_every_reported_step(tmp_path, monkeypatch):
    """With a stand-in for the package, which needs a server or an account."""
    told = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: told.append((step, metrics)),
        finish=lambda: told.append("end"),
        id="r1",
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def init(name, dir, config, id, resume):
        told.append((name, dir, config["seed"], id))
        return run

    fake.init, fake.Image = init, lambda image: ("image", image.size)
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = ["--run_name", "poppy", "--logging_steps", "1"]
    train(tmp_path / "run", *SHORT, "--report_to", "wandb", *options)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert told[0] == ("poppy", str(tmp_path / "run"), 0, None) and told[-1] == "end"
    (samples,) = [metrics for _, metrics in told[1:-1] if "completions" in metrics]
    columns, table = samples["completions"]
    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    group = [c for c in completions if (c["step"], c["prompt"]) == (2, 0)]
    assert columns == ["image", "problem", "truth", "completion", "accuracy", "format", "reward",
                       "advantage"]  # fmt: skip
    assert [row[0] for row in table] == [("image", (84, 84))] * 4
    assert [row[2:] for row in table] == [
        [c["truth"], c["completion"], *c["rewards"].values(), c["reward"], c["advantage"]]
        for c in group
    ]
    logged = [one for one in told[1:-1] if one[1] is not samples]
    assert [step for step, _ in logged] == [0, 1, 2, 2]  # an evaluation has a line of its own
    for (_, metrics), line in zip(logged, lines, strict=True):
        assert metrics == {name: value for name, value in line.items() if name != "step"}
    del told[:]
    shutil.rmtree(tmp_path / "run" / "final")
    train(tmp_path / "run", "--resume_from_checkpoint", "auto", "--max_steps", "3")
    assert told[0][3] == "r1"  # goes on in the same run


def test_several_trackers_at_once(tmp_path, monkeypatch):
    """TensorBoard itself, and a stand-in for Trackio, which keeps its records elsewhere."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: told.append((step, metrics)), finish=lambda: told.append("end")
    )
    fake = types.ModuleType("trackio")
    fake.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    fake.init = lambda project, **rest: told.append((project, rest)) or run
    fake.Image, fake.Table = lambda image: image.size, lambda columns, data: data
    monkeypatch.setitem(sys.modules, "trackio", fake)
    folder = tmp_path / "run"
    options = ["--report_steps", "1", "--logging_steps", "1", "--save_steps", "2"]
    lines = train(folder, *SHORT, "--report_to", "tensorboard", "trackio", *options)
    assert told[0][0] == "grpo-vlm" and told[0][1]["resume"] == "never" and told[-1] == "end"
    logged = [(step, metrics["reward"]) for step, metrics in told[1:-1] if "reward" in metrics]
    assert logged == [(line["step"], line["reward"]) for line in lines[1:]]
    tables = [metrics["completions"] for _, metrics in told[1:-1] if "completions" in metrics]
    said = [line["completion"] for line in read_lines(folder / "completions.jsonl")[:4]]
    assert len(tables) == 2 and [row[3] for row in tables[0]] == [f"    {text}" for text in said]

    events = EventAccumulator(str(next((folder / "tensorboard").iterdir()))).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(line["step"], pytest.approx(line["reward"])) for line in lines[1:]]
    (text, _) = events.Tensors("completions/text_summary")
    assert said[0] in text.tensor_proto.string_val[0].decode() and text.step == 1
    assert len(events.Images("completions/image")) == 2

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["report_to"] == ["tensorboard", "trackio"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"report_to": "none"}))  # as before
    del told[:]
    assert len(train(folder, "--resume_from_checkpoint", "auto", "--max_steps", "3")) == 4
    assert told == []


def test_what_a_model_wrote_stays_text_in_markdown():
    text = "a\n# b\n<script>\x00</script>\ud800"
    assert verbatim(text) == "    a\n    # b\n    <script>\\x00</script>\\ud800"


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert train_cls.main(["--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("1.4 M parameters", "480 rows", "180 held out", "100 (1.67 epochs)", "GB a rank"):
        assert word in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_and_user_errors(tmp_path):
    out = torchrun(1, "train_cls.py", "--output_dir", str(tmp_path / "run"), *SHORT, "--beta", "-1")
    assert out.returncode != 0 and "exitcode: 2" in " ".join(out.stderr.split())
    assert "error: --beta is -1.0; it must be at least 0" in out.stderr
    out = subprocess.run(
        [sys.executable, "train_cls.py", "--betta"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 2 and "did you mean --beta?" in out.stderr
