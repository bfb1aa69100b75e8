"""How torch's threads wait on a busy machine: grpo/threads.py."""

import ast
import os
import subprocess
import sys
import time

import pytest

import grpo.threads
from grpo.threads import SlowSteps
from tests.runs import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP and /proc are Linux's")


def policy_in_a_fresh_process(**environment: str) -> str:
    code = "import os, sys, grpo.threads; print(os.environ.get('OMP_WAIT_POLICY'),"
    code += " 'torch' in sys.modules, bool(grpo.threads.chosen))"
    clean = {k: v for k, v in os.environ.items() if k not in grpo.threads.USER_SETTINGS}
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **environment}, text=True
    )
    return out.strip()


@LINUX
@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread")
def test_threads_sleep_if_another_program_computes():
    """Measured on this machine, which a second program keeps busy; settings of the user win."""
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(2)]
    try:
        time.sleep(0.2)
        assert policy_in_a_fresh_process() == "passive False True"
        assert policy_in_a_fresh_process(OMP_WAIT_POLICY="active") == "active False False"
        assert policy_in_a_fresh_process(OMP_NUM_THREADS="1") == "None False False"
        assert policy_in_a_fresh_process(GOMP_SPINCOUNT="100") == "None False False"
    finally:
        for other in others:
            other.kill()


@LINUX
@pytest.mark.parametrize("others, chosen", [(0.0, None), (0.2, None), (0.5, "passive")])
def test_the_choice_follows_the_load(monkeypatch, others, chosen):
    for name in grpo.threads.USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    seconds = iter([100.0, 100.0 + others * grpo.threads.SAMPLE])
    monkeypatch.setattr(grpo.threads, "cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(grpo.threads, "chosen", "")
    grpo.threads.choose()
    assert os.environ.get("OMP_WAIT_POLICY") == chosen
    assert bool(grpo.threads.chosen) == bool(chosen)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


@LINUX
def test_used_time_is_counted():
    before_all, before_own = grpo.threads.cpu_seconds(), grpo.threads.own_seconds()
    while grpo.threads.own_seconds() - before_own < 0.1:
        pass
    assert grpo.threads.cpu_seconds() - before_all >= 0.05


def slow_steps(monkeypatch, steps: list[tuple[float, float]], spins=True) -> list[str]:
    """What is said after each step of (seconds, cores that others use)."""
    clock = {"now": 0.0, "all": 0.0, "own": 0.0}
    monkeypatch.setattr(grpo.threads.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(grpo.threads, "cpu_seconds", lambda: clock["all"])
    monkeypatch.setattr(grpo.threads, "own_seconds", lambda: clock["own"])
    monkeypatch.setattr(grpo.threads, "spins", lambda: spins)
    watch, said = SlowSteps(), []
    for seconds, others in steps:
        watch.begin()
        clock["now"] += seconds
        clock["own"] += seconds
        clock["all"] += seconds * (1 + others)
        said.append(watch.end())
    return said


def test_slow_steps_are_explained_once_if_others_compute(monkeypatch):
    usual = [(0.5, 0.0)] * 5
    said = slow_steps(monkeypatch, [*usual, (20.0, 1.0), (20.0, 1.0)])
    assert said[:5] == [""] * 5 and said[6] == ""
    assert "took 20.0 s, the ones before 0.5 s: other programs use 1.0 cores" in said[5]
    assert "OMP_WAIT_POLICY=passive" in said[5]


@pytest.mark.parametrize(
    "steps, spins",
    [
        ([(0.5, 0.0)] * 5 + [(20.0, 0.0)], True),  # slow by itself: long completions
        ([(0.5, 0.0)] * 5 + [(2.0, 1.0)], True),  # not that slow
        ([(0.5, 0.0)] * 2 + [(20.0, 1.0)], True),  # too early to know what is usual
        ([(0.5, 0.0)] * 5 + [(20.0, 1.0)], False),  # threads sleep already
    ],
)
def test_other_slow_steps_are_not(monkeypatch, steps, spins):
    assert not any(slow_steps(monkeypatch, steps, spins))


def test_scripts_and_commands_choose_before_torch_is_loaded():
    files = ["train_cls.py", "train_det.py", "tests/conftest.py"]
    for file in [*files, "benchmarks/__init__.py", "demo/__init__.py"]:
        imports = [
            name
            for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or node.names[0].name]
        ]
        own = ("torch", "grpo", "models", "data", "tests", "rewards", "tqdm")
        assert next(n for n in imports if n.split(".")[0] in own) == "grpo.threads", file
