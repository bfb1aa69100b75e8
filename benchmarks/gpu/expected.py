"""What benchmarks/launches.py predicts for the same steps, with this device's rates."""

from pathlib import Path

import torch
import torch.nn.functional as F

import train_cls
from benchmarks import dispatch, launches
from benchmarks.gpu.shapes import WORK, allow_any_torchvision, image_side, make_model
from benchmarks.material import PROBLEM
from grpo.engine.adapters import lora_of
from grpo.flags.parser import parse_config as parse_flags
from models.config import QwenVLConfig
from models.four_bit import BYTES, FourBitLinear, use_four_bits
from models.processor import Processor
from models.qwen_vl import QwenVL


def predict(settings: dict, report) -> None:
    """Reports for each of settings["cases"] (name -> model, flags) seconds by phase, and as
    `decode_bytes` what a rollout reads and writes in decode steps.

    settings["rates"]: flops, bandwidth, launch, of the device. Decode steps are of a captured
    graph, in the phase `rollout`; `rollout, launched` has them launched one by one. A weight in 4
    bits is read, and written and read in bfloat16, for each product.
    """
    rates, work = settings["rates"], WORK[settings["shapes"]]
    dispatch.FLOPS = launches.FLOPS = rates["flops"]
    dispatch.BANDWIDTH = launches.BANDWIDTH = rates["bandwidth"]
    launches.PROMPTS, launches.GROUP, launches.COMPLETION = work[:3]
    FourBitLinear.unpacked = unpacked
    F.rms_norm = lambda x, shape, weight, eps: dispatch.Norm.apply(x, weight)
    dispatch.count_fused()
    allow_any_torchvision()
    for name, case in settings["cases"].items():
        folder = Path(settings["folder"]) / "expected" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = make_model(folder, case["model"], settings["shapes"])
        processor = Processor(folder)
        side = image_side(config, work)
        launches.IMAGE = processor.image_tokens(side, side)
        launches.TEXT = processor.count_tokens(PROBLEM, [(side, side)]) - launches.IMAGE
        report(name, of_case(case, config, rates["launch"]))


def of_case(case: dict, config: QwenVLConfig, launch: float) -> dict:
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", *case["flags"].split()]
    flags, _ = parse_flags(train_cls.Config, argv)
    launches.ADAPTERS, launches.OPTIMIZERS = lora_of(flags), (flags.optim,)
    launches.IN_4_BITS = flags.load_in_4bit
    layers = four_bit(config) if flags.load_in_4bit else []
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    found = {
        name: (count.seconds, count.launches, count.bytes)
        for name, count in launches.phases(
            config, "meta", launches.IMAGE, launches.COMPLETION, flags.tokens_per_pack
        )
    }
    decoding = launches.decoding(config, 500)
    steps = launches.COMPLETION - 1
    more = steps * packed * (BYTES + 2)  # instead of reading 2 bytes, which `decoding` counts
    seconds = {}
    for how, name in (("in a captured graph", "rollout"), ("eager", "rollout, launched")):
        _, size, launched, busy = decoding[f"decoding, {how}"]
        parts = [found["vision tower"][:2], found["prefill"][:2]]
        parts.append((busy + more / dispatch.BANDWIDTH, launched))
        seconds[name] = sum(max(busy, count * launch) for busy, count in parts)
    for phase in ("reference", "training", "optimizer"):
        name = phase if phase == "reference" else f"{phase}, {flags.optim}"
        busy, count, _ = found[name]
        seconds[phase] = max(busy, count * launch)
    return {"seconds": seconds, "decode_bytes": size + more}


def four_bit(config) -> list[FourBitLinear]:
    with torch.device("meta"):
        model = QwenVL(config)
        use_four_bits(model.model.layers)
    return [layer for layer in model.modules() if isinstance(layer, FourBitLinear)]


def unpacked(self: FourBitLinear) -> torch.Tensor:
    """A weight from 4 bits on the meta device, counted: two kernels, as scales are packed too."""
    size = self.in_features * self.out_features
    if (count := dispatch.Norm.count) is not None:
        count.operations["dequantize"] += 2
        count.take(0, size * (BYTES + 2))
    return torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16, device="meta")
