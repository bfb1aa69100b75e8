"""Several ranks by torchrun and gloo: they compute what one computes, and none waits for ever."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_cls
from grpo import dist
from grpo.log import LOWER
from models.config import read_config
from models.load import load_model, save_model
from tests.ranks import SMALL, score, uneven_packs
from tests.test_scripts import read_lines, same_signal_handlers, timeless  # noqa: F401
from tests.tiny import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds: whoever waits longer hangs


def torchrun(ranks: int, *argv: str, restarts: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--max_restarts={restarts}", "--shutdown-timeout=5"]
    command += [f"--master_port={random.randrange(20000, 60000)}", "-m", "tests.ranks", *argv]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


SAME = ["--max_steps", "3", *SMALL, "--learning_rate", "1e-3", "--seed", "7"]
CASES = {
    "plain": ["--prompts_per_step", "3"],
    "two updates, many packs": ["--num_iterations", "2", "--tokens_per_pack", "120"],
    "one prompt, one rank idle": ["--prompts_per_step", "1", "--gradient_checkpointing", "true"],
    "no reference, dead groups": ["--beta", "0", "--prompts_per_step", "4"],
    "frozen vision": ["--freeze_vision", "--num_iterations", "2"],
    "dynamic sampling": ["--dynamic_sampling"],
    "layers stay whole": ["--reshard_after_forward", "false"],
    "copies": ["--shard_size", "1"],
}
SHARDING = ("--reshard_after_forward", "--shard_size")


def test_two_ranks_compute_what_one_computes(tmp_path):
    """Completions and rewards the same, numbers and weights to rounding, step after step."""
    lists = [["--output_dir", str(tmp_path / n), *SAME, *CASES[n]] for n in CASES]
    (tmp_path / "runs.json").write_text(json.dumps(lists))
    out = torchrun(2, "runs", str(tmp_path / "runs.json"))
    assert out.returncode == 0, out.stderr[-4000:]
    for name, flags in CASES.items():
        alone = tmp_path / "alone" / name
        flags = [] if flags[0] in SHARDING else flags
        assert train_cls.main(["--output_dir", str(alone), *SAME, *flags]) == 0
        compare(alone, tmp_path / name, name)


def compare(one: Path, two: Path, name: str) -> None:
    texts = [
        [(c["step"], c["completion"], c["rewards"]) for c in read_lines(run / "completions.jsonl")]
        for run in (one, two)
    ]
    assert texts[0] == texts[1], name
    lines = [timeless(read_lines(run / "metrics.jsonl")) for run in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert b.pop("ranks/load_imbalance", 1) >= 1
        for key, value in a.items():
            if key != "sampling/logp_difference_max":  # itself rounding
                assert b[key] == pytest.approx(value, rel=2e-3, abs=2e-5), f"{name}: {key}"
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, two)]
    start = load_file(ROOT / "data/demo_cls/checkpoint/model.safetensors")
    moved = max((weights[0][k] - start[k].float()).abs().max() for k in start)
    apart = max((weights[0][k] - weights[1][k]).abs().max() for k in start)
    # Adam divides by the gradient's own size: where that is rounding, so is the step's direction
    assert apart <= 0.2 * moved, f"{name}: {apart} after a way of {moved}"


@pytest.mark.parametrize(
    "ranks, shard_size, tied", [(2, 2, False), (2, 2, True), (4, 4, True), (4, 2, False)]
)
def test_the_summed_gradient_is_that_of_one_rank(tmp_path, ranks, shard_size, tied):
    """One rank with images and one without; of four ranks two have nothing, and rows do not divide
    evenly. Weights arrive whole in the sampling copy and on the disk, and the checksum is the
    same; also for two copies of two shards."""
    config = tiny_config(tied=tied)
    model = tiny_model(config, torch.float32, scale=1)
    save_model(dict(model.named_parameters()), model, tmp_path, tmp_path)
    assert read_config(tmp_path) == config
    out = torchrun(ranks, "gradient", str(tmp_path), str(shard_size))
    assert out.returncode == 0, out.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    plain = load_model(tmp_path, torch.float32, "cpu")
    for name, weight in plain.named_parameters():
        assert torch.equal(found["whole"][name], weight), name
    for packs in uneven_packs(config):
        score(plain, packs)
    optimizer = dist.Optimizer(plain, 0.0)
    for name, gradient in optimizer.gradients().items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-4)
    alone = dist.Ranks(0, 1, torch.device("cpu"))
    assert found["norm"] == pytest.approx(optimizer.step(1e-2, 0.1), rel=1e-5)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found["after"][name], parameter, rtol=1e-3, atol=1e-3)
            parameter.copy_(found["after"][name])
    assert dist.checksum(plain, alone) == found["checksum"]
    assert len(list((tmp_path / "final").glob("*.safetensors"))) > 3
    saved = load_model(tmp_path / "final", torch.float32, "cpu")
    assert dist.checksum(saved, alone) == found["checksum"]
    next(plain.parameters()).data.view(torch.int32).view(-1)[3] += 1
    assert dist.checksum(plain, alone) != found["checksum"]


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path):
    """1 -> 2 -> 1 ranks, against one that was never stopped."""
    options = ["--max_steps", "6", *SMALL, "--save_steps", "2", "--learning_rate", "1e-3"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_cls.main(["--output_dir", str(whole), *options]) == 0
    shutil.copytree(whole, run)
    for later in ("checkpoint-4", "checkpoint-6", "final"):
        shutil.rmtree(run / later)
    again = ["--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    (tmp_path / "runs.json").write_text(json.dumps([again]))
    out = torchrun(2, "runs", str(tmp_path / "runs.json"))
    assert out.returncode == 0 and "checkpoint-2, step 2" in out.stdout, out.stderr[-4000:]
    shutil.rmtree(run / "checkpoint-6")
    assert train_cls.main(again) == 0
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    assert ["ranks/load_imbalance" in line for line in lines] == [False] * 3 + [True] * 2 + [
        False
    ] * 2
    compare(whole, run, "resumed")


@pytest.mark.parametrize("how, phase", [("dies", "rollout"), ("stops", "training")])
def test_a_dead_or_stuck_rank_is_named(tmp_path, how, phase):
    out = torchrun(2, "lost", how, phase, str(tmp_path / "run"))
    assert out.returncode != 0
    said = f"rank 1 is dead or stuck in {phase} of step 2"
    assert "stopped: in " in out.stderr and said in out.stderr, out.stderr[-3000:]
    assert "exitcode  : 4" in out.stderr or "exitcode: 4" in " ".join(out.stderr.split())
    assert (tmp_path / "run" / "checkpoint-1" / "state.json").exists()
    assert "[rank0]:" not in out.stderr, "a traceback"


def test_torchrun_can_start_a_run_again_that_lost_a_rank(tmp_path):
    out = torchrun(2, "lost", "dies", "training", str(tmp_path / "run"), restarts=1)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "rank 1 is dead or stuck in training of step 2" in out.stderr
    assert "has no checkpoint to resume from yet" in out.stdout
    assert "checkpoint-1, step 1" in out.stdout
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [*range(5)]


def test_a_rank_that_fails_tells_the_others_why(tmp_path):
    out = torchrun(2, "lost", "raises", "training", str(tmp_path / "run"))
    assert out.returncode != 0
    assert "rank 1 left: a fault of rank 1" in out.stderr, out.stderr[-3000:]


def test_what_one_rank_meets_all_ranks_act_upon(tmp_path):
    """A loss and a gradient that are not finite, and a signal, on rank 1 alone; which checks its
    rows slowly and has another clock to name the run folder by."""
    run = tmp_path / "rank-0"
    out = torchrun(2, "rough", str(tmp_path))
    assert out.returncode == 0, out.stderr[-4000:]
    assert out.stdout.count("code 130") == 2, out.stdout
    lines = read_lines(run / "metrics.jsonl")
    assert [line.get("skipped_steps") for line in lines] == [None, 0, 1, 2, 2]
    assert [line.get("grad_norm") is None for line in lines[1:]] == [False, True, True, False]
    assert len(read_lines(run / "bad-step-2.jsonl")) == len(read_lines(run / "bad-step-3.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0"]
    load_model(run / "checkpoint-4", torch.float32, "cpu")
    weights = [load_file(run / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2, 3, 4)]
    for skipped in weights[1:3]:
        assert all(torch.equal(weight, skipped[name]) for name, weight in weights[0].items())
    assert any(not torch.equal(weight, weights[3][name]) for name, weight in weights[0].items())


def test_flags_of_sharding_that_mean_nothing_are_refused():
    alone, two = (dist.Ranks(0, world, torch.device("cpu")) for world in (1, 2))
    for ranks, flags in ((alone, (1, True, False)), (alone, (None, False, False))):
        with pytest.raises(ValueError, match="one rank does not shard"):
            dist.check_sharding(ranks, *flags)
    with pytest.raises(ValueError, match="3 does not divide the 2 ranks"):
        dist.check_sharding(two, 3, True, False)
    with pytest.raises(ValueError, match="the device is the CPU already"):
        dist.check_sharding(two, None, True, True)
    dist.check_sharding(two, 2, False, False)


def test_every_phase_that_can_run_out_of_memory_says_what_to_lower():
    assert all(text.count("--") for text in LOWER.values())
