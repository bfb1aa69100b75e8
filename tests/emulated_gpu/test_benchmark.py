"""The whole of `python -m benchmarks.gpu`, narrow, on the emulated device: one rank and two."""

import json
import subprocess
import sys

import pytest

from benchmarks.gpu.__main__ import CHECKS, MODELS
from tests.runs import ROOT


@pytest.fixture(scope="module")
def report(emulated_gpu, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--shapes", "narrow", "--ranks", "2"]
    command += ["--start", emulated_gpu / "python", "--start_ranks", f"{emulated_gpu}/torchrun 2"]
    done = subprocess.run(
        [str(word) for word in [*command, "--minutes", "30", "--out", out]],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (out / "gpu.md").exists(), done.stderr[-3000:]
    return json.loads((out / "gpu.json").read_text()), done.stdout


def test_every_part_runs(report):
    """But for what needs a library that the environment lacks, and says so."""
    parts, said = report[0]["parts"], report[1]
    bad = {name: part["why"] for name, part in parts.items() if part["status"] != "done"}
    assert bad.keys() <= {"7B, LoRA on 4 bits"}, bad
    assert all("needs bitsandbytes" in why for why in bad.values())
    assert parts.keys() >= {*CHECKS, *MODELS, "demo", "demo on the CPU", "one rank", "ranks"}
    assert "**NO**" not in said and "flash_attention_2" in said and "captured" in said
    assert "ranks, FSDP2" in said and "ranks, LoRA" in said


def test_a_step_s_seconds_memory_and_waits_are_there(report):
    for name in set(MODELS) - {"7B, LoRA on 4 bits"}:
        found, expected = report[0]["parts"][name]["found"], report[0]["expected"][name]
        phases = {"rollout", "reference", "training", "optimizer"}
        assert found["seconds"].keys() == found["gb"].keys() == phases <= expected["seconds"].keys()
        assert found["graphs"] and found["decode"] < found["seconds"]["rollout"]
        assert not {"reference", "training"} & found["waits"].keys(), found["waits"]
        assert 0 < found["waits"]["rollout"] <= 10 and found["waits"]["optimizer"] <= 4
