"""The training script, run as its users run it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import train_cls
from data.flowers import SPECIES, rows
from models.config import parse_config
from models.generate import image_features
from models.load import load_model, save_model
from models.processor import Processor
from models.qwen_vl import QwenVL
from rewards.cls import accuracy_reward

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
    return sum(accuracy_reward(a["completion"], a["solution"]) for a in answers) / len(answers)


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


def test_shuffled_rewards_teach_nothing(tmp_path, monkeypatch):
    """The same steps, each reward given to a random completion of the step before."""
    true_score, pool, chance = train_cls.score, [{"accuracy": 0.0, "format": 1.0}], random.Random(0)

    def shuffled(completion, example, config, aliases):
        pool.append(true_score(completion, example, config, aliases))
        return pool[chance.randrange(len(pool))]

    monkeypatch.setattr(train_cls, "score", shuffled)
    train(tmp_path / "run", "--max_steps", "25", "--eval_samples", "96")
    before, after = (held_out_accuracy(tmp_path / "run", step) for step in (0, 25))
    assert abs(after - before) <= 0.1


def test_the_run_folder(tmp_path):
    run = tmp_path / "run"
    lines = train(run, *SHORT, "--save_steps", "1", "--eval_steps", "1", "--save_total_limit", "1")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {p.name for p in run.iterdir()} == {
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
            assert len({(c["row"], c["solution"]) for c in group}) == 1
            assert abs(sum(c["advantage"] for c in group)) < 1e-6
            for c in group:
                assert c["reward"] == c["rewards"]["accuracy"] + c["rewards"]["format"]
                assert c["rewards"]["accuracy"] == accuracy_reward(c["completion"], c["solution"])
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


def test_ctrl_c_keeps_the_run_so_far(tmp_path, monkeypatch):
    run, score, calls = tmp_path / "run", train_cls.score, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 6 + 8 + 3:  # in the second step, after the evaluation and the first
            os.kill(os.getpid(), signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(train_cls, "score", interrupting)
    argv = ["--output_dir", str(run), *SHORT, "--max_steps", "3"]
    assert train_cls.main(argv) == 130
    assert (run / "checkpoint-2").is_dir() and not (run / "final").exists()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2]
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
    monkeypatch.setattr(train_cls, "load_model", lambda *a: loads.append(a) or load_model(*a))
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
    monkeypatch.setattr(train_cls, "score", lambda *a: {**score(*a), "format": float("nan")})
    with pytest.raises(ValueError, match=r"(?s)'format' is nan.*completion:\n.*<think>"):
        train(tmp_path / "run", *SHORT)


def detection_set(folder: Path) -> Path:
    rows("train", 1)[0]["image"].save(folder / "a.png")
    solution = "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>"
    table = [{"image": "a.png", "problem": "Find it.", "solution": solution}]
    (folder / "train.json").write_text(json.dumps(table))
    return folder


def test_detection_data_is_refused_before_a_weight_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cls, "load_model", lambda *a: pytest.fail("weights were loaded"))
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(detection_set(tmp_path))]
    with pytest.raises(ValueError, match=r"row 0 .*a\.png.*detection.*train_det\.py"):
        train_cls.main(argv)


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


def test_two_ranks_compute_what_one_computes(tmp_path):
    """Also with fewer prompts than ranks: one of the two then has nothing to do."""
    for prompts, updates in (("3", "2"), ("1", "1")):
        options = [*SHORT, "--prompts_per_step", prompts, "--num_iterations", updates]
        one = train(tmp_path / f"one{prompts}", *options)
        out = torchrun(2, "--output_dir", str(tmp_path / f"two{prompts}"), *options)
        assert out.returncode == 0, out.stderr
        two = read_lines(tmp_path / f"two{prompts}" / "metrics.jsonl")
        for a, b in zip(timeless(one), timeless(two), strict=True):
            for name in a:
                close = pytest.approx(a[name], rel=2e-3, abs=1e-5)
                assert name == "sampling/logp_difference_max" or b[name] == close, name
        texts = [
            [c["completion"] for c in read_lines(tmp_path / f"{n}{prompts}/completions.jsonl")]
            for n in ("one", "two")
        ]
        assert texts[0] == texts[1]


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
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    raw |= {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    raw |= {"image_token_id": 151655, "video_token_id": 151656, "eos_token_id": 151645}
    raw |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    raw["vision_config"] |= {"hidden_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 1}
    folder = tmp_path / "model"
    model = QwenVL(parse_config(raw, "test")).initialize(torch.Generator().manual_seed(0))
    weights = dict(model.named_parameters())
    save_model(weights, model, folder, SHARED / "qwen2_tokenizer", torch.float32)
    argv = ["--model_name_or_path", str(folder), "--max_steps", "3", "--prompts_per_step", "2"]
    argv += ["--num_generations", "2", "--max_completion_length", "6", "--max_pixels", "50176"]
    argv += ["--eval_samples", "2"]
    metrics = []
    for form in ("hf", ""):
        run = tmp_path / f"run{form}"
        metrics.append(train(run, "--dataset_name", str(SHARED / "clothing" / form), *argv))
        assert len(metrics[-1]) == 4
    example = train_cls.load(str(SHARED / "clothing"), "test")[0]
    image = train_cls.open_image(example.images[0]).resize((224, 224))
    ours, theirs = logits_here_and_in_transformers(run / "final", image, example.problem)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
