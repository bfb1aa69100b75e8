"""docs/change-the-loss.md: each diff applies, runs on the demo, and does what the page says."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import train_cls
from tests.runs import ROOT, SHORT, read_lines, read_steps, train

PAGE = (ROOT / "docs" / "change-the-loss.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^    torchrun train_cls\.py (.*)$", PAGE, flags=re.MULTILINE)
FILES = ("train_cls.py", "grpo/loss.py")


@pytest.fixture(scope="module", params=range(3), ids=["reward", "advantage", "loss"])
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
    name = "changed_" + file.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, folder / file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_the_page_has_three_diffs_each_with_its_command():
    assert len(DIFFS) == len(COMMANDS) == 3


def test_each_change_does_on_the_demo_what_the_page_says(changed, tmp_path, monkeypatch, plain):
    which, folder, flags = changed
    script = module(folder, "train_cls.py")
    script.DEMO = train_cls.DEMO
    loss = module(folder, "grpo/loss.py")
    monkeypatch.setattr(script, "group_advantages", loss.group_advantages)
    monkeypatch.setattr(script, "policy_loss", loss.policy_loss)
    steps = train(tmp_path / "run", *SHORT, *flags, script=script)
    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    [new_reward, leave_one_out, cispo][which](
        steps, completions, flags, tmp_path, read_steps(plain)
    )


def new_reward(steps, completions, flags, tmp_path, plain) -> None:
    assert "eval/short" in steps[0] and "rewards/short/mean" not in plain[1]
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


def leave_one_out(steps, completions, flags, tmp_path, plain) -> None:
    groups: dict = {}
    for c in completions:
        groups.setdefault((c["step"], c["prompt"]), []).append(c)
    for group in groups.values():
        for c in group:
            others = [o["reward"] for o in group if o is not c]
            expected = c["reward"] - sum(others) / len(others)
            assert c["advantage"] == pytest.approx(expected)
    assert any(c["advantage"] for c in completions)
    before = train(tmp_path / "before", *SHORT, *flags)
    factor = len(group) / (len(group) - 1)
    assert steps[1]["grad_norm"] == pytest.approx(factor * before[1]["grad_norm"], rel=1e-3)


def cispo(steps, completions, flags, tmp_path, plain) -> None:
    """With one update a rollout it is GRPO; the formula itself is tested below."""
    assert flags[:2] == ["--num_iterations", "2"] and steps[2]["grad_norm"] > 0
    script = sys.modules["changed_train_cls"]
    once = train(tmp_path / "once", *SHORT, script=script)
    for a, b in zip(once[1:], plain[1:], strict=True):
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("changed", [2], indirect=True, ids=["loss"])
def test_cispo_is_the_papers_formula(changed):
    """Against a loop in Python floats; tokens beyond the clip range keep their gradient."""
    _, folder, _ = changed
    torch.manual_seed(0)
    old = torch.randn(40, dtype=torch.float64)
    logps = (old + 0.5 * torch.randn(40, dtype=torch.float64)).requires_grad_()
    advantages, weights = torch.randn(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    loss, sums = module(folder, "grpo/loss.py").policy_loss(
        logps, old, advantages, weights, 0.2, 0.3
    )
    loss.backward()
    total = 0.0
    for t in range(40):
        clipped = min((logps[t] - old[t]).exp().item(), 1.3)
        total -= weights[t].item() * clipped * advantages[t].item() * logps[t].item()
        gradient = -weights[t].item() * clipped * advantages[t].item()
        assert logps.grad[t].item() == pytest.approx(gradient, abs=1e-12)
    assert loss.item() == pytest.approx(total)
    assert sums["clip_high"] > 0 and logps.grad.all(), "a clipped token has a gradient"
