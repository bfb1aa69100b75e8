"""What a long run meets: each fault is injected, and ends in one message with nothing lost.

docs/reliability.md lists them; faults of ranks are in tests/test_ranks.py, of saving in
tests/test_optimizer.py.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo.engine.load
import grpo.loss
import grpo.run.checks
import grpo.run.run
import train_cls
from benchmarks.soak import soak
from data.errors import RewardFault, UserError
from grpo.engine.optimizer import Optimizer
from grpo.engine.ranks import Ranks
from grpo.plan import disk
from grpo.plan.advice import PASSES
from grpo.plan.plan import Plan
from grpo.run import exits, folder
from grpo.run.checks import check_first_ratio, check_gradients
from grpo.run.clock import Clock
from grpo.run.exits import DIVERGED, INTERRUPTED, StopSignal
from grpo.run.resume import find_checkpoint
from grpo.run.seal import sealed
from models.qwen_vl import QwenVL
from tests.forked import fork
from tests.runs import CHECKPOINT, SHORT, read_lines, read_steps, timeless, train
from tests.tiny import tiny_config, tiny_model, tiny_prompt

pytestmark = pytest.mark.slow

ALONE = Ranks(0, 1, torch.device("cpu"))
LONGER = [*SHORT, "--max_steps", "3"]
MODEL_AND_DATA = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:flowers"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of LONGER with a checkpoint at each step: copy it, never write in it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, *LONGER, "--save_steps", "1")
    return run


def copied(run: Path, folder: Path, *later: str) -> Path:
    """A copy of a run's folder, without what came `later`."""
    shutil.copytree(run, folder)
    for name in later:
        shutil.rmtree(folder / name)
    return folder


@contextmanager
def in_phase(name: str):
    """A list that holds something from the moment a run in this process enters the phase."""
    entered, enter = [], Ranks.enter

    def watched(self, phase: str) -> None:
        enter(self, phase)
        if phase == name:
            entered.append(phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "enter", watched)
        yield entered


def raises(*_):
    raise KeyError("no such class")


REWARDS = {
    "raises": (raises, "KeyError: 'no such class', for row"),
    "None": (lambda *_: None, "score() returned None, not a dict of rewards"),
    "a list": (lambda *_: [1.0, 1.0], "score() returned [1.0, 1.0], not a dict"),
    "one too few": (lambda *_: {"accuracy": 1.0}, "score() returned ['accuracy'], where ['acc"),
    "another name": (lambda *_: {"accuracy": 1, "fmt": 1}, "score() returned ['accuracy', 'fmt']"),
    "NaN": (lambda *_: {"accuracy": float("nan"), "format": 1}, "'accuracy' is nan, not a finite"),
    "exits": (lambda *_: sys.exit(), "SystemExit: sys.exit() was called, for row"),
    "a tensor": (lambda *_: {"accuracy": torch.ones(1), "format": 1}, "'accuracy' is tensor(["),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_fails_is_named_and_the_run_is_kept(
    tmp_path, monkeypatch, capsys, name, whole
):
    """In step 2: the message names the completion; the run goes on once the reward is mended."""
    run, score = tmp_path / "run", train_cls.score
    broken, said = REWARDS[name]
    with monkeypatch.context() as patch, in_phase("reward of step 2") as now:
        patch.setattr(train_cls, "score", lambda *a: (broken if now else score)(*a))
        with pytest.raises(RewardFault) as caught:
            train_cls.main(["--output_dir", str(run), *LONGER])
    text = str(caught.value)
    assert said in text and re.search(r"for row \d+ and the completion:\n.*<think>", text)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert "judge" in names and ("raises" in names) == (broken is raises)
    assert "ended after step 1 of 3; continue with" in capsys.readouterr().out
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(read_steps(whole))


def test_a_reward_that_fails_in_an_evaluation_keeps_the_step(tmp_path, monkeypatch, capsys):
    """The step before it is saved; the evaluation is made up for at the end of the resumed run."""
    run, score = tmp_path / "run", train_cls.score
    with monkeypatch.context() as patch, in_phase("evaluation of step 3") as now:
        patch.setattr(train_cls, "score", lambda *a: raises() if now else score(*a))
        with pytest.raises(RewardFault, match="KeyError: 'no such class'"):
            train_cls.main(["--output_dir", str(run), *LONGER])
    assert "ended after step 3 of 3" in capsys.readouterr().out
    assert (run / "checkpoint-3").is_dir() and not (run / "final").exists()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "eval/accuracy" in train(run, "--resume_from_checkpoint", "auto")[-1]
    assert (run / "final").is_dir()


AT_ONCE = [raises, lambda *_: None, lambda *_: {"accuracy": None}, lambda *_: sys.exit(0)]


@pytest.mark.parametrize("broken", AT_ONCE)
def test_a_reward_that_fails_from_the_start_is_named_before_weights_are_loaded(
    tmp_path, monkeypatch, broken
):
    monkeypatch.setattr(
        grpo.engine.load, "load_weights", lambda *a: pytest.fail("weights were loaded")
    )
    monkeypatch.setattr(train_cls, "score", broken)
    with pytest.raises(
        RewardFault, match=r"(Error|Exit): .*for row 0 and the completion:\n<think>"
    ):
        train(tmp_path / "run", *SHORT)


@pytest.mark.parametrize("error", [ValueError("what?"), KeyError("what?")], ids=["Value", "Key"])
@pytest.mark.parametrize("where", ["policy_loss", "group_advantages", "accuracy_reward"])
def test_a_researchers_own_error_keeps_its_traceback(tmp_path, monkeypatch, where, error):
    """It is no user's error, so `run_and_exit` shows it whole (test_cli.py)."""
    owner = grpo.loss if where == "group_advantages" else train_cls

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(owner, where, broken)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        train(tmp_path / "run", *SHORT)
    assert not isinstance(caught.value, UserError)
    found = caught.value.__cause__ if where == "accuracy_reward" else caught.value
    assert found is error
    names = [frame.name for frame in traceback.extract_tb(found.__traceback__)]
    assert names[-1] == "broken" and ("train" in names or "score" in names)


def test_an_edit_that_exits_as_if_all_were_well_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cls, "hints", lambda *_: sys.exit())
    monkeypatch.setattr(train_cls.Watch, "look", lambda self, step, groups, hints, task: hints())
    with pytest.raises(RuntimeError, match=r"sys.exit\(\) was called before the run's end"):
        train(tmp_path / "run", *SHORT)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_weights_are_loaded(
    tmp_path, monkeypatch, capsys, whole
):
    """The plan's sizes are those of the files."""
    files = list((whole / "checkpoint-3").rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    free = [0.97 * size]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    argv = ["--output_dir", str(tmp_path / "run"), *LONGER, "--save_steps", "1", "--dry_run"]
    with pytest.raises(ValueError, match=r"17 MB are free on the disk of .*: free space, or name"):
        train_cls.main(argv)
    free[0] = 1.03 * size
    assert train_cls.main(argv) == 0
    said = "disk      a checkpoint 17 MB (29 MB to write it), final/ 6 MB; at most 63 MB for the"
    assert f"{said} whole run, 18 MB free, which is not enough\n" in capsys.readouterr().out
    free[0] = 50e6
    assert train_cls.main(argv) == 0
    said = "50 MB free, which is not enough: --save_total_limit 1 would take 46 MB"
    assert said in capsys.readouterr().out
    free[0] = 30e6
    (tmp_path / "run").mkdir()
    shutil.copytree(whole / "checkpoint-1", tmp_path / "run" / ".checkpoint-2.partial")
    assert train_cls.main(argv) == 0  # what a kill left behind goes with the next save
    assert "47 MB free" in capsys.readouterr().out
    free[0] = 100.0
    assert train_cls.main([*argv, "--eval_only"]) == 0, "it writes no weights"
    assert train_cls.main([*argv, "--gpu_memory", "80"]) == 0, "another machine's disk"


def run_with_an_error_of_its_own(folder: str) -> None:
    true, calls = grpo.loss.group_advantages, []

    def edited(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("what?")
        return true(*arguments)

    grpo.loss.group_advantages = edited
    sys.argv[1:] = ["--output_dir", folder, *SHORT]
    exits.run_and_exit(train_cls.main)


def test_what_a_shell_sees_of_a_researchers_own_error(tmp_path):
    log = tmp_path / "log"
    process = fork(log, run_with_an_error_of_its_own, str(tmp_path / "run"))
    process.join()
    said = log.with_suffix(".err").read_text()
    assert process.exitcode == 1
    assert "Traceback" in said and "in edited" in said
    assert said.rstrip().endswith("ValueError: what?")


def test_an_explanation_that_is_missing_is_a_fault_of_the_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cls, "explain", lambda *_: {"format": "none"})
    with pytest.raises(RewardFault, match=r"no line for accuracy, for row \d+ and the completion"):
        train(tmp_path / "run", *SHORT)


def nan_loss(in_steps: set[int], monkeypatch) -> None:
    """From here on the loss of these steps is not a number, with its gradient."""
    true_loss, minibatches, step = train_cls.policy_loss, train_cls.minibatches, [0]

    def counting(*arguments):
        step[0] += 1
        return minibatches(*arguments)

    def broken(*arguments):
        loss, stats = true_loss(*arguments)
        return (loss * float("nan") if step[0] in in_steps else loss), stats

    monkeypatch.setattr(train_cls, "minibatches", counting)
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


def test_a_step_cut_short_after_its_first_update_says_so(tmp_path, monkeypatch, capsys):
    run, step, steps = tmp_path / "run", Optimizer.step, []

    def second_fails(self, *arguments):
        steps.append(1)
        if len(steps) == 4:  # the second update of step 2
            self.masters["model.norm.weight"].grad.fill_(float("inf"))
        return step(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", second_fails)
    train(run, *LONGER, "--save_steps", "1", "--num_iterations", "2")
    assert "step 2 was cut short after 1 of its updates" in capsys.readouterr().out
    updates = [
        json.loads((run / f"checkpoint-{n}" / "state.json").read_text())["updates"]
        for n in (1, 2, 3)
    ]
    assert updates == [2, 3, 5]


def test_bad_steps_in_a_row_are_counted_over_a_resume(tmp_path, monkeypatch):
    """Bad from step 2 on, stopped after step 3: the third in a row still ends the run."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        nan_loss({2, 3}, patch)
        train(run, *LONGER, "--max_steps", "6", "--save_steps", "1")
    shutil.rmtree(run / "final")
    for step in (4, 5, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    nan_loss({1, 2, 3}, monkeypatch)
    argv = ["--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    assert train_cls.main(argv) == DIVERGED
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 4


def test_a_model_whose_logits_are_not_numbers(tmp_path, monkeypatch, capsys):
    """After step 1: no checkpoint of such a model is made, those before are kept."""
    run, gather, calls = tmp_path / "run", train_cls.gather_weights, []

    def broken(policy, whole):
        calls.append(1)
        gather(policy, whole)
        if len(calls) == 3:  # at the start, after step 1, after step 2
            with torch.no_grad():
                whole.model.norm.weight.fill_(float("nan"))

    monkeypatch.setattr(train_cls, "gather_weights", broken)
    argv = ["x", "--output_dir", str(run), *LONGER, "--save_steps", "1", "--save_total_limit", "2"]
    monkeypatch.setattr(exits.sys, "argv", argv)
    with pytest.raises(SystemExit, match=str(DIVERGED)):
        exits.run_and_exit(train_cls.main)
    assert "logits are NaN: it has diverged: resume from an earlier" in capsys.readouterr().err
    assert (run / "checkpoint-1").exists() and not (run / "checkpoint-3").exists()


def test_a_run_that_lacks_only_its_end_can_be_finished(tmp_path, whole):
    """Killed between the last checkpoint and final/; then there is nothing left to do."""
    run = copied(whole, tmp_path / "run", "checkpoint-1", "checkpoint-2", "final")
    again = ["--resume_from_checkpoint", "auto"]
    assert timeless(train(run, *again)) == timeless(read_steps(whole))
    for file in (whole / "final").iterdir():
        assert (run / "final" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="at its end, step 3"):
        train(run, *again)
    shutil.rmtree(run / "checkpoint-3")
    with pytest.raises(ValueError, match="a run that has ended and kept no checkpoint"):
        train(run, *again)
    assert timeless(read_steps(run)) == timeless(read_steps(whole))


def test_a_signal_in_a_step_that_is_evaluated_keeps_the_evaluation(tmp_path, monkeypatch):
    options = [*LONGER, "--eval_steps", "1"]
    run, loss, calls = tmp_path / "run", train_cls.policy_loss, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(train_cls, "policy_loss", interrupting)
    assert train_cls.main(["--output_dir", str(run), *options]) == INTERRUPTED
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(train(tmp_path / "whole", *options))
    assert all("eval/accuracy" in line for line in resumed)


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
    "function, phase, helps",
    [
        (
            "policy_loss",
            r"training of step 1 at \d+ tokens in a pack",
            r"a smaller --tokens_per_pack \(it is 16384\), --gradient_checkpointing true or",
        ),
        (
            "sample_groups",
            "rollout of step 1",
            "a smaller --num_generations",
        ),
        ("judge", "evaluation", "a smaller --max_completion_length"),
        ("load_models", "loading", "--freeze_vision, .*--use_peft, .*a smaller model"),
        ("pack_chunks", r"gradient check at \d+ tokens in a pack", "a smaller --tokens_per_pack"),
        ("save_checkpoint", "saving of step 1", "--freeze_vision, .*--use_peft, .*a smaller model"),
    ],
)
def test_out_of_memory_says_where_and_what_helps(tmp_path, monkeypatch, function, phase, helps):
    """An allocation that really fails."""
    owners = {"pack_chunks": grpo.run.checks, "save_checkpoint": grpo.run.run}
    owner = owners.get(function, train_cls)
    true = getattr(owner, function)

    def greedy(*arguments):
        if function != "sample_groups" or arguments[3].num_generations > 1:  # no evaluation
            torch.empty(2**55)
        return true(*arguments)

    monkeypatch.setattr(owner, function, greedy)
    with pytest.raises(ValueError, match=f"out of memory in {phase}: try {helps}"):
        train(tmp_path / "run", *SHORT, "--save_steps", "1")


def test_out_of_memory_on_a_gpu_names_the_predicted_peaks():
    clock = Clock(Ranks(0, 1, torch.device("cpu")))
    clock.phase("training", 4096)
    helps = {PASSES: "a smaller --tokens_per_pack (it is 16384)"}
    plan = Plan("", 1, True, ["  --tokens_per_pack 4096   19.2 GB"], helps)
    said = str(clock.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), plan))
    assert "training at 4096 tokens in a pack: try a smaller --tokens_per_pack (it is 1" in said
    assert said.endswith("\nPredicted peaks:\n  --tokens_per_pack 4096   19.2 GB")


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "config.yaml"])
def test_a_full_disk_is_named_and_what_was_saved_is_kept(tmp_path, name, whole):
    run = tmp_path / "run"
    if name == "config.yaml":
        run.mkdir()
        (run / ".config.yaml").symlink_to("/dev/full")
        with pytest.raises(ValueError, match="No space left on device"):
            train(run, *SHORT)
        assert not (run / "metrics.jsonl").exists(), "then it would be a run without its flags"
        return
    copied(whole, run, "checkpoint-2", "checkpoint-3")
    kept = (run / "checkpoint-1" / "model.safetensors").read_bytes()
    full = run / name
    with pytest.MonkeyPatch.context() as patch:  # resuming rewrites the file first
        patch.setattr(folder, "_drop_after", lambda *_: None)
        full.unlink()
        full.symlink_to("/dev/full")
        with pytest.raises(ValueError, match=r"No space left on device while writing.*kept: free"):
            train(run, "--resume_from_checkpoint", "auto")
    assert (run / "checkpoint-1" / "model.safetensors").read_bytes() == kept


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        grpo.engine.load, "load_weights", lambda *a: pytest.fail("weights were loaded")
    )
    with pytest.raises(ValueError, match="/proc cannot be written"):
        train_cls.main(["--output_dir", "/proc/run", *SHORT])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be written"):
        train_cls.main(["--output_dir", str(tmp_path / "file" / "run"), *SHORT])


def test_two_runs_in_one_folder(tmp_path, monkeypatch, whole):
    run = copied(whole, tmp_path / "run", "checkpoint-3")
    again = ["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--max_steps", "4"]
    with (run / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(
            grpo.engine.load, "load_weights", lambda *a: pytest.fail("weights were loaded")
        )
        with pytest.raises(ValueError, match="another run is writing there"):
            train_cls.main(again)
    monkeypatch.undo()
    assert train_cls.main(again) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, capsys, whole):
    checkpoints = [f"checkpoint-{step}" for step in (1, 2, 3)]
    run = copied(whole, tmp_path / "run", *checkpoints, "final")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert "has no checkpoint to resume from yet" in capsys.readouterr().out
    assert timeless(resumed) == timeless(read_steps(whole))


def flip(file: Path) -> None:
    """Turns one bit over in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(file: Path) -> None:
    """Another step's, as sound as this one's."""
    shutil.copyfile(str(file).replace("checkpoint-2", "checkpoint-1"), file)


DIFFERS = "not what was saved: its checksum differs"
DAMAGE = [
    ("state.json", lambda file: file.write_text("null"), "not a readable run state"),
    ("state.json", lambda file: file.write_text(file.read_text().replace("0", "1", 1)), DIFFERS),
    ("state.json", Path.unlink, "missing"),
    ("state.json", foreign, "of step 1, not 2"),
    ("model.safetensors", halve, DIFFERS),
    ("model.safetensors", flip, DIFFERS),
    ("model.safetensors", foreign, DIFFERS),
    ("optimizer/model.safetensors", flip, DIFFERS),
    ("optimizer/model.safetensors", foreign, DIFFERS),
    ("optimizer/model.safetensors", Path.unlink, "missing"),
]


@pytest.mark.parametrize("name, damage, said", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_hand(
    tmp_path, whole, name, damage, said
):
    run = copied(whole, tmp_path / "run", "checkpoint-3", "final")
    damage(run / "checkpoint-2" / name)
    folder, saved, notes = find_checkpoint("auto", run, ALONE)
    assert folder == run / "checkpoint-1" and saved["step"] == 1
    (note,) = notes
    assert note.startswith(f"passed over {run}/checkpoint-2: {run}/checkpoint-2/{name}")
    assert said in note
    with pytest.raises(ValueError, match=f"checkpoint-2.*({said}|no state.json)"):
        find_checkpoint(str(run / "checkpoint-2"), run, ALONE)
    flip(run / "checkpoint-1" / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)no whole checkpoint.*checkpoint-2/.*checkpoint-1/"):
        find_checkpoint("auto", run, ALONE)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, whole, capsys):
    """What it passes over is named, and set aside where the run writes its own."""
    run = copied(whole, tmp_path / "run", "final")
    flip(run / "checkpoint-2" / "model.safetensors")
    (run / "checkpoint-3" / "state.json").unlink()
    (run / "checkpoint-9").mkdir()
    assert timeless(train(run, "--resume_from_checkpoint", "auto")) == timeless(read_steps(whole))
    said = capsys.readouterr().out
    for step in (9, 3, 2):
        assert f"passed over {run}/checkpoint-{step}: " in said
    assert f"resumed   {run}/checkpoint-1, step 1" in said
    aside = sorted(path.name[:22] for path in run.glob("abandoned-*"))
    assert aside == [f"abandoned-checkpoint-{step}" for step in (2, 3, 9)]
    for name in ("checkpoint-3/model.safetensors", "final/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, whole, monkeypatch):
    """It may be whole: a network file system that hiccups must not cost it. macOS' files do not
    count."""
    run = copied(whole, tmp_path / "run", "final")
    (run / "checkpoint-3" / "._model.safetensors").write_bytes(b"macOS")
    opened, tries = Path.open, []

    def hiccup(path, *mode, **more):
        if path.name == "model.safetensors" and mode == ("rb",) and len(tries) < failing:
            tries.append(path)
            raise OSError(116, "Stale file handle")
        return opened(path, *mode, **more)

    monkeypatch.setattr("grpo.run.seal.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Path, "open", hiccup)
    failing = 12
    with pytest.raises(UserError, match="checkpoint-3/.*model.safetensors: cannot be read: try"):
        train(run, "--resume_from_checkpoint", "auto", "--max_steps", "4")
    assert not list(run.glob("abandoned-*"))
    tries.clear()
    failing = 2
    assert len(train(run, "--resume_from_checkpoint", "auto")) == len(read_steps(whole))


def test_a_checkpoint_of_before_there_were_checksums_is_resumed(tmp_path, whole):
    run = copied(whole, tmp_path / "run", "checkpoint-3", "final")
    where = run / "checkpoint-2" / "state.json"
    state = json.loads(where.read_text())
    del state["files"], state["sha256"]
    where.write_text(json.dumps(state))
    folder, saved, notes = find_checkpoint("auto", run, ALONE)
    assert folder == run / "checkpoint-2" and saved == state
    assert notes == [f"unchecked {folder} was made before checkpoints had checksums"]
    halve(folder / "model.safetensors")  # that is seen all the same
    assert find_checkpoint("auto", run, ALONE)[0] == run / "checkpoint-1"


def test_what_follows_the_last_whole_line_is_dropped(tmp_path):
    for cut in ('{"step": 2, "rew', '{"step": 2}', "3\n", "\0\0\n", "{}\n"):
        file = tmp_path / "metrics.jsonl"
        file.write_text('{"step": 0}\n{"step": 1}\n' + cut)
        folder._drop_after(file, 2)
        assert file.read_text() == '{"step": 0}\n{"step": 1}\n', cut


def test_a_folder_that_another_run_used_is_not_taken(tmp_path, whole, plain):
    """By a checkpoint, though no metrics; and by a run while this one was loading."""
    one, two = copied(whole, tmp_path / "one"), copied(plain, tmp_path / "two")
    other = ["--resume_from_checkpoint", str(one / "checkpoint-1")]
    with pytest.raises(ValueError, match="two holds another run than"):
        train(two, *other)
    with pytest.raises(ValueError, match="is a run folder: name one of its checkpoints"):
        train(two, "--resume_from_checkpoint", str(one), *MODEL_AND_DATA)
    (one / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="one already holds a run"):
        train(one, *SHORT)
    with pytest.raises(ValueError, match="two already holds a run"):
        folder.RunFolder(two, SimpleNamespace(), None, "x")


def test_a_file_system_without_locks_is_told_and_serves(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folder.fcntl, "flock", without)
    train(tmp_path / "run", *SHORT)
    assert "a second run in this folder would not be noticed" in capsys.readouterr().err


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
    del state["sha256"]
    for name in (
        "the data set",
        "the held-out rows",
        "what is paid for",
        "the precision",
        "the reference model",
    ):
        state["facts"] = facts | {name: "float32:0"}
        (run / "checkpoint-1" / "state.json").write_text(sealed(state, run / "checkpoint-1"))
        with pytest.raises(ValueError, match=f"{name} is not what the run began with"):
            train_cls.main(again)


def lose_the_terminal(done: str) -> None:
    terminal, own = os.openpty()
    ours, tee = os.pipe()
    os.dup2(own, 1)
    os.dup2(tee, 2)
    StopSignal()
    for end in (terminal, own, ours, tee):
        os.close(end)
    os.kill(os.getpid(), signal.SIGHUP)
    os.write(1, b"saved")  # an OSError before
    os.write(2, b"saved")
    Path(done).touch()


def test_what_is_printed_to_a_lost_terminal_does_not_end_the_run(tmp_path):
    process = fork(tmp_path / "log", lose_the_terminal, str(tmp_path / "done"))
    process.join()
    assert (tmp_path / "done").exists()


def test_a_second_signal_leaves_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(exits.os, "_exit", codes.append)
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
    with pytest.raises(RuntimeError, match=r"(?s)first step.*visual\..* its gradient is 0"):
        train(tmp_path / "run", *SHORT)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_trainable_and_frozen_parameters_are_told_apart(frozen):
    config = tiny_config()
    model = tiny_model(config, torch.float32)
    model.visual.requires_grad_(not frozen)
    optimizer = Optimizer(model, 0.0)
    prompt = tiny_prompt(config, [(4, 4)])
    rows = [SimpleNamespace(images=["a"], solution="", prompt=lambda processor: prompt)]
    processor = SimpleNamespace(tokenizer=lambda *a, **o: {"input_ids": [5, 6, 7]}, opened="")
    alone = Ranks(0, 1, torch.device("cpu"))
    run = SimpleNamespace(ranks=alone, phase=lambda *a: None)
    data = SimpleNamespace(rows=rows, processor=processor, answer_format="think")
    row = (data, run)
    check_gradients(model, model, optimizer, *row)
    assert all(p.grad is None for p in model.parameters())
    model.visual.merger.ln_q.weight.requires_grad_(frozen)  # not what the optimizer knows
    if frozen:
        with pytest.raises(RuntimeError, match=r"visual\.merger\.ln_q\.weight is frozen and has"):
            model.visual.merger.ln_q.weight.requires_grad_(False)
            model.visual.merger.ln_q.weight.grad = torch.ones(config.vision.embed_dim)
            check_gradients(model, model, optimizer, *row)
    else:
        with pytest.raises(RuntimeError, match=r"merger\.ln_q\.weight is trainable and its"):
            check_gradients(model, model, optimizer, *row)


def test_the_first_update_must_have_ratio_one(tmp_path, monkeypatch):
    sample = train_cls.sample_groups

    def other(*arguments):
        return [
            replace(group, sampling_logps=[logps - 0.1 for logps in group.sampling_logps])
            for group in sample(*arguments)
        ]

    monkeypatch.setattr(train_cls, "sample_groups", other)
    with pytest.raises(RuntimeError, match=r"differs by 0\.1 nats between sampling and training"):
        train(tmp_path / "run", *SHORT)


def test_rounding_grows_as_the_temperature_falls():
    """And only the first update of all is looked at."""
    tally, ranks = SimpleNamespace(drift=0.03, updates=0), Ranks(0, 1, torch.device("cpu"))

    def check(temperature: float, step: int = 0) -> None:
        config = SimpleNamespace(temperature=temperature)
        run = SimpleNamespace(step=step, ranks=ranks, dtype=torch.float32, config=config)
        check_first_ratio(tally, run)

    check(0.5)
    with pytest.raises(RuntimeError, match="differs by 0.03 nats .* where 0.02 is rounding"):
        check(1.3)
    check(1.3, step=1)
    tally.updates = 1
    check(1.3)


def test_a_reference_that_changes_is_found(tmp_path, monkeypatch):
    score = train_cls.pack_logps

    def spoiling(model, *rest):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return score(model, *rest)

    monkeypatch.setattr(train_cls, "pack_logps", spoiling)
    with pytest.raises(RuntimeError, match="reference model's weights have changed"):
        train(tmp_path / "run", *SHORT)


def test_a_run_that_is_killed_again_and_again_ends_as_if_never_stopped(tmp_path):
    """Two kills; benchmarks/soak.py does the same with twenty, and a new Python for each."""

    def run(output: Path, argv: list[str], seconds: float | None) -> bool:
        process = fork(tmp_path / "log", train_cls.main, ["--output_dir", str(output), *argv])
        process.join(seconds)
        if ended := process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "log.err").read_text()
        process.kill()
        process.join()
        return ended

    told = soak(tmp_path, 2, longest=3.0, seed=1, argv=[*SHORT, "--max_steps", "10"], run=run)
    assert told, "never killed: blunt"
