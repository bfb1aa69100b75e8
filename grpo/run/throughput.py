"""How fast a step was: tokens and samples a second, and the share of the devices' peak (MFU).

Only what the step's algorithm needs counts, and of that the matrix products (models/flops.py;
PaLM, 2204.02311, appendix B). Nothing here waits for a device.
"""

from typing import NamedTuple

import torch

from grpo.engine.load import Models
from grpo.engine.ranks import Ranks
from grpo.rollout import Rollout
from models.flops import Flops


class Peak(NamedTuple):
    """TFLOP/s of dense products by NVIDIA's data sheets: in bfloat16, in float32 as TF32, and in
    float32 itself, without tensor cores. With float32 sums, where a card is faster without."""

    bf16: float
    tf32: float
    float32: float


A100, H100, H100_NVL = Peak(312, 156, 19.5), Peak(989, 494, 67), Peak(835, 417, 60)
H100_PCIE = Peak(756, 378, 51)

# The whole name, as torch says it, without "NVIDIA ": a slice of a card (MIG), a laptop's and an
# export model are other devices. A card that is not here has no `perf/mfu`.
PEAKS = {
    **dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"), A100),
    **dict.fromkeys(("A800-SXM4-80GB", "A800 80GB PCIe"), A100),
    "A10": Peak(125, 62.5, 31.2),
    "A30": Peak(165, 82, 10.3),
    "A40": Peak(149.7, 74.8, 37.4),
    "H100 80GB HBM3": H100,
    "H100 PCIe": H100_PCIE,
    "H100 NVL": H100_NVL,
    "H200": H100,
    "H200 NVL": H100_NVL,
    "GH200 480GB": H100,
    "B200": Peak(2250, 1125, 75),
    "L4": Peak(121, 60, 30.3),
    "L40": Peak(181, 90.5, 90.5),
    "L40S": Peak(362, 183, 91.6),
    "RTX A5000": Peak(111.1, 55.6, 27.8),
    "RTX A6000": Peak(154.8, 77.4, 38.7),
    "RTX 6000 Ada Generation": Peak(364.2, 182.1, 91.1),
    "GeForce RTX 3090": Peak(71, 35.6, 35.6),
    "GeForce RTX 3090 Ti": Peak(80, 40, 40),
    "GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
    "GeForce RTX 5090": Peak(209.5, 104.8, 104.8),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating point operations a second that this device is made for, computing in `dtype`; None
    if that is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_properties(device).name.removeprefix("NVIDIA ")
    if (peak := PEAKS.get(name)) is None:
        return None
    if dtype == torch.bfloat16:
        return peak.bf16 * 1e12
    exact = torch.get_float32_matmul_precision() == "highest"
    return (peak.float32 if exact else peak.tf32) * 1e12


class Throughput:
    """Of each step. models: of the run, which note their passes."""

    def __init__(self, models: Models, ranks: Ranks, dtype: torch.dtype):
        self.ranks, self.peak = ranks, peak_flops(ranks.device, dtype)
        distinct = dict.fromkeys((models.policy, models.sampler, models.reference))
        self.counts = {model: Flops(model) for model in distinct if model is not None}

    def begin(self) -> None:
        """A new step: passes so far, such as those of an evaluation, do not count."""
        for model in self.counts:
            model.passes.clear()

    def metrics(self, rollout: Rollout, spent: dict[str, float]) -> dict[str, float]:
        """Numbers of the step over all ranks; every rank must call it. spent: the step's times,
        seconds, by their names in the log."""
        flops = trained = 0
        for model, count in self.counts.items():
            flops += sum(map(count, model.passes))
            trained += sum(one.tokens for one in model.passes if one.is_trained)
        found = self.ranks.gather([(flops, trained, self.peak)])
        flops, trained = (sum(numbers) for numbers in list(zip(*found, strict=True))[:2])
        peaks = [peak for *_, peak in found]
        sampled = rollout.num_tokens
        rates = {
            "perf/completion_tokens_per_s": (sampled, "time/rollout_s"),
            "perf/tokens_per_s/rollout": (rollout.num_prompt_tokens + sampled, "time/rollout_s"),
            "perf/tokens_per_s/training": (trained, "time/training_s"),
            "perf/samples_per_s": (rollout.num_samples, "step_time"),
        }
        if None not in peaks:
            rates["perf/mfu"] = (flops / sum(peaks), "step_time")
        return {n: amount / spent[time] for n, (amount, time) in rates.items() if time in spent}
