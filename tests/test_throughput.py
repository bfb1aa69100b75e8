"""perf/* of a run: what is counted, over which time."""

from types import SimpleNamespace

import pytest
import torch

import grpo.run.throughput as throughput
from data.flowers import rows
from grpo.run.throughput import PEAKS, peak_flops
from models.flops import Flops, Pass
from models.load import load_model
from models.processor import Processor
from tests.runs import CHECKPOINT, SHORT, read_lines, train

CUDA = torch.device("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_a_steps_work_is_counted_over_its_times(tmp_path, monkeypatch, freeze):
    """Two updates, each after a pass for the entropies; the reference's and the old policy's
    log-probs; an evaluation, which does not count."""
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: 3e9)
    options = [*SHORT, "--num_iterations", "2", "--top_entropy_quantile", "0.9"]
    options += ["--eval_steps", "1", "--freeze_vision", str(freeze)]
    options += ["--max_steps", "1"] if freeze else []
    lines = train(tmp_path / "run", *options)[1:]
    model, processor = load_model(CHECKPOINT, torch.float32, "cpu"), Processor(CHECKPOINT)
    model.visual.requires_grad_(not freeze)
    row = rows("train", 1)[0]  # all photographs are of one size, and ask the same
    prompt = processor.encode(row["problem"], [row["image"]], ("a",))
    flops, grid = Flops(model), tuple(prompt.image_grid_thw[0].tolist())
    for line in lines:
        table = {}
        for one in read_lines(tmp_path / "run" / "completions.jsonl"):
            if one["step"] == line["step"]:
                table.setdefault(one["prompt"], []).append(one["tokens"])
        packed = tuple((len(prompt), *own) for own in table.values())
        drawn = tuple((len(prompt), *(n - 1 for n in own)) for own in table.values())
        completion = sum(map(sum, table.values()))
        prompts, images = len(prompt) * len(table), (grid,) * len(table)
        assert line["num_tokens"] == completion or line["step"] == 2
        for name, time, amount in (
            ("completion_tokens_per_s", "time/rollout_s", completion),
            ("tokens_per_s/rollout", "time/rollout_s", prompts + completion),
            ("tokens_per_s/training", "time/training_s", 2 * (prompts + completion)),
            ("samples_per_s", "step_time", 8),
        ):
            assert line[f"perf/{name}"] * line[time] == pytest.approx(amount), name
        within = () if freeze else images
        expected = flops(Pass(grids=images)) + flops(Pass(drawn, completion - 8 + len(table)))
        expected += 4 * flops(Pass(packed, completion, within))  # reference, old, entropies twice
        expected += 2 * flops(Pass(packed, completion, within, is_trained=True))
        assert line["perf/mfu"] * line["step_time"] * 3e9 == pytest.approx(expected)


@pytest.mark.slow
def test_what_dynamic_sampling_replaces_counts(tmp_path):
    options = ["--dynamic_sampling", "--max_sampling_rounds", "6", "--seed", "3"]
    for line in train(tmp_path / "run", *SHORT, *options)[1:]:
        samples = line["perf/samples_per_s"] * line["step_time"]
        assert samples == pytest.approx(4 * line["sampling/prompts"])
        amounts = [
            line[f"perf/tokens_per_s/{phase}"] * line[f"time/{phase}_s"]
            for phase in ("rollout", "training")
        ]
        replaced = line["sampling/prompts"] > line["sampling/prompts_kept"]
        assert (amounts[0] > amounts[1] + 1) == replaced, "a pass trains on what was kept"
        assert "perf/mfu" not in line, "a CPU has no peak"


@pytest.mark.parametrize(
    "name, bf16, float32, with_tf32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5, 156),
        ("A100-SXM4-40GB", 312, 19.5, 156),  # an old driver's name
        ("NVIDIA H100 80GB HBM3", 989, 67, 494),
        ("NVIDIA H100 PCIe", 756, 51, 378),
        ("NVIDIA H200", 989, 67, 494),
        ("NVIDIA A10", 125, 31.2, 62.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
    ],
)
def test_the_peak_is_the_cards_in_what_a_run_computes_in(
    monkeypatch, name, bf16, float32, with_tf32
):
    card = SimpleNamespace(name=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert peak_flops(CUDA, torch.bfloat16) == bf16 * 1e12
    assert peak_flops(CUDA, torch.float32) == float32 * 1e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(CUDA, torch.float32) == with_tf32 * 1e12
    assert peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA H20",
        "Tesla V100-SXM2-32GB",
        "AMD Instinct MI300X",
    ],
)
def test_another_card_has_no_peak(monkeypatch, name):
    card = SimpleNamespace(name=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert peak_flops(CUDA, torch.bfloat16) is None


def test_peaks_are_in_order():
    """Tensor cores are not slower, and bfloat16 takes half the time of TF32."""
    for name, peak in PEAKS.items():
        assert peak.float32 <= peak.tf32 < peak.bf16, name
        assert peak.bf16 == pytest.approx(2 * peak.tf32, rel=0.02), name
