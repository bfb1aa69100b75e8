"""docs/change-the-loss.md: each diff applies, runs on the demo, and does what the page says."""

import math
import re
import shlex
import shutil
import subprocess

import pytest
import torch

import train_cls
from tests.runs import ROOT, SHORT, module_of, read_lines, read_steps, train
from tests.tiny import loss_flags, loss_tokens

PAGE = (ROOT / "docs" / "change-the-loss.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^    torchrun train_cls\.py (.*)$", PAGE, flags=re.MULTILINE)
FILES = ("train_cls.py", "grpo/loss.py")


@pytest.fixture(scope="module", params=range(4), ids=["reward", "advantage", "loss", "buffer"])
def changed(request, tmp_path_factory):
    """(which, a folder of sources with that diff applied, the flags of the page's command)."""
    folder = tmp_path_factory.mktemp("changed")
    for file in FILES:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    apply = ["git", "apply", "--verbose", "-"]
    subprocess.run(apply, input=DIFFS[request.param], cwd=folder, text=True, check=True)
    words = shlex.split(COMMANDS[request.param])
    given = dict(zip(words[::2], words[1::2], strict=True))
    flags = [
        w for k, v in given.items() if k not in ("--output_dir", "--max_steps") for w in (k, v)
    ]
    return request.param, folder, flags


def module(folder, file: str):
    """A changed source as a module of its own."""
    return module_of(folder / file)


def test_the_page_has_four_diffs_each_with_its_command():
    assert len(DIFFS) == len(COMMANDS) == 4


def test_each_change_does_on_the_demo_what_the_page_says(changed, tmp_path, monkeypatch, plain):
    which, folder, flags = changed
    script = module(folder, "train_cls.py")
    script.DEMO = train_cls.DEMO
    loss = module(folder, "grpo/loss.py")
    monkeypatch.setattr(script, "step_advantages", loss.step_advantages)
    trained = []

    def recorded(tokens, config):
        trained.append(tokens)
        return loss.policy_loss(tokens, config)

    monkeypatch.setattr(script, "policy_loss", recorded)
    flags += ["--warmup_ratio", "0"] if which == 3 else []  # else step 1 has the rate 0
    steps = train(tmp_path / "run", *SHORT, *flags, script=script)
    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    if which == 3:
        return replayed(trained, completions)
    [new_reward, positive_only, gmpo][which](steps, completions, flags, tmp_path, plain)


def new_reward(steps, completions, flags, tmp_path, plain) -> None:
    assert "eval/short" in steps[0] and "rewards/short/mean" not in read_steps(plain)[1]
    for step in (1, 2):
        paid = [c["rewards"]["short"] for c in completions if c["step"] == step]
        assert steps[step]["rewards/short/mean"] == pytest.approx(sum(paid) / len(paid))
    for c in completions:
        assert c["rewards"]["short"] == (len(c["completion"]) <= 90)
        assert c["reasons"].get("short") == (
            None if c["rewards"]["short"] else "over 90 characters"
        )
        assert c["reward"] == sum(c["rewards"].values())
    assert len({c["rewards"]["short"] for c in completions}) == 2, "all alike: a blunt test"


def positive_only(steps, completions, flags, tmp_path, plain) -> None:
    """The first step's completions are those of the unchanged run: only advantages differ."""
    before = [c for c in read_lines(plain / "completions.jsonl") if c["step"] == 1]
    after = [c for c in completions if c["step"] == 1]
    for a, b in zip(after, before, strict=True):
        assert a["completion"] == b["completion"]
        assert a["advantage"] == max(0.0, b["advantage"])
    assert any(b["advantage"] < 0 for b in before), "a blunt test"
    assert steps[1]["grad_norm"] != pytest.approx(read_steps(plain)[1]["grad_norm"], rel=1e-3)


def gmpo(steps, completions, flags, tmp_path, plain) -> None:
    """The formula itself is tested below; its count is logged under its name."""
    assert flags[:2] == ["--num_iterations", "2"] and steps[2]["grad_norm"] > 0
    assert 0 <= steps[2]["clip_ratio/gmpo_mean"] <= 1 and "clip_ratio/low_mean" not in steps[2]


def replayed(trained, completions) -> None:
    """Step 2 trains on the groups of step 1 again, whose old policy is that of step 1."""
    sampled = [sum(c["tokens"] for c in completions if c["step"] == step) for step in (1, 2)]
    first, second = [], []
    for tokens in trained:
        (second if sum(len(t.logps) for t in first) == sampled[0] else first).append(tokens)
    assert sum(len(t.logps) for t in second) == sum(sampled)
    moved = [
        torch.cat([(t.logps - t.old_logps).detach().abs() for t in step])
        for step in (first, second)
    ]
    assert moved[0].max() < 1e-4 < moved[1].max()
    assert (moved[1][: sampled[1]].max()) < 1e-4, "a step's own groups come first"


@pytest.mark.parametrize("changed", [2], indirect=True, ids=["loss"])
def test_gmpo_is_the_papers_formula(changed):
    """2507.20673: the geometric mean over a completion's tokens of the smaller surrogate's size,
    with the advantage's sign; in Python floats."""
    _, folder, flags = changed
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    epsilon, lengths = float(given["--epsilon"]), [7, 1, 12, 5, 8]
    torch.manual_seed(0)
    old = torch.randn(sum(lengths), dtype=torch.float64)
    noise = 0.5 * torch.randn(sum(lengths), dtype=torch.float64)
    advantages = [0.7, -1.2, -0.4, 1.5, 0.0]
    weights = [1 / (len(lengths) * n) for n in lengths]  # --loss_type grpo
    spread = [torch.tensor(x).double().repeat_interleave(torch.tensor(lengths)) for x in (
        advantages, weights)]  # fmt: skip

    def paper(x) -> float:
        total, start = 0.0, 0
        for n, a in zip(lengths, advantages, strict=True):
            product = 1.0
            for t in range(start, start + n):
                ratio = math.exp(x[t] - old[t].item())
                clipped = min(max(ratio, math.exp(-epsilon)), math.exp(epsilon))
                product *= abs(min(ratio * a, clipped * a))
            total -= product ** (1 / n) * ((a > 0) - (a < 0)) / len(lengths)
            start += n
        return total

    logps = (old + noise).requires_grad_()
    tokens = loss_tokens(logps, *spread, old_logps=old, lengths=lengths)
    level = given["--importance_sampling_level"]
    config = loss_flags(loss_type="grpo", epsilon=epsilon, importance_sampling_level=level)
    loss, sums = module(folder, "grpo/loss.py").policy_loss(tokens, config)
    loss.backward()
    x = logps.tolist()
    assert loss.item() == pytest.approx(paper(x))
    for t in range(len(x)):
        sides = [paper([*x[:t], x[t] + step, *x[t + 1 :]]) for step in (1e-6, -1e-6)]
        assert logps.grad[t].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-8)
    beyond = noise * spread[0].sign() > epsilon
    assert sums["clip_ratio/gmpo_mean"] == beyond.sum() > 0
