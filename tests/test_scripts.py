"""The training script, run as its users run it."""

import importlib.machinery
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_cls
import train_det
from data.flowers import SPECIES, rows
from grpo import dist
from models.config import parse_config
from models.load import load_model, save_model
from models.processor import Processor
from models.qwen_vl import QwenVL, image_features
from rewards.cls import accuracy_reward
from rewards.det import iou_reward, read_boxes
from rewards.parse import perfect

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CHECKPOINT = ROOT / "data" / "demo_cls" / "checkpoint"
SHORT = ["--max_steps", "2", "--prompts_per_step", "2", "--num_generations", "4"]
SHORT += ["--eval_samples", "6", "--max_completion_length", "40"]


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    """Checked images are remembered from test to test, but not beyond."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[dict]:
    """The metrics of a short run with no flag but the size's."""
    return train(tmp_path_factory.mktemp("plain") / "run", *SHORT)


@pytest.fixture(autouse=True)
def same_signal_handlers():
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def train(folder: Path, *argv: str) -> list[dict]:
    """Runs main() in this process; the lines of metrics.jsonl."""
    assert train_cls.main(["--output_dir", str(folder), *argv]) == 0
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    prefixes = ("time/", "memory/", "step_time")
    return [{k: v for k, v in line.items() if not k.startswith(prefixes)} for line in lines]


def held_out_accuracy(folder: Path, step: int) -> float:
    answers = read_lines(folder / f"eval-{step}.jsonl")
    return sum(accuracy_reward(a["completion"], a["truth"]) for a in answers) / len(answers)


def test_the_demo_learns(tmp_path):
    """A quarter of the demo's steps; README quotes the whole."""
    lines = train(tmp_path / "run", "--max_steps", "25", "--eval_samples", "96")
    before, after = lines[0]["eval/accuracy"], lines[-1]["eval/accuracy"]
    assert before == held_out_accuracy(tmp_path / "run", 0) <= 0.45
    assert after == held_out_accuracy(tmp_path / "run", 25) > before + 0.15
    assert lines[-1]["eval/format"] >= 0.95
    known = {s.look for s in SPECIES}
    answers = read_lines(tmp_path / "run" / "eval-25.jsonl")
    readable = [a for a in answers if any(look in a["completion"] for look in known)]
    assert len(readable) >= 0.95 * len(answers), "the reasoning is no longer readable"


def test_the_detection_demo_learns(tmp_path):
    """A quarter of the demo's steps; README quotes the whole."""
    run = tmp_path / "run"
    argv = ["--max_steps", "30", "--eval_samples", "96", "--output_dir", str(run)]
    assert train_det.main(argv) == 0
    before, after = (read_lines(run / "metrics.jsonl")[i] for i in (0, -1))
    for step, line in ((0, before), (30, after)):
        answers = read_lines(run / f"eval-{step}.jsonl")
        scenes = train_det.load("demo:scenes", "test")
        rewards = [iou_reward(a["completion"], scenes[a["row"]].solution) for a in answers]
        assert line["eval/iou"] == pytest.approx(sum(rewards) / len(rewards))
    assert after["eval/iou"] > 1.5 * before["eval/iou"] > 0.3
    assert after["eval/AP50"] > before["eval/AP50"] + 0.2
    assert after["eval/format"] >= 0.95


@pytest.mark.parametrize(
    "script, name, drift", [(train_cls, "accuracy", 0.1), (train_det, "iou", 0.2)]
)
def test_shuffled_rewards_teach_nothing(script, name, drift, tmp_path, monkeypatch):
    """The same steps, each completion paid what some completion so far has earned, drawn by lot.

    Adam's steps are as long as ever, so the policy drifts by chance; true rewards give 0.35 more.
    """
    true_judge, pool, chance = script.judge, [], random.Random(1)

    def shuffled(*arguments):
        records = true_judge(*arguments)
        pool.extend(record["reward"] for record in records)
        return [record | {"reward": chance.choice(pool)} for record in records]

    monkeypatch.setattr(script, "judge", shuffled)
    run = tmp_path / "run"
    options = ["--max_steps", "25", "--eval_samples", "96", "--output_dir", str(run)]
    assert script.main(options) == 0
    lines = read_lines(run / "metrics.jsonl")
    assert abs(lines[-1][f"eval/{name}"] - lines[0][f"eval/{name}"]) <= drift


def test_the_run_folder(tmp_path):
    run = tmp_path / "run"
    lines = train(run, *SHORT, "--save_steps", "1", "--eval_steps", "1", "--save_total_limit", "1")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {p.name for p in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "completions.jsonl",
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


def logits_here_and_in_transformers(folder: Path, image, problem: str):
    processor = Processor(folder)
    prompt = processor.encode(problem, [image], ("a",))
    model = load_model(folder, torch.float32, "cpu")
    hidden = model(
        prompt.input_ids,
        prompt.position_ids,
        model.bounds([(len(prompt),)]),
        image_features(model, [prompt]),
    )
    peer = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        processor.chat_text(problem, 1).replace(
            "<|image_pad|>", "<|image_pad|>" * processor.image_tokens(*image.size)
        ),
        return_tensors="pt",
    )["input_ids"]
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)([image], return_tensors="pt")
    is_image = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        expected = peer(input_ids=ids, mm_token_type_ids=is_image, **pixels).logits[0]
    return hidden @ model.head_weight.T, expected


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
    with pytest.raises(ValueError, match="no run to continue"):
        train(tmp_path / "other", *SHORT, *again)
    assert len(train(run, *again, "--max_steps", "3")) == 4  # a longer run is no other run


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_branch(tmp_path):
    run = tmp_path / "run"
    train(run, *SHORT, "--max_steps", "3", "--save_steps", "1")
    first = ["--resume_from_checkpoint", str(run / "checkpoint-1"), "--save_total_limit", "1"]
    train(run, *first)
    names = {path.name[:20] for path in run.iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-3", "abandoned-checkpoint"}
    lines = train(run, "--resume_from_checkpoint", "auto", "--max_steps", "4")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_what_sampling_and_training_share(tmp_path):
    """Training log-probs are at the sampling temperature; the policy leaves its reference."""
    options = [*SHORT, "--max_steps", "4", "--temperature", "1.3", "--learning_rate", "2e-3"]
    lines = train(tmp_path / "run", *options)
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in lines[1:])
    assert lines[1]["kl"] == 0 and lines[-1]["kl"] > 1e-4
    rates = [line["learning_rate"] for line in lines[1:]]
    assert rates == pytest.approx([0, 2e-3, 2e-3 * 2 / 3, 2e-3 / 3])  # 5 % of 4 steps rise: one


def test_top_k_of_one_is_greedy(tmp_path):
    lines = train(tmp_path / "run", *SHORT, "--top_k", "1")
    assert lines[1]["frac_reward_zero_std"] == 1
    groups = read_lines(tmp_path / "run" / "completions.jsonl")
    assert len({(c["step"], c["prompt"], c["completion"]) for c in groups}) == 4
    lines = train(tmp_path / "nucleus", *SHORT, "--top_p", "0.01")
    assert lines[1]["frac_reward_zero_std"] == 1


def test_ctrl_c_keeps_the_run_so_far(tmp_path, monkeypatch):
    run, judge, calls = tmp_path / "run", train_cls.judge, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 6 + 2 + 1:  # in the second step, after the evaluation and the first
            os.kill(os.getpid(), signal.SIGINT)
        return judge(*args)

    monkeypatch.setattr(train_cls, "judge", interrupting)
    argv = ["--output_dir", str(run), *SHORT, "--max_steps", "3"]
    assert train_cls.main(argv) == 130
    assert (run / "checkpoint-1").is_dir() and not (run / "final").exists()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1]
    resumed = train(run, "--resume_from_checkpoint", "auto")
    assert timeless(resumed) == timeless(train(tmp_path / "whole", *argv[2:]))


VARIANTS = {
    "no reference": ["--beta", "0"],
    "k1": ["--kl_estimator", "k1", "--loss_type", "grpo"],
    "two updates": ["--num_iterations", "2", "--loss_type", "dr_grpo", "--scale_rewards", "none"],
    "bf16": ["--bf16", "true"],
    "checkpointing": ["--gradient_checkpointing", "true"],
    "batch": ["--scale_rewards", "batch"],
    "sampling": ["--top_k", "20", "--top_p", "0.9", "--temperature", "1.2"],
    "small packs": ["--tokens_per_pack", "1"],
    "tracker": ["--report_to", "tensorboard"],
    "pixels": ["--min_pixels", "12544", "--max_pixels", "12544"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flag_does_something(tmp_path, name, monkeypatch, plain):
    loads = []
    load = dist.load_weights
    monkeypatch.setattr(dist, "load_weights", lambda *a: loads.append(a) or load(*a))
    lines = train(tmp_path / "run", *SHORT, *VARIANTS[name])
    assert len(lines) == 3 and all(line["grad_norm"] >= 0 for line in lines[1:])
    norms = [[line["grad_norm"] for line in run[1:]] for run in (lines, plain)]
    if name in ("small packs", "checkpointing", "tracker"):
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    elif name != "no reference":  # which the policy has hardly left in two steps
        assert norms[0] != pytest.approx(norms[1], rel=1e-3)
    assert ("kl" in lines[1]) == (len(loads) == 2) == (name != "no reference")
    if name == "tracker":
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))


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

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = ["--run_name", "poppy", "--logging_steps", "1"]
    lines = train(tmp_path / "run", *SHORT, "--report_to", "wandb", *options)
    assert told[0] == ("poppy", str(tmp_path / "run"), 0, None) and told[-1] == "end"
    assert [step for step, _ in told[1:-1]] == [0, 1, 2]
    for (_, metrics), line in zip(told[1:-1], lines, strict=True):
        assert metrics == {name: value for name, value in line.items() if name != "step"}
    del told[:]
    shutil.rmtree(tmp_path / "run" / "final")
    train(tmp_path / "run", "--resume_from_checkpoint", "auto", "--max_steps", "3")
    assert told[0][3] == "r1"  # goes on in the same run


def test_two_updates_move_the_ratio(tmp_path):
    """The second update of a rollout is off-policy: at a rate this high some tokens are clipped."""
    argv = [*SHORT, "--num_iterations", "2", "--learning_rate", "5e-3", "--warmup_ratio", "0"]
    lines = train(tmp_path / "run", *argv, "--num_generations", "8")
    assert max(line["clip_ratio/low_mean"] + line["clip_ratio/high_mean"] for line in lines[1:]) > 0


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert train_cls.main(["--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("1.4 M parameters", "480 rows", "180 held out", "100 (1.67 epochs)", "GB a rank"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_not_finite_is_named(tmp_path, monkeypatch):
    score = train_cls.score

    def broken(completion, example, *rest):
        nan = float("nan") if completion != perfect(example.solution) else 1.0
        return {**score(completion, example, *rest), "format": nan}

    monkeypatch.setattr(train_cls, "score", broken)
    with pytest.raises(ValueError, match=r"(?s)'format' is nan.*completion:\n.*<think>"):
        train(tmp_path / "run", *SHORT)


def detection_set(
    folder: Path, solution="<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>"
) -> Path:
    rows("train", 1)[0]["image"].save(folder / "a.png")
    table = [{"image": "a.png", "problem": "Find it.", "solution": solution}]
    (folder / "train.json").write_text(json.dumps(table))
    return folder


def test_the_other_script_s_data_is_refused_before_a_weight_is_loaded(tmp_path, monkeypatch):
    """The report that the project exists for, both ways round, and a mixture."""
    flowers = tmp_path / "flowers"
    boxes = tmp_path / "boxes"
    for folder in (flowers, boxes):
        folder.mkdir()
        detection_set(folder)
    table = json.loads((boxes / "train.json").read_text())
    plain = [{**table[0], "solution": "<answer>garden phlox</answer>"}]
    (flowers / "train.json").write_text(json.dumps(plain))
    for script, other, folder in (
        (train_cls, "train_det.py", boxes),
        (train_det, "train_cls.py", flowers),
    ):
        monkeypatch.setattr(dist, "load_weights", lambda *a: pytest.fail("weights were loaded"))
        argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(folder)]
        with pytest.raises(ValueError) as caught:
            script.main([*argv, "--beta", "0.1"])
        message = str(caught.value)
        assert "row 0" in message and "a.png" in message
        assert f"torchrun {other} {' '.join(argv)} --beta 0.1" in message
        own = {train_cls: ["--answer_match=exact"], train_det: ["--iou_threshold", "0.6"]}[script]
        with pytest.raises(ValueError) as caught:
            script.main([*argv, *own, "--beta", "0.1"])
        message, flag = str(caught.value), own[0].split("=")[0]
        assert f"(without {flag}, which it does not know)" in message
        assert f"torchrun {other} {' '.join(argv)} --beta 0.1" in message


@pytest.mark.parametrize("script", [train_cls, train_det])
@pytest.mark.parametrize(
    "kinds", [("class", "boxes"), ("class", "grounding"), ("boxes", "grounding")], ids="-".join
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_mixture_names_the_first_row_of_each_kind(script, kinds, turned, tmp_path):
    detection_set(tmp_path)
    (row,) = json.loads((tmp_path / "train.json").read_text())[:1]
    solutions = {
        "class": "<answer>garden phlox</answer>",
        "boxes": row["solution"],
        "grounding": "<answer>(10,10),(200,300)</answer>",
    }
    one, two = reversed(kinds) if turned else kinds
    table = [{**row, "solution": solutions[kind]} for kind in (one, one, two)]
    (tmp_path / "train.json").write_text(json.dumps(table))
    with pytest.raises(ValueError) as caught:
        script.main(["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path)])
    message = str(caught.value)
    assert "2 kinds: row 0 (" in message and f", a {one} solution (2 rows); row 2 (" in message
    assert f", a {two} solution (1 rows)" in message and "torchrun" not in message


def test_a_solution_that_earns_less_than_everything_is_named(tmp_path):
    solution = "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 0.5}]</answer>"
    detection_set(tmp_path, solution)
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path)]
    with pytest.raises(ValueError, match=r"row 0 .*earns confidence 0\.500 of 1"):
        train_det.main(argv)


def test_task_free_stages_are_the_same_to_the_letter():
    """The loop stands in both scripts so that each can be read alone; it must not drift apart."""
    for name in ("judge", "checked", "encode", "answers", "main", "save"):
        one, two = (inspect.getsource(getattr(s, name)) for s in (train_cls, train_det))
        assert one == two, name


def test_long_prompts_are_named_and_never_cut(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 .*84 tokens.*--max_prompt_length \(50\)"):
        train(tmp_path / "run", *SHORT, "--max_prompt_length", "50")


def test_weights_per_term(tmp_path):
    with pytest.raises(ValueError, match="takes 2 numbers: accuracy, format"):
        train(tmp_path / "run", *SHORT, "--reward_weights", "1")
    lines = train(tmp_path / "run", *SHORT, "--reward_weights", "1", "0.25")
    expected = lines[1]["rewards/accuracy/mean"] + 0.25 * lines[1]["rewards/format/mean"]
    assert lines[1]["reward"] == pytest.approx(expected)


def test_aliases_are_paid_for(tmp_path):
    names = {s.name: [s.latin] for s in SPECIES}
    (tmp_path / "aliases.json").write_text(json.dumps(names))
    lines = train(tmp_path / "run", *SHORT, "--aliases", str(tmp_path / "aliases.json"))
    assert lines[0]["eval/accuracy"] > 0.8


def genuine_checkpoint(folder: Path) -> Path:
    """Random weights, tiny, with Qwen2's own vocabulary of 151,936 entries."""
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw |= {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "eos_token_id": 151645}
    raw |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    raw["vision_config"] |= {"hidden_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1}
    model = QwenVL(parse_config(raw, "test")).initialize(torch.Generator().manual_seed(0))
    save_model(dict(model.named_parameters()), model, folder, SHARED / "qwen2_tokenizer")
    return folder


TINY_RUN = ["--max_steps", "3", "--prompts_per_step", "2", "--num_generations", "2"]
TINY_RUN += ["--max_completion_length", "6", "--max_pixels", "50176", "--eval_samples", "2"]


def torchrun(ranks: int, *argv: str):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, f"--master_port={random.randrange(20000, 60000)}", "train_cls.py", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_torchrun_and_user_errors(tmp_path):
    out = torchrun(1, "--output_dir", str(tmp_path / "run"), *SHORT, "--beta", "-1")
    assert out.returncode != 0 and "exitcode: 2" in " ".join(out.stderr.split())
    assert "error: --beta is -1.0; it must be at least 0" in out.stderr
    out = subprocess.run(
        [sys.executable, "train_cls.py", "--betta"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 2 and "did you mean --beta?" in out.stderr


def test_real_photographs_with_the_genuine_vocabulary(tmp_path):
    """ViRFT data in both forms, Qwen2's 151,936 entries, random weights, three steps."""
    if not SHARED.exists():
        pytest.skip("the shared photographs are not here")
    model = ["--model_name_or_path", str(genuine_checkpoint(tmp_path / "model")), *TINY_RUN]
    metrics = []
    for form in ("hf", ""):
        run = tmp_path / f"run{form}"
        metrics.append(train(run, "--dataset_name", str(SHARED / "clothing" / form), *model))
        assert len(metrics[-1]) == 4
    assert timeless(metrics[0]) == timeless(metrics[1])
    example = train_cls.load(str(SHARED / "clothing"), "test")[0]
    image = train_cls.open_image(example.images[0]).resize((224, 224))
    ours, theirs = logits_here_and_in_transformers(run / "final", image, example.problem)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_real_photographs_through_the_detection_script(tmp_path):
    """The playing cards for three steps, and their true boxes as predictions: AP 1."""
    if not SHARED.exists():
        pytest.skip("the shared photographs are not here")
    argv = ["--model_name_or_path", str(genuine_checkpoint(tmp_path / "model")), *TINY_RUN]
    argv += ["--dataset_name", str(SHARED / "cards"), "--output_dir", str(tmp_path / "run")]
    assert train_det.main([*argv, "--max_prompt_length", "2048"]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 4 and lines[-1]["eval/AP50"] == 0
    assert json.loads((tmp_path / "run" / "coco-3.json").read_text()) == []
    examples = train_cls.load(str(SHARED / "cards"), "test")
    perfect_records(examples, "thousandths", ("ace playing card", "nine playing card"))


def perfect_records(examples, frame: str, some_names) -> list[dict]:
    """Checks that the true solutions as predictions have AP 1 for every category."""
    records = [{"answer": train_det.truth(example)} for example in examples]
    task = {"kind": "boxes", "frame": frame}
    metrics, results = train_det.average_precision(records, examples, task)
    assert metrics["eval/AP"] == metrics["eval/AP50"] == pytest.approx(1)
    assert {f"eval/AP50/{name}" for name in some_names} <= metrics.keys()
    worse, _ = train_det.average_precision(
        [{"answer": None} if i % 2 else r for i, r in enumerate(records)], examples, task
    )
    assert worse["eval/AP50"] < 0.9
    return results


def save_turned(upright: Image.Image, orientation: int, path: Path) -> None:
    """The image as a camera held so would store it, with the EXIF tag that turns it back."""
    turns = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}
    turns |= {8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    stored.save(path, exif=exif)


def test_average_precision_in_pixels_and_thousandths(tmp_path):
    """A box survives resizing and EXIF rotation: it counts the upright image's own pixels."""
    table, size = [], (300, 200)
    for number, orientation in enumerate((1, 6, 3, 8)):
        upright = Image.new("RGB", size, (40 * number, 90, 20))
        save_turned(upright, orientation, tmp_path / f"{number}.png")
        box = [30, 20, 240, 190]
        row = {"image": f"{number}.png", "problem": "Detect category 'ace'."}
        row["solution"] = f"<answer>[{{'Position': {box}, 'Confidence': 1.0}}]</answer>"
        table.append(row)
    (tmp_path / "train.json").write_text(json.dumps(table))
    examples = train_det.load(str(tmp_path), "train")
    results = perfect_records(examples, "pixels", ["ace"])
    assert [result["bbox"] for result in results] == [[30, 20, 210, 170]] * 4
    results = perfect_records(examples, "thousandths", ["ace"])
    assert results[0]["bbox"] == pytest.approx([9, 4, 63, 34])
    config = train_det.Config(dataset_name="d")
    assert train_det.prepare(config, examples, "train", [])["frame"] == "thousandths"
    far = replace(examples[0], solution=examples[0].solution.replace("240", "1240"))
    assert train_det.prepare(config, [far], "train", [])["frame"] == "pixels"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1600, 200), (90, 110)])
def test_the_model_sees_an_object_where_its_box_says(size, orientation, tmp_path):
    """What the patches show after EXIF rotation and resizing, against the box in either frame."""
    width, height = size
    box = [width * 0.3, height * 0.25, width * 0.8, height * 0.6]
    upright = Image.new("RGB", size, "black")
    upright.paste("white", tuple(round(edge) for edge in box))
    save_turned(upright, orientation, tmp_path / "0.png")
    row = {"image": "0.png", "problem": "Detect category 'ace'."}
    row["solution"] = f"<answer>[{{'Position': {box}, 'Confidence': 1.0}}]</answer>"
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (example,) = train_det.load(str(tmp_path), "train")

    processor = train_det.Processor(CHECKPOINT, max_pixels=100 * 28 * 28)
    prompt = train_det.encode([example], processor)[0]
    _, rows, columns = prompt.image_grid_thw[0].tolist()
    patches = prompt.pixel_values.view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, 0, :, :]
    seen = patches.permute(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14) > 0.3
    down, across = seen.nonzero().T
    for frame in ("pixels", "thousandths"):
        wide, high = train_det.frame_of(example, {"frame": frame})
        found = (across.min(), down.min(), across.max() + 1, down.max() + 1)
        scale = (wide / (columns * 14), high / (rows * 14)) * 2
        found = [float(edge) * factor for edge, factor in zip(found, scale, strict=True)]
        expected = box if frame == "pixels" else [100 * n for n in (3, 2.5, 8, 6)]
        for edge, wanted, factor in zip(found, expected, scale, strict=True):
            assert edge == pytest.approx(wanted, abs=1.5 * factor + wide / width)
        text = boxes_text(found)
        truth = boxes_text(expected)
        assert train_det.iou_reward(text, truth, frame=(wide, high)) > 0.93


def boxes_text(box) -> str:
    position = [round(float(edge), 2) for edge in box]
    return f"<think>a</think><answer>[{{'Position': {position}, 'Confidence': 1.0}}]</answer>"


def test_grounding_data_trains_with_its_own_reward(tmp_path):
    rows("train", 1)[0]["image"].save(tmp_path / "a.png")
    row = {
        "image": "a.png",
        "problem": "Where is it?",
        "solution": "<answer>(1,2),(30,40)</answer>",
    }
    (tmp_path / "train.json").write_text(json.dumps([row]))
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    assert (
        train_det.main([*argv, "--output_dir", str(tmp_path / "run"), "--learning_rate", "0"]) == 0
    )
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert "rewards/giou/mean" in lines[-1] and "rewards/iou/mean" not in lines[-1]


def test_a_flat_reward_is_explained_while_the_run_goes_on(tmp_path, capsys):
    """The drawn scenes, which the flowers' model cannot answer: it says flowers, and why 0."""
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:scenes", *SHORT]
    argv += ["--max_steps", "3", "--diagnose_after", "2", "--output_dir", str(tmp_path / "run")]
    assert train_det.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("diagnosis: iou has been 0, its minimum") == 1
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("diagnosis/iou/at_minimum") for line in lines] == [None, None, 1, None]
    text = (tmp_path / "run" / "diagnosis.txt").read_text()
    assert "not a list of boxes" in text and "most frequent wrong answers" in text


def test_latin_names_are_found_and_shown_beside_the_classes(tmp_path, capsys):
    """Flowers known by their Latin names, sampled so coldly that no other name is said."""
    table = []
    for number, row in enumerate(rows("train", 12)):
        if not any(name in row["solution"] for name in ("poppy", "sunfl", "butterc", "flax")):
            row["image"].save(tmp_path / f"{number}.png")
            table.append(row | {"image": f"{number}.png"})
    (tmp_path / "train.json").write_text(json.dumps(table))
    options = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    options += ["--temperature", "0.1", "--diagnose_after", "2", "--prompts_per_step", "8"]
    lines = train(tmp_path / "run", *options)
    assert [line["rewards/accuracy/mean"] for line in lines] == [0, 0]
    assert lines[1]["diagnosis/accuracy/at_minimum"] == 1
    said = capsys.readouterr().out
    assert "accuracy has been 0, its minimum, in every completion since step 1" in said
    assert "wrong class 100%" in said and "for `garden phlox`, " in said
    assert "if these are synonyms, pass --aliases" in said
    pairs = re.findall(r"^  `([^`]+)` for `([^`]+)`, \d+ times", said, flags=re.MULTILINE)
    assert len(pairs) >= 5 and set(pairs) <= {(s.latin, s.name) for s in SPECIES}


def test_boxes_in_another_frame_are_found_with_what_they_would_have_earned():
    """A detector that answers in pixels of its image: the hint names the reading and its IoU."""
    train = train_det.load("demo:scenes", "train")
    chosen = [row for row in train if "Position" in row.solution][:4]
    records = []
    for row in chosen:
        shrunk = [
            {
                "Position": [v * 112 / 1000 for v in (b.x1, b.y1, b.x2, b.y2)],
                "Confidence": 0.5,
            }
            for b in read_boxes(row.solution)
        ]
        text = f"<think>a</think><answer>{shrunk}</answer>"
        records.append([{"completion": text, "row": row.index}])
    config = train_det.Config(dataset_name="d")
    task = {"kind": "boxes", "frame": "thousandths"}
    first, *_ = train_det.hints(records, train, config, task)
    assert first == (
        "read as pixels of the image, the 4 answers with boxes of this step would have earned an "
        "IoU reward of 1.00 in place of 0.00"
    )
    true = [[{"completion": perfect(row.solution), "row": row.index}] for row in chosen]
    assert train_det.hints(true, train, config, task) == []


def test_a_resumed_run_says_its_diagnosis_once(tmp_path):
    """What was said after the checkpoint is said again, and stands in diagnosis.txt once."""
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:scenes", *SHORT]
    argv += ["--max_steps", "3", "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert train_det.main([*argv, "--diagnose_after", "2"]) == 0
    said = (tmp_path / "run" / "diagnosis.txt").read_text()
    resume = str(tmp_path / "run" / "checkpoint-1")
    output = ["--output_dir", str(tmp_path / "run")]
    assert train_det.main(["--resume_from_checkpoint", resume, *output]) == 0
    assert (tmp_path / "run" / "diagnosis.txt").read_text() == said
    assert said.count("iou has been 0, its minimum") == 1


def test_dynamic_sampling_keeps_groups_that_teach(tmp_path):
    options = ["--dynamic_sampling", "--max_sampling_rounds", "6", "--seed", "3"]
    lines = train(tmp_path / "run", *SHORT, *options)
    assert all(line["frac_reward_zero_std"] == 0 for line in lines[1:])
    assert any(line["sampling/prompts"] > 2 for line in lines[1:]), "nothing replaced: blunt"
    assert all(line["sampling/prompts_kept"] == 2 for line in lines[1:])
    kept = sum(c["tokens"] for c in read_lines(tmp_path / "run" / "completions.jsonl"))
    assert lines[-1]["num_tokens"] > kept, "what was drawn and not kept counts too"
    drawn = sum(line["sampling/prompts"] for line in lines[1:])
    assert lines[-1]["epoch"] == pytest.approx(drawn / 480)


def test_flags_that_could_do_nothing_are_refused(tmp_path):
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(detection_set(tmp_path))]
    with pytest.raises(ValueError, match="--eval_steps: .* has no held-out split"):
        train_det.main([*argv, "--eval_steps", "2"])
    with pytest.raises(ValueError, match="--iou_threshold is 2.0; it must be .* below 1"):
        train_det.main([*argv, "--iou_threshold", "2"])


def test_a_frozen_vision_tower_encodes_each_image_once_and_stays(tmp_path, monkeypatch):
    calls, encode = [], QwenVL.encode_images
    monkeypatch.setattr(
        QwenVL, "encode_images", lambda self, *a: calls.append(len(a[1])) or encode(self, *a)
    )
    options = [*SHORT, "--tokens_per_pack", "1", "--num_iterations", "2", "--eval_samples", "1"]
    lines = train(tmp_path / "frozen", *options, "--freeze_vision")
    assert calls == [1, 1, 2, 2, 1], "the first check, held out, two steps of two images, held out"
    moving = train(tmp_path / "moving", *options)
    assert lines[1]["reward"] == moving[1]["reward"], "the first rollout is the same"
    assert 0 < lines[1]["grad_norm"] < moving[1]["grad_norm"]
    before, after = (
        load_file(f / "model.safetensors") for f in (CHECKPOINT, tmp_path / "frozen/final")
    )
    for name, weight in before.items():
        assert torch.equal(weight.float(), after[name]) == name.startswith("visual."), name


def test_without_a_kl_term_dead_groups_are_not_scored(tmp_path, monkeypatch):
    packed, make_packs = [], train_cls.make_packs
    monkeypatch.setattr(
        train_cls,
        "make_packs",
        lambda groups, n: packed.append(len(groups)) or make_packs(groups, n),
    )
    options = [*SHORT, "--prompts_per_step", "4", "--seed", "1"]
    lines = train(tmp_path / "run", *options, "--beta", "0")
    alive = [round(4 * (1 - line["frac_reward_zero_std"])) for line in lines[1:]]
    assert packed == alive and any(0 < n < 4 for n in alive), f"{alive}: a blunt test"
    packed.clear()
    same = train(tmp_path / "kl", *options, "--beta", "1e-12")
    assert packed == [4, 4]
    assert lines[1]["grad_norm"] == pytest.approx(same[1]["grad_norm"], rel=1e-4)

    monkeypatch.setattr(train_cls, "score", lambda *_: {"accuracy": 1.0, "format": 1.0})
    lines = train(tmp_path / "dead", *options, "--beta", "0")
    assert all(line["grad_norm"] == 0 and "entropy" not in line for line in lines[1:])
    assert torch.equal(
        *(
            load_file(f / "model.safetensors")["model.norm.weight"].float()
            for f in (CHECKPOINT, tmp_path / "dead/final")
        )
    )


def test_truncated_completions_can_be_left_out(tmp_path):
    """At this length some are truncated: what is left is another gradient."""
    options = [*SHORT, "--max_completion_length", "28", "--num_generations", "8"]
    plain = train(tmp_path / "plain", *options)
    masked = train(tmp_path / "masked", *options, "--mask_truncated_completions")
    assert 0 < masked[1]["completions/clipped_ratio"] == plain[1]["completions/clipped_ratio"] < 1
    assert masked[1]["grad_norm"] != plain[1]["grad_norm"]
    buffered = train(tmp_path / "buffer", *SHORT, "--overlong_buffer", "20")
    parts = buffered[1]["rewards/accuracy/mean"] + buffered[1]["rewards/format/mean"]
    assert buffered[1]["reward"] < parts
