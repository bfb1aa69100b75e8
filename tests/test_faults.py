"""What a long run meets: each fault is injected, and ends in one message with nothing lost.

docs/reliability.md lists them; faults of ranks are in tests/test_ranks.py, of saving in
tests/test_dist.py.
"""

import fcntl
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_cls
from benchmarks.soak import soak
from grpo import cli, dist
from grpo.cli import StopSignal
from grpo.preflight import check_gradients
from models.qwen_vl import QwenVL
from tests.test_scripts import (  # noqa: F401
    CHECKPOINT,
    SHORT,
    one_cache,
    read_lines,
    same_signal_handlers,
    timeless,
    train,
)
from tests.tiny import tiny_config, tiny_model, tiny_prompt

LONGER = [*SHORT, "--max_steps", "3"]
EVALUATED = 6  # held-out rows of SHORT, judged before the first step


def raises(*_):
    raise KeyError("no such class")


REWARDS = {
    "raises": (raises, "KeyError: 'no such class' (test_faults.py, line"),
    "None": (lambda *_: None, "score() returned None, not a dict of rewards"),
    "a list": (lambda *_: [1.0, 1.0], "score() returned [1.0, 1.0], not a dict"),
    "one too few": (lambda *_: {"accuracy": 1.0}, "score() returned ['accuracy'], where 2"),
    "NaN": (lambda *_: {"accuracy": float("nan"), "format": 1}, "'accuracy' is nan, not a finite"),
    "a tensor": (lambda *_: {"accuracy": torch.ones(1), "format": 1}, "'accuracy' is tensor(["),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_fails_is_named_and_the_run_is_kept(tmp_path, monkeypatch, capsys, name):
    """In step 2: the message names the completion; the run goes on once the reward is mended."""
    run, score, calls = tmp_path / "run", train_cls.score, []
    broken, said = REWARDS[name]
    before = 480 + 180 + 1 + EVALUATED + 8  # solutions, the terms' names, evaluation, step 1

    def failing(*arguments):
        calls.append(1)
        return (broken if len(calls) == before + 3 else score)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_cls, "score", failing)
        assert train_cls.main(["--output_dir", str(run), *LONGER]) == 2
    out = capsys.readouterr().out
    assert said in out and re.search(r"for row \d+ and the completion:\n.*<think>", out)
    assert "ended after step 1 of 3; continue with" in out
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(train(tmp_path / "whole", *LONGER))


def nan_loss(in_steps: set[int], monkeypatch) -> None:
    """From here on the loss of these steps is not a number, with its gradient."""
    true_loss, make_packs, step = train_cls.policy_loss, train_cls.make_packs, [0]

    def counting(*arguments):
        step[0] += 1
        return make_packs(*arguments)

    def broken(*arguments):
        loss, stats = true_loss(*arguments)
        return (loss * float("nan") if step[0] in in_steps else loss), stats

    monkeypatch.setattr(train_cls, "make_packs", counting)
    monkeypatch.setattr(train_cls, "policy_loss", broken)


def test_a_step_that_is_not_finite_is_skipped_and_written_out(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    nan_loss({2}, monkeypatch)
    lines = train(run, *LONGER, "--save_steps", "1", "--num_iterations", "2")
    assert [line.get("skipped_steps") for line in lines] == [None, 0, 1, 1]
    assert lines[2]["grad_norm"] is None and lines[2]["loss"] is None
    assert lines[3]["grad_norm"] > 0
    one, two, three = (
        load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(two[name], three[name]) for name in one)
    written = read_lines(run / "bad-step-2.jsonl")
    sampled = [c for c in read_lines(run / "completions.jsonl") if c["step"] == 2]
    assert [w["completion"] for w in written] == [c["completion"] for c in sampled]
    assert all(w["problem"] for w in written)
    assert "step 2 was skipped" in capsys.readouterr().out


def test_too_many_bad_steps_end_the_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    nan_loss({2, 3, 4}, monkeypatch)
    argv = ["--output_dir", str(run), *SHORT, "--max_steps", "5", "--max_bad_steps", "2"]
    assert train_cls.main(argv) == 3
    assert "2 steps in a row were skipped" in capsys.readouterr().out
    assert json.loads((run / "checkpoint-3" / "state.json").read_text())["skipped"] == 2


def test_a_token_far_from_the_reference_is_named(tmp_path, capsys):
    run = tmp_path / "run"
    options = [*LONGER, "--learning_rate", "5e-3", "--warmup_ratio", "0"]
    lines = train(run, *options, "--kl_alarm", "0.5")
    said = re.findall(r"KL alarm: (\S+) nats at the token '(.*?)' of (.*)", capsys.readouterr().out)
    high = [line for line in lines[1:] if line["kl_max"] > 0.5]
    assert high and len(said) == len(high)
    texts = {repr(c["completion"]) for c in read_lines(run / "completions.jsonl")}
    for (value, token, completion), line in zip(said, high, strict=True):
        assert float(value) == pytest.approx(line["kl_max"], rel=1e-2)
        assert completion in texts and token in completion


@pytest.mark.parametrize(
    "function, phase, lower",
    [
        (
            "policy_loss",
            r"training of step 1 at \d+ tokens in a pack",
            r"--tokens_per_pack \(16384",
        ),
        ("sample_groups", "rollout of step 1", "--prompts_per_step, --num_generations"),
        ("answers", "evaluation", "--max_completion_length"),
        ("empty_model", "loading", "the model's share of a rank"),
        ("check_gradients", r"gradient check at \d+ tokens in a pack", "--tokens_per_pack"),
        ("save", "saving of step 1", "the model's share of a rank"),
    ],
)
def test_out_of_memory_says_where_and_what_to_lower(tmp_path, monkeypatch, function, phase, lower):
    """An allocation that really fails."""
    true = getattr(train_cls, function)

    def greedy(*arguments):
        if function != "sample_groups" or arguments[2] > 1:  # not in the evaluation
            torch.empty(2**55)
        return true(*arguments)

    monkeypatch.setattr(train_cls, function, greedy)
    with pytest.raises(ValueError, match=f"out of memory in {phase}.*lower {lower}"):
        train(tmp_path / "run", *SHORT, "--save_steps", "1")


def test_a_full_disk_is_named_and_what_was_saved_is_kept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "completions.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"No space left on device while writing.*kept: free"):
        train(run, *SHORT)


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "load_weights", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="/proc cannot be written"):
        train_cls.main(["--output_dir", "/proc/run", *SHORT])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be written"):
        train_cls.main(["--output_dir", str(tmp_path / "file" / "run"), *SHORT])


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(run, *LONGER, "--save_steps", "2")
    again = ["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--max_steps", "4"]
    with (run / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(dist, "load_weights", lambda *a: pytest.fail("weights were loaded"))
        with pytest.raises(ValueError, match="another run is writing there"):
            train_cls.main(again)
    monkeypatch.undo()
    assert train_cls.main(again) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    whole = train(tmp_path / "whole", *LONGER)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "final")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert "has no checkpoint to resume from yet" in capsys.readouterr().out
    assert timeless(resumed) == timeless(whole)


DAMAGE = {
    "state.json": ("null", "not a readable run state"),
    "model.safetensors": (None, "not a readable safetensors file"),
    "optimizer/model.safetensors": (None, "not a readable safetensors file"),
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_still_serves(tmp_path):
    run = tmp_path / "run"
    whole = train(run, *LONGER, "--save_steps", "1")
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-9").mkdir()  # no checkpoint: nothing in it
    for name, (text, said) in DAMAGE.items():
        file = run / "checkpoint-2" / name
        kept = file.read_bytes()
        file.write_bytes(kept[: len(kept) // 2] if text is None else text.encode())
        with pytest.raises(ValueError, match=f"checkpoint-2/{name}: {said}"):
            train(run, "--resume_from_checkpoint", "auto")
        file.write_bytes(kept)
    for file, rest in (("metrics.jsonl", "3\n"), ("completions.jsonl", "\0\0\n")):
        with (run / file).open("a") as lines:
            lines.write(rest)
    resumed = train(run, "--resume_from_checkpoint", str(run / "checkpoint-1"))
    assert timeless(resumed) == timeless(whole)


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    data = ["--model_name_or_path", str(model), "--dataset_name", "demo:flowers"]
    train(run, *data, *LONGER, "--save_steps", "1")
    again = ["--output_dir", str(run), "--resume_from_checkpoint", str(run / "checkpoint-1")]
    with pytest.raises(ValueError, match="a run of 3 steps, now 2 are asked for"):
        train_cls.main([*again, "--max_steps", "2"])
    state = json.loads((run / "checkpoint-1" / "state.json").read_text())
    facts = state["facts"]
    for name in ("the data set", "the reference model"):
        state["facts"] = facts | {name: "float32:0"}
        (run / "checkpoint-1" / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=f"{name} is not what the run began with"):
            train_cls.main(again)


def test_a_second_signal_leaves_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun's copy of the same Ctrl-C
    assert stop.asked and not codes
    stop.asked_at -= 3
    os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [130]


def test_a_parameter_without_gradient_is_found_before_the_first_step(tmp_path, monkeypatch):
    encode = QwenVL.encode_images
    monkeypatch.setattr(QwenVL, "encode_images", lambda *a: encode(*a).detach())
    with pytest.raises(ValueError, match=r"(?s)first step.*visual\..* its gradient is 0"):
        train(tmp_path / "run", *SHORT)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_trainable_and_frozen_parameters_are_told_apart(frozen):
    config = tiny_config()
    model = tiny_model(config, torch.float32)
    model.visual.requires_grad_(not frozen)
    optimizer = dist.Optimizer(model, 0.0)
    alone = dist.Ranks(0, 1, torch.device("cpu"))
    row = (tiny_prompt(config, [(4, 4)]), [5, 6, 7], (1.0, None), alone)
    check_gradients(model, optimizer, *row)
    assert all(p.grad is None for p in model.parameters())
    model.visual.merger.ln_q.weight.requires_grad_(frozen)  # not what the optimizer knows
    if frozen:
        with pytest.raises(ValueError, match=r"visual\.merger\.ln_q\.weight is frozen and has"):
            model.visual.merger.ln_q.weight.requires_grad_(False)
            model.visual.merger.ln_q.weight.grad = torch.ones(config.vision.embed_dim)
            check_gradients(model, optimizer, *row)
    else:
        with pytest.raises(ValueError, match=r"visual\.merger\.ln_q\.weight is trainable and its"):
            check_gradients(model, optimizer, *row)


def test_the_first_update_must_have_ratio_one(tmp_path, monkeypatch):
    sample = train_cls.sample_groups

    def other(*arguments):
        return [
            replace(group, sampling_logps=[logps - 0.1 for logps in group.sampling_logps])
            for group in sample(*arguments)
        ]

    monkeypatch.setattr(train_cls, "sample_groups", other)
    with pytest.raises(ValueError, match=r"differs by 0\.1 nats between sampling and training"):
        train(tmp_path / "run", *SHORT)


def test_a_reference_that_changes_is_found(tmp_path, monkeypatch):
    score = train_cls.pack_logps

    def spoiling(model, *rest):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return score(model, *rest)

    monkeypatch.setattr(train_cls, "pack_logps", spoiling)
    with pytest.raises(ValueError, match="reference model's weights have changed"):
        train(tmp_path / "run", *SHORT)


def test_a_run_that_is_killed_again_and_again_ends_as_if_never_stopped(tmp_path):
    """Two kills; benchmarks/soak.py does the same with twenty."""
    soak(tmp_path, kills=2, longest=12.0, seed=1, argv=[*SHORT, "--max_steps", "12"])
