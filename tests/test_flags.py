"""What flags do to a run."""

import json
import re
import statistics

import pytest
import torch
from safetensors.torch import load_file

import grpo.engine.load
import train_cls
import train_det
from data.flowers import SPECIES
from models.qwen_vl import QwenVL
from tests.runs import CHECKPOINT, SHORT, detection_set, read_lines, read_steps, timeless, train

pytestmark = pytest.mark.slow


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
    bonus = ["--top_p", "0.01", "--beta", "0", "--entropy_coef", "0.1"]
    lines = train(tmp_path / "nucleus", *SHORT, *bonus)
    assert lines[1]["frac_reward_zero_std"] == 1
    assert lines[1]["grad_norm"] > 0, "the bonus trains groups of equal rewards too"


VARIANTS = {
    "no reference": ["--beta", "0"],
    "k1": ["--kl_estimator", "k1", "--loss_type", "grpo"],
    "two updates": ["--num_iterations", "2", "--loss_type", "dr_grpo", "--scale_rewards", "none"],
    "CISPO, RLOO": [
        *("--loss_type", "cispo", "--epsilon_high", "5", "--num_iterations", "2"),
        *("--advantage_estimator", "rloo", "--scale_rewards", "none"),
    ],
    "GDPO": [
        *("--multi_objective_aggregation", "normalize_then_sum", "--reward_weights", "1", "0.25"),
        *("--prompts_per_step", "4"),
    ],
    "top entropy": ["--top_entropy_quantile", "0.01"],
    "bf16": ["--bf16", "true"],
    "checkpointing": ["--gradient_checkpointing", "true"],
    "batch": ["--scale_rewards", "batch"],
    "sampling": [
        *("--top_k", "20", "--top_p", "0.9", "--min_p", "0.02", "--temperature", "1.2"),
        *("--stop", "</answer>", "\n\n"),
    ],
    "small packs": ["--tokens_per_pack", "1"],
    "tracker": ["--report_to", "tensorboard"],
    "pixels": ["--min_pixels", "12544", "--max_pixels", "12544"],
}


def leave_one_out(step: list[list[dict]]) -> list[list[float]]:
    return [
        [c["reward"] - sum(o["reward"] for o in g if o is not c) / (len(g) - 1) for c in g]
        for g in step
    ]


def decoupled(step: list[list[dict]]) -> list[list[float]]:
    """GDPO with the weights 1 and 0.25, in plain numbers."""
    summed = []
    for group in step:
        parts = []
        for term, weight in (("accuracy", 1.0), ("format", 0.25)):
            earned = [c["rewards"][term] for c in group]
            mean, scale = statistics.mean(earned), statistics.stdev(earned) + 1e-4
            parts.append([weight * (r - mean) / scale for r in earned])
        summed.append([sum(pair) for pair in zip(*parts, strict=True)])
    scale = statistics.stdev([a for group in summed for a in group]) + 1e-4
    return [[a / scale for a in group] for group in summed]


ADVANTAGES = {"CISPO, RLOO": leave_one_out, "GDPO": decoupled}


def check_advantages(completions: list[dict], expected) -> None:
    """What the run's file says, against the rewards beside it."""
    steps: dict = {}
    for c in completions:
        steps.setdefault(c["step"], {}).setdefault(c["prompt"], []).append(c)
    for groups in steps.values():
        groups = list(groups.values())
        for group, row in zip(groups, expected(groups), strict=True):
            assert [c["advantage"] for c in group] == pytest.approx(row, abs=1e-6)
    assert any(c["advantage"] for c in completions), "a blunt test"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flag_does_something(tmp_path, name, monkeypatch, plain):
    loads = []
    load = grpo.engine.load.load_weights
    monkeypatch.setattr(grpo.engine.load, "load_weights", lambda *a: loads.append(a) or load(*a))
    lines = train(tmp_path / "run", *SHORT, *VARIANTS[name])
    assert len(lines) == 3 and all(line["grad_norm"] >= 0 for line in lines[1:])
    norms = [[line["grad_norm"] for line in run[1:]] for run in (lines, read_steps(plain))]
    if name in ("small packs", "checkpointing", "tracker"):
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    elif name != "no reference":  # which the policy has hardly left in two steps
        assert norms[0] != pytest.approx(norms[1], rel=1e-3)
    if name in ADVANTAGES:
        check_advantages(read_lines(tmp_path / "run" / "completions.jsonl"), ADVANTAGES[name])
    assert ("kl" in lines[1]) == (len(loads) == 2) == (name != "no reference")
    if name == "sampling":
        completions = read_lines(tmp_path / "run" / "completions.jsonl")
        ended = [c for c in completions if "</answer>" in c["completion"]]
        assert ended and all(c["completion"].endswith("</answer>") for c in ended)
        assert not any(c["truncated"] for c in ended)
        assert all(c["tokens"] == 40 for c in completions if c["truncated"])
    if name == "tracker":
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_what_is_said_to_have_no_effect_has_none(tmp_path, plain, capsys):
    """Metrics and completions are those of the run without these flags, to the byte. (--delta has a
    count of its own in the log: 0.)"""
    argv = ["--epsilon", "0.1", "--epsilon_high", "0.28", "--num_train_epochs", "3"]
    argv += ["--sapo_temperature_pos", "2", "--sapo_temperature_neg", "2", "--run_name", "x"]
    argv += ["--max_sampling_rounds", "2", "--lora_r", "8", "--lora_alpha", "8", "--use_rslora"]
    argv += ["--lora_target_modules", "q_proj", "--timeout", "9", "--shard_size", "8"]
    argv += ["--reshard_after_forward", "false"]
    train(tmp_path / "run", *SHORT, *argv)
    said = re.findall(r"^flags     --(\w+) has no effect", capsys.readouterr().out, re.MULTILINE)
    assert sorted(said) == sorted(word[2:] for word in argv if word.startswith("--"))
    metrics = [timeless(read_lines(run / "metrics.jsonl")) for run in (plain, tmp_path / "run")]
    assert metrics[0] == metrics[1]
    files = [run / "completions.jsonl" for run in (plain, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_updates_move_the_ratio(tmp_path):
    """The second update of a rollout is off-policy: at a rate this high some tokens are clipped."""
    argv = [*SHORT, "--num_iterations", "2", "--learning_rate", "5e-3", "--warmup_ratio", "0"]
    lines = train(tmp_path / "run", *argv, "--num_generations", "8")
    assert max(line["clip_ratio/low_mean"] + line["clip_ratio/high_mean"] for line in lines[1:]) > 0


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


def test_the_vision_tower_has_its_own_rate(tmp_path):
    """It alone is trained: all else ends as it began."""
    options = [*SHORT, "--learning_rate", "0", "--vision_learning_rate", "1e-2"]
    lines = train(tmp_path / "run", *options, "--max_steps", "1", "--warmup_ratio", "0")
    assert (lines[1]["learning_rate"], lines[1]["learning_rate/vision"]) == (0, 1e-2)
    before, after = (
        load_file(f / "model.safetensors") for f in (CHECKPOINT, tmp_path / "run/final")
    )
    for name, weight in before.items():
        assert torch.equal(weight.float(), after[name]) != name.startswith("visual."), name


def test_without_a_kl_term_dead_groups_are_not_scored(tmp_path, monkeypatch):
    packed, make_packs = [], train_cls.make_packs
    monkeypatch.setattr(
        train_cls,
        "make_packs",
        lambda groups, *a: packed.append(len(groups)) or make_packs(groups, *a),
    )
    options = [*SHORT, "--prompts_per_step", "4", "--seed", "1"]
    lines = train(tmp_path / "run", *options, "--beta", "0")
    alive = [round(4 * (1 - line["frac_reward_zero_std"])) for line in lines[1:]]
    counts = [count for n in alive for count in (n, 0, n)]  # no old log-probs; trained
    assert packed == counts and any(0 < n < 4 for n in alive), f"{alive}: a blunt test"
    packed.clear()
    same = train(tmp_path / "kl", *options, "--beta", "1e-12")
    assert packed == [4, 0, 4] * 2
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
