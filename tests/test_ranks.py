"""Several ranks, with gloo: they compute what one computes, and none waits forever."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_cls
from data.flowers import rows
from demo.published import save_model
from grpo.engine.optimizer import Optimizer
from grpo.engine.ranks import Ranks
from grpo.engine.shard import check_sharding, checksum
from grpo.flags.combine import without_effect
from grpo.run.exits import RANK_LOST
from models.decoding.storage import float32_names
from models.load import load_model
from tests import forked
from tests.ranks import RATES, SMALL, in_turn, lost, score, uneven_packs
from tests.runs import CHECKPOINT, read_lines, read_steps, timeless, torchrun
from tests.tiny import family_config, tiny_model

ALONE = Ranks(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.slow


SAME = ["--max_steps", "2", *SMALL, "--save_steps", "0", "--learning_rate", "1e-3", "--seed", "7"]
SAME += ["--warmup_ratio", "0"]
EVALUATED = ["--eval_only", "--eval_samples", "6", "--max_completion_length", "40"]
EVALUATED += ["--eval_samples_per_prompt", "2"]
ONE_STEP = ["--max_steps", "1", "--save_steps", "1"]
CASES = {
    "plain": ["--prompts_per_step", "3"],
    "two updates, many packs": ["--num_iterations", "2", "--tokens_per_pack", "120"],
    "one prompt, one rank idle": ["--prompts_per_step", "1", "--gradient_checkpointing", "true"],
    "no reference, dead groups": ["--beta", "0", "--prompts_per_step", "4"],
    "frozen vision": ["--freeze_vision", "--num_iterations", "2"],
    "whole completions, top entropy": [
        *("--importance_sampling_level", "sequence_token", "--num_iterations", "2"),
        *("--top_entropy_quantile", "0.3", "--entropy_coef", "0.05", "--tokens_per_pack", "120"),
    ],
    "dynamic sampling": ["--dynamic_sampling"],
    "LoRA": ["--use_peft", "--num_iterations", "2", "--save_steps", "2"],
    "moments in 8 bits": ["--optim", "adamw_8bit"],
    "moments in bf16": ["--optim", "adamw_anyprecision", "--num_iterations", "2"],
    "weights in bf16": ["--optim", "adamw_8bit", "--bf16", "true", *ONE_STEP],
    "layers stay whole": ["--reshard_after_forward", "false"],
    "copies": ["--shard_size", "1", "--save_steps", "2"],
}
SHARDING = ("--reshard_after_forward", "--shard_size")
RESUMED = ["--max_steps", "3", *SMALL, "--learning_rate", "1e-3", "--warmup_ratio", "0"]
GRADIENTS = [(2, 2, "qwen2_vl", False), (2, 2, "qwen2_vl", True), (2, 2, "qwen2_5_vl", False)]
GRADIENTS += [(2, 2, "qwen3_vl", True), (4, 4, "qwen2_vl", True), (4, 2, "qwen3_vl", False)]
GRADIENTS += [(2, 2, "qwen3_5", False), (4, 2, "qwen3_5", True)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """One pair of ranks that does what the tests below look at: the folder, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    calls = [["train", ["--output_dir", str(folder / n), *SAME, *CASES[n]]] for n in CASES]
    # a run of one rank, cut after step 1, is resumed by two ranks
    assert train_cls.main(["--output_dir", str(folder / "whole"), *RESUMED]) == 0
    shutil.copytree(folder / "whole", folder / "run")
    for later in ("checkpoint-2", "checkpoint-3", "final"):
        shutil.rmtree(folder / "run" / later)
    again = ["--output_dir", str(folder / "run"), "--resume_from_checkpoint", "auto"]
    calls.append(["train", again])
    calls.append(["train", [*EVALUATED, "--output_dir", str(folder / "evaluated")]])
    calls += gradient_calls(folder, 2)
    save_model(tiny_model(family_config("qwen3_5"), torch.float32, scale=1), folder / "in bf16")
    calls.append(["in_bf16", [str(folder / "in bf16")]])
    calls.append(["agree", [str(folder)]])
    calls += unlike_calls(folder)
    (folder / "rough").mkdir()
    calls.append(["rough", [str(folder / "rough")]])  # the last: it changes the directory
    out = forked.ranks(2, folder, in_turn, calls)
    assert out.codes == [0, 0], out.stderr[-4000:]
    return folder, out


def unlike_calls(folder: Path) -> list:
    """Ranks that read different things, each for itself; and a damaged checkpoint."""
    for name, synonym in (("one", "phlox"), ("other", "Phlox paniculata")):
        (folder / f"{name}.json").write_text(json.dumps({"garden phlox": [synonym]}))
    model = shutil.copytree(CHECKPOINT, folder / "other model")
    damaged = shutil.copytree(folder / "whole", folder / "damaged")
    for file in (model / "model.safetensors", damaged / "checkpoint-3/optimizer/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    named = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:flowers", *SMALL]
    auto = ["--resume_from_checkpoint", "auto"]
    run, run_1 = ["--output_dir", str(folder / "unlike")], ["--output_dir", str(folder / "unseen")]
    aliases = [["--aliases", str(folder / f"{name}.json")] for name in ("one", "other")]
    cases = {
        "flags": [[*named, *run], [*named, *run, "--seed", "8", "--beta", "0"]],
        "content": [
            [*named, *run, *aliases[0]],
            [*named, *run, *aliases[1], "--model_name_or_path", str(model)],
        ],
        "no folder": [[*named, *run], [*named, *run_1]],
        "no checkpoint": [
            [*named, "--output_dir", str(folder / "run"), *auto],
            [*named, *run_1, *auto],
        ],
        "damaged": [["--output_dir", str(damaged), *auto, "--max_steps", "9", "--dry_run"]] * 2,
    }
    return [["refused", [name, str(folder), argv]] for name, argv in cases.items()]


def test_ranks_that_read_different_things_are_refused_by_name(two):
    """Each on both ranks with one message; a folder that one does not see, in no time."""
    folder, out = two
    said = {}
    for name in ("flags", "content", "no folder", "no checkpoint", "damaged"):
        texts = [(folder / f"{name}.{rank}.txt").read_text() for rank in (0, 1)]
        assert texts[0] == texts[1], name
        said[name] = texts[0]
    host = socket.gethostname()
    zero, one = f"on rank 0 ({host})", f"on rank 1 ({host})"
    lines = said["flags"].splitlines()
    assert lines[1:-1] == [f"  --seed: 42 {zero}, 8 {one}", f"  --beta: 0.04 {zero}, 0.0 {one}"]
    lines = said["content"].splitlines()
    assert len(lines) == 4 and lines[1].startswith("  what is paid for: Task(match='exact', al")
    assert lines[2].startswith("  model.safetensors of the model: ")
    told = f"{folder / 'unlike'} is not there for rank 1 on {host}: it must be on storage"
    assert told in said["no folder"]
    told = (
        f"{folder / 'run'}/checkpoint-3: the main rank, on {host}, resumes from it, but it is not"
    )
    assert said["no checkpoint"].startswith(f"{told} there for rank 1 on {host}: is")
    assert said["damaged"] == "code 0"
    told = "passed over {0}/checkpoint-3: {0}/checkpoint-3/optimizer/model.safetensors: not what"
    assert told.format(folder / "damaged") in out.stdout


def test_evaluation_alone_is_the_same_on_two_ranks(two, plain, tmp_path):
    """Greedy answers are those before training, drawn ones those of one rank."""
    folder, _ = two
    assert train_cls.main([*EVALUATED, "--output_dir", str(tmp_path / "one")]) == 0
    runs = folder / "evaluated", tmp_path / "one"
    answers = [(run / "eval-0.jsonl").read_text() for run in (*runs, plain)]
    assert answers[0] == answers[1] == answers[2]
    drawn = [json.loads((run / "samples-0.json").read_text()) for run in runs]
    assert drawn[0] == drawn[1]
    assert any(one != other for one, other in drawn[0]), "no chance in it: blunt"
    lines = [timeless(read_lines(run / "metrics.jsonl"))[0] for run in runs]
    assert lines[0] == lines[1]


def test_two_ranks_write_one_report(two):
    folder, _ = two
    assert "3 of 3 steps" in (folder / "run" / "report.html").read_text()
    assert not (folder / "plain" / "report.html").exists()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    out = forked.ranks(4, folder, in_turn, gradient_calls(folder, 4))
    assert out.codes == [0] * 4, out.stderr[-4000:]
    return folder


def gradient_calls(folder: Path, world: int) -> list:
    calls = []
    for ranks, shard_size, family, tied in GRADIENTS:
        if ranks == world:
            model = tiny_model(family_config(family, tied), torch.float32, scale=1)
            place = folder / f"gradient-{shard_size}-{family}-{tied}"
            save_model(model, place)
            calls.append(["gradient", [str(place), shard_size]])
    return calls


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of a case on one rank, by its name."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(name: str) -> Path:
        flags = () if CASES[name][0] in SHARDING else tuple(CASES[name])
        if flags not in made:
            made[flags] = folder / name
            assert train_cls.main(["--output_dir", str(made[flags]), *SAME, *flags]) == 0
        return made[flags]

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_computes(two, alone, name):
    """Completions and rewards the same, numbers and weights to rounding, step after step."""
    compare(alone(name), two[0] / name, name)


AMOUNTS = {
    "perf/completion_tokens_per_s": "time/rollout_s",
    "perf/tokens_per_s/rollout": "time/rollout_s",
    "perf/tokens_per_s/training": "time/training_s",
    "perf/samples_per_s": "step_time",
}


def compare(one: Path, two: Path, name: str) -> None:
    texts = [
        [(c["step"], c["completion"], c["rewards"]) for c in read_lines(run / "completions.jsonl")]
        for run in (one, two)
    ]
    assert texts[0] == texts[1], name
    lines = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    for a, b in zip(*lines, strict=True):  # what is sampled and trained on, over all ranks
        for amount, time in AMOUNTS.items():
            cut = time == "time/training_s" and "--tokens_per_pack" in CASES.get(name, ())
            same = amount in a and not cut  # small packs cut groups at other places
            assert not same or a[amount] * a[time] == pytest.approx(b[amount] * b[time]), amount
    lines = [timeless(of_run) for of_run in lines]
    for a, b in zip(*lines, strict=True):
        assert b.pop("ranks/load_imbalance", 1) >= 1
        for key, value in a.items():
            if key != "sampling/logp_difference_max":  # itself rounding
                assert b[key] == pytest.approx(value, rel=2e-3, abs=2e-5), f"{name}: {key}"
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, two)]
    start = load_file(CHECKPOINT / "model.safetensors")
    moved = max((weights[0][k] - start[k].float()).abs().max() for k in start)
    apart = max((weights[0][k] - weights[1][k]).abs().max() for k in start)
    # Adam divides by the gradient's own size: where that is rounding, so is the step's direction
    assert apart <= 0.2 * moved, f"{name}: {apart} after a way of {moved}"


@pytest.mark.parametrize("ranks, shard_size, family, tied", GRADIENTS)
def test_the_summed_gradient_is_that_of_one_rank(request, ranks, shard_size, family, tied):
    """One rank with images and one without; of four ranks two have nothing, and rows do not divide
    evenly. The full copy and the files hold every weight, and the checksum is the same; also for
    two copies of two shards."""
    folder = request.getfixturevalue("two")[0] if ranks == 2 else request.getfixturevalue("four")
    folder = folder / f"gradient-{shard_size}-{family}-{tied}"
    found = torch.load(folder / "found.pt", weights_only=True)
    plain = load_model(folder, torch.float32, "cpu")
    assert plain.config == family_config(family, tied)
    for name, weight in plain.named_parameters():
        assert torch.equal(found["full"][name], weight), name
    for packs in uneven_packs(plain.config):
        score(plain, packs)
    optimizer = Optimizer(plain, 0.0, vision_apart=True)
    for name, gradient in optimizer.gradients().items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-4)
    assert found["norm"] == pytest.approx(optimizer.step(RATES, 0.1), rel=1e-5)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found["after"][name], parameter, rtol=1e-3, atol=1e-3)
            parameter.copy_(found["after"][name])
    assert checksum(plain, ALONE) == found["checksum"]
    assert len(list((folder / "final").glob("*.safetensors"))) > 3
    saved = load_model(folder / "final", torch.float32, "cpu")
    assert checksum(saved, ALONE) == found["checksum"]
    next(plain.parameters()).data.view(torch.int32).view(-1)[3] += 1
    assert checksum(plain, ALONE) != found["checksum"]


def test_what_stays_in_float32_does_so_on_two_ranks_that_compute_in_bf16(two):
    """The decay and the norm of linear attention, as their layer sees them, and their gradients."""
    folder = two[0] / "in bf16"
    found = torch.load(folder / "found.pt", weights_only=True)
    plain = load_model(folder, torch.bfloat16, "cpu")
    kept, layers = float32_names(plain), 2
    assert len(kept) == 2 * layers
    published = load_file(folder / "model.safetensors")
    for name, parameter in plain.named_parameters():
        assert parameter.dtype == (torch.float32 if name in kept else torch.bfloat16), name
        assert torch.equal(found["seen"].get(name, parameter), parameter), name
        assert found["seen"].get(name, parameter).dtype == parameter.dtype, name
    assert kept <= found["seen"].keys() > kept
    decay = published["model.language_model.layers.1.linear_attn.A_log"]
    assert not torch.equal(decay.bfloat16().float(), decay), "a blunt test"
    optimizer = Optimizer(plain, 0.0)
    for packs in uneven_packs(plain.config):
        score(plain, packs)
    for name, gradient in optimizer.gradients().items():
        if name in kept:
            error = (found["gradients"][name] - gradient).norm()
            assert error < 0.02 * gradient.norm() and found["gradients"][name].any(), name


def test_a_checkpoint_is_resumed_with_another_number_of_ranks(two, tmp_path):
    """1 -> 2 -> 1 ranks, against one that was never stopped."""
    folder, out = two
    assert "checkpoint-1, step 1" in out.stdout
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoint-3")
    again = ["--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    assert train_cls.main(again) == 0
    steps = read_steps(run)
    assert [line["step"] for line in steps] == list(range(4))
    by_two = ["ranks/load_imbalance" in line for line in steps]
    assert by_two == [False, False, True, False]
    compare(folder / "whole", run, "resumed")


def test_vectors_of_a_sharded_bf16_model_are_trained_in_float32(two, alone):
    """FSDP2 hands their gradients on: the checkpoint's masters are those of one rank."""
    name = "weights in bf16"
    runs = [alone(name), two[0] / name]
    one, other = (load_file(run / "checkpoint-1" / "model.safetensors") for run in runs)
    vectors = [key for key, weight in one.items() if weight.ndim == 1]
    for weights in (one, other):
        others = [weight for key, weight in weights.items() if key not in vectors]
        assert vectors and all(weight.dtype == torch.bfloat16 for weight in others)
    start = load_file(CHECKPOINT / "model.safetensors")
    for key in vectors:
        moved = (one[key] - start[key].to(torch.bfloat16).float()).abs().mean()
        assert one[key].dtype == other[key].dtype == torch.float32 and moved > 1e-4, key
        # the first update goes by signs, and those of the smallest gradients are rounding
        assert (one[key] - other[key]).abs().mean() < 0.2 * moved, key


def test_ranks_with_adapters_hold_all_weights_and_the_same_adapters(two):
    """No sharding flag has an effect; the adapter that is saved is that of final/."""
    folder, _ = two
    run = folder / "LoRA"
    one = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    two = load_file(run / "final" / "adapter" / "adapter_model.safetensors")
    assert len(one) == 56 and all(torch.equal(one[name], two[name]) for name in one)
    config = train_cls.Config(use_peft=True, shard_size=2)
    config.given = frozenset({"shard_size"})
    assert "--shard_size has no effect: with --use_peft every" in without_effect(config, 2)[0]


def test_a_run_of_two_ranks_is_resumed_by_one_without_its_flags_of_ranks(two, tmp_path, capsys):
    """config.yaml has --timeout and --shard_size, which one rank has no use for: said if typed."""
    run = tmp_path / "run"
    shutil.copytree(two[0] / "copies", run)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("timeout: 1800.0", "timeout: 60.0"))
    again = ["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--max_steps", "3"]
    assert train_cls.main(again) == 0
    assert "no effect" not in capsys.readouterr().out
    assert train_cls.main([*again, "--shard_size", "1", "--dry_run"]) == 0
    assert "flags     --shard_size has no effect: with one rank" in capsys.readouterr().out


def test_a_fault_on_one_rank_is_raised_on_all(two):
    gathered = json.loads((two[0] / "agree.json").read_text())
    assert gathered == [["RewardFault: a fault of rank 1", "UserError: a fault of rank 1"]] * 2


def test_one_rank_shows_the_progress_of_the_image_checks(two):
    bars = two[1].stderr.replace("\r", "\n").splitlines()
    bars = [line for line in bars if "split 'train' images:   0%" in line]
    runs = len(CASES) + 7  # the resumed, the evaluated and the rough one; four that are refused
    assert len(bars) == runs


@pytest.mark.parametrize("how, moment", [("stops", "training of step 2"), ("stops", "checks")])
def test_a_stuck_rank_is_named(tmp_path, how, moment):
    """In the middle of a step, and before the first collective."""
    run = tmp_path / "run"
    out = forked.ranks(2, tmp_path, lost, [[how, moment]], str(run), 5)
    assert out.codes[0] == RANK_LOST
    said = f"rank 1 is dead or stuck in {moment}"
    assert "stopped: in " in out.stderr and said in out.stderr, out.stderr[-3000:]
    assert (run / "checkpoint-1" / "state.json").exists() == ("step" in moment)
    assert "Traceback" not in out.stderr


FAULTS = [
    ["raises", "training of step 2"],
    ["dies", "rollout of step 2"],
    ["dies", "training of step 3"],
]


def test_a_run_that_lost_a_rank_is_resumed(tmp_path):
    """Rank 1 fails by itself, dies in a rollout, dies in training: each is named, and the run is
    resumed from its newest checkpoint until it is done."""
    run = tmp_path / "run"
    out = forked.ranks(2, tmp_path, lost, FAULTS, str(run), 10, restarts=3)
    assert out.codes == [0, 0], out.stderr[-3000:]
    assert "rank 1 left: a fault of rank 1" in out.stderr
    for _, moment in FAULTS[1:]:
        assert f"rank 1 is dead or stuck in {moment}" in out.stderr
    assert out.stderr.count("Traceback") == 1, "one more than that of the fault"
    assert "has no checkpoint to resume from yet" in out.stdout
    assert "checkpoint-1, step 1" in out.stdout and "checkpoint-2, step 2" in out.stdout
    assert [line["step"] for line in read_steps(run)] == [*range(4)]


def test_torchrun_can_start_a_run_again_that_lost_a_rank(tmp_path):
    for split in ("train", "test"):  # few, as each of the four processes reads them
        table = rows(split, 12)
        for number, row in enumerate(table):
            image, row["image"] = row["image"], f"{split}-{number}.png"
            image.save(tmp_path / row["image"])
        (tmp_path / f"{split}.json").write_text(json.dumps(table))
    data = ["--dataset_name", str(tmp_path)]
    call = ["lost", [FAULTS[2:], str(tmp_path / "run"), 10, *data]]
    (tmp_path / "calls").write_text(json.dumps([call]))
    out = torchrun(2, "-m", "tests.ranks", str(tmp_path / "calls"), restarts=1)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "rank 1 is dead or stuck in training of step 3" in out.stderr
    assert "[rank0]:" not in out.stderr, "a traceback"
    assert "has no checkpoint to resume from yet" in out.stdout
    assert "checkpoint-2, step 2" in out.stdout
    assert [line["step"] for line in read_steps(tmp_path / "run")] == [*range(4)]


def test_what_one_rank_meets_all_ranks_act_upon(two):
    """A loss and a gradient that are not finite, and a signal, on rank 1 alone; which checks its
    rows slowly and has another clock to name the run folder by."""
    folder, out = two
    run = folder / "rough" / "rank-0"
    assert out.stdout.count("code 130") == 2, out.stdout
    steps = read_steps(run)
    assert [line.get("skipped_steps") for line in steps] == [None, 0, 1, 2, 2]
    assert [line.get("grad_norm") is None for line in steps[1:]] == [False, True, True, False]
    assert len(read_lines(run / "bad-step-2.jsonl")) == len(read_lines(run / "bad-step-3.jsonl"))
    assert [path.name for path in (folder / "rough").iterdir()] == ["rank-0"]
    load_model(run / "checkpoint-4", torch.float32, "cpu")
    weights = [load_file(run / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2, 3, 4)]
    for skipped in weights[1:3]:
        assert all(torch.equal(weight, skipped[name]) for name, weight in weights[0].items())
    assert any(not torch.equal(weight, weights[3][name]) for name, weight in weights[0].items())


def test_sharding_that_these_ranks_cannot_do_is_refused():
    ranks = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 does not divide the 2 ranks"):
        check_sharding(ranks, 3, False)
    with pytest.raises(ValueError, match="the device is the CPU already"):
        check_sharding(ranks, None, True)
    check_sharding(ranks, 2, False)
