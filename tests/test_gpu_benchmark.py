"""benchmarks/gpu, the command for whoever has a GPU: a part that breaks, and numbers that are
wrong. Here without a device; the whole command runs in tests/emulated_gpu."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import right
from benchmarks.gpu.parts import Part, Starts
from benchmarks.gpu.tables import compared, markdown
from models import qwen2_vl
from tests.runs import ROOT

BROKEN = """
import os, time

def raises(settings, report):
    report("before", 1)
    raise ValueError("no kernel\\nfor this")

def dies(settings, report):
    report("before", 2)
    os.abort()

def hangs(settings, report):
    report("before", 3)
    os.fork() or time.sleep(60)
    time.sleep(60)

def works(settings, report):
    report("sum", settings["a"] + settings["b"])
"""
QUICK = {"quick": True, "shapes": "narrow"}


def test_what_breaks_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("raises", "dies", "hangs", "works")
    parts = [Part(n, ("right",), f"broken:{n}", 20, {"a": 1, "b": 2}) for n in names]
    parts[2] = Part("hangs", ("right",), "broken:hangs", 2, {})
    starts = Starts([sys.executable], [sys.executable])
    found, _ = command.measure(parts, starts, tmp_path, minutes=1)
    assert [found[n]["status"] for n in names] == ["failed", "failed", "out of time", "done"]
    assert [found[n]["found"] for n in names[:3]] == [{"before": k} for k in (1, 2, 3)]
    assert found["works"]["found"] == {"sum": 3}
    assert "ValueError: no kernel" in found["raises"]["why"]
    assert found["dies"]["why"].startswith("exit code -6")
    assert found["hangs"]["why"] == "not finished after 2 s"
    assert command.failed(found) == list(names[:3])
    report = {"card": {}, "rates": {}, "parts": found, "expected": {}, "shapes": "narrow"}
    assert "| hangs | out of time | 2" in markdown(report)
    assert "for this" not in capsys.readouterr().out.split("works")[1]


def test_what_there_is_no_time_for_is_not_begun(tmp_path):
    parts = [Part("late", ("right",), "broken:works", 20, {})]
    found, _ = command.measure(parts, Starts([], []), tmp_path, minutes=0.01)
    assert found["late"]["status"] == "not begun" and not command.failed(found)
    assert command.verdict(found).endswith("No time was left for late: see --minutes.")


def test_a_part_that_the_minutes_cut_short_is_not_called_wrong(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [Part("hangs", ("right",), "broken:hangs", 60, {})]
    starts = Starts([sys.executable], [sys.executable])
    found, _ = command.measure(parts, starts, tmp_path, minutes=0.1)
    assert found["hangs"]["status"] == "cut short" and found["hangs"]["found"] == {"before": 3}
    assert command.verdict(found) == (
        "All that ran is right. No time was left for hangs: see --minutes."
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_has_what_was_done_and_no_process_left(tmp_path, number):
    """The child's session is its own, so a terminal's Ctrl-C does not reach it."""
    argv = ["-m", "benchmarks.gpu", "--parts", "norm", "--out", str(tmp_path)]
    argv += ["--start", f"{sys.executable} {tmp_path / 'slow.py'}"]
    (tmp_path / "slow.py").write_text(
        "import os, runpy, sys, time\n"
        "if 'norm' in sys.argv[2]:\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "All that ran is right. Stopped in norm." in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in report["parts"].items()} == {
        "card": "done",
        "norm": "stopped",
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--minutes 0", "--minutes 0: a number above 0"),
        ("--minutes nan", "--minutes nan: a number above 0"),
        ("--parts ranks", "--parts ranks needs several devices"),
        ("--out setup.cfg", "--out setup.cfg: File exists"),
    ],
)
def test_flags_that_cannot_be_are_refused(monkeypatch, capsys, flags, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert said in capsys.readouterr().err


def test_the_peer_is_asked_for_in_two_ways(monkeypatch, tmp_path):
    asked = []

    def measured(parts, *_):
        asked.append({part.name for part in parts})
        raise InterruptedError

    monkeypatch.setattr(command, "measure", measured)
    for flags in (["--parts", "peer"], ["--peer", "--parts", "norm"], []):
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *flags])
        with pytest.raises(InterruptedError):
            command.main()
    peer, both, neither = asked
    assert "TRL 1" in peer & both and "TRL 1" not in neither
    assert "norm" in both & neither and "norm" not in peer


def findings(check) -> list[dict]:
    found = []
    check(QUICK, lambda name, value: found.append(value))
    return found


CHECKS = [getattr(right, name) for name in command.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=command.CHECKS)
def test_the_checks_pass_here(check):
    found = findings(check)
    assert found and all(finding["ok"] for finding in found), found


def off(function):
    """The same function, a twentieth too large."""

    def wrong(*arguments, **options):
        return 1.05 * function(*arguments, **options)

    return wrong


@pytest.mark.parametrize(
    ("check", "module", "name"),
    [
        ("attention_kernel", right, "attention"),
        ("norm", torch.nn.functional, "rms_norm"),
        ("sampling", right, "pack_logps"),
    ],
)
def test_a_number_that_is_wrong_is_found(monkeypatch, check, module, name):
    exact = getattr(module, name)
    calls = []

    def once_right(*arguments, **options):  # float64 is the reference
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in arguments):
            return exact(*arguments, **options)
        calls.append(1)
        return off(exact)(*arguments, **options)

    monkeypatch.setattr(module, name, once_right)
    assert not all(finding["ok"] for finding in findings(getattr(right, check))) and calls


def test_a_wrong_fused_function_is_found(monkeypatch):
    monkeypatch.setattr(qwen2_vl.quick_gelu, "compiled", off(qwen2_vl.quick_gelu.function))
    monkeypatch.setattr(type(qwen2_vl.quick_gelu), "__call__", lambda self, *args: (
        self.compiled or self.function)(*args))  # fmt: skip
    wrong = [finding["what"] for finding in findings(right.fused) if not finding["ok"]]
    assert wrong == ["quick_gelu, compiled"]


def test_nan_is_not_right():
    assert not right.row("x", float("nan"), 1.0)["ok"]


def test_rewards_that_differ_from_the_cpu_s_are_found():
    runs = [{"reward": [1.0, 1.2], "grad_norm": [1, 1], "seconds": [1, 1]} for _ in "ab"]
    parts = {"demo on the CPU": {"found": {"float32": runs[0]}}, "demo": {"found": {"f": runs[1]}}}
    assert all(row["ok"] for row in compared(parts))
    runs[1]["reward"] = [1.0, 0.2]
    assert [row["ok"] for row in compared(parts)] == [True, False]


@pytest.mark.slow
def test_the_command_measures_a_narrow_model(tmp_path, monkeypatch, capsys):
    words = ["gpu", "--shapes", "narrow", "--parts", "norm", "2B, LoRA", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == ["card", "norm", "2B, LoRA"]
    found, expected = report["parts"]["2B, LoRA"]["found"], report["expected"]["2B, LoRA"]
    assert found["step"] > 0 and found["seconds"].keys() == found["gb"].keys()
    assert found["seconds"].keys() <= expected["seconds"].keys()
    assert report["rates"]["flops"] > 1e6 and "| RMSNorm |" in (tmp_path / "gpu.md").read_text()
