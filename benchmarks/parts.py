"""Each part of a step alone, against the least time that its arithmetic and memory traffic take.

    python benchmarks/parts.py --model tiny --image 448 --completion 64 --json FILE

The limit of a part is the larger of two times: its floating-point operations (counted by torch's
FlopCounterMode as the part runs) over the rate of a large matrix product measured here, and the
bytes that it cannot avoid reading or writing (weights, and keys and values, once) over the
bandwidth measured here. What is not counted: activations, exponentials, norms, the Python between
the operations. CPU, float32, two threads; medians of --repeat runs after one that is dropped.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from types import SimpleNamespace

from benchmarks.material import PROBLEM, make_checkpoint, make_images
from benchmarks.step import GROUP, PROMPTS
from data.images import open_image
from grpo.engine.head import token_chunks, token_logps
from grpo.engine.optimizer import Optimizer
from grpo.logps import pack_chunks, pack_logps
from grpo.pack import make_packs
from grpo.rollout import Draw, sample_groups
from models.decoding.cache import Cache, cache_bytes
from models.decoding.draw import Sampling, sample
from models.decoding.generate import head as head_logits
from models.decoding.step import DecodeStep
from models.families import FAMILIES
from models.load import load_model
from models.mixer import Layout
from models.processor import Processor
from models.qwen_vl import image_features, with_image_features

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_flops(q, k, v, dropout_p=0.0, is_causal=False, *_, **__) -> int:
    """Two products, half of each where causal; the counter passes shapes."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim // (2 if is_causal else 1)


def backward_flops(grad, q, k, v, out, logsumexp, dropout_p=0.0, is_causal=False, *_, **__) -> int:
    """Five products, one of them formed again."""
    return attention_flops(q, k, v, 0.0, is_causal) * 5 // 2


def product_flops(_, a, b, **__) -> int:
    return 2 * a[0] * a[1] * b[1]


def linear_flops(x, weight, *_, **__) -> int:
    return 2 * x[0] * x[1] * weight[0]


def batched_flops(_, a, b, **__) -> int:
    return a[0] * product_flops(_, a[1:], b[1:])


def solve_flops(system, right, **__) -> int:
    """Of triangular systems: half of a product."""
    return math.prod(right) * system[-1]


MAPPING = {  # what the counter does not know by itself
    torch.ops.aten.addmm_: product_flops,
    torch.ops.aten.baddbmm_: batched_flops,
    torch.ops.aten.mkldnn_linear: linear_flops,
    torch.ops.aten.linalg_solve_triangular: solve_flops,
    CPU_ATTENTION: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


def median_seconds(part: Callable, repeat: int) -> float:
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def machine(repeat: int) -> tuple[float, float]:
    """(floating-point operations, bytes) per second: a 2048^3 product; reading half a GB."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    large = torch.ones(2**27)
    rate = 2 * 2048**3 / median_seconds(lambda: a @ b, repeat)
    return rate, large.nbytes / median_seconds(large.sum, repeat)


def nbytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def parts(folder: Path, options: argparse.Namespace) -> dict[str, tuple[Callable, int]]:
    """Name -> (what to run, bytes that it must move)."""
    checkpoint = make_checkpoint(folder / "model", options.model, options.family)
    make_images(folder / "images", PROMPTS, options.image)
    processor = Processor(checkpoint)
    model = load_model(checkpoint, torch.float32, "cpu")
    pictures = [open_image(folder / "images" / f"{i}.png") for i in range(PROMPTS)]

    def encode():
        return [processor.encode(PROBLEM, [p], (str(i),)) for i, p in enumerate(pictures)]

    prompts = encode()
    never = (*processor.suppressed_ids, *processor.stop_ids)
    model.suppressed_ids = torch.tensor(never)
    sampling = Sampling(options.completion, num_generations=options.group)
    rows = [SimpleNamespace(prompt=lambda _, prompt=prompt: prompt) for prompt in prompts]
    drawn = [Draw(number, row) for number, row in enumerate(rows)]
    groups = sample_groups(model, drawn, processor, sampling, 0, 1)
    for group in groups:
        group.advantages = group.weights = torch.ones(options.group)
    (pack,) = make_packs(groups, 10**9)
    (half,) = make_packs(groups[: PROMPTS // 2], 10**9)
    head = (1.0, model.suppressed_ids)  # temperature, and what is never sampled
    samples = PROMPTS * options.group
    uniforms = torch.rand(samples, dtype=torch.float64)
    tokens = torch.tensor([c[0] for g in groups for c in g.completion_ids])
    width, weight = model.config.hidden_size, model.head_weight
    hidden = torch.randn(len(pack.targets), width, requires_grad=True)
    logits = torch.randn(samples, len(weight))
    optimizer = Optimizer(model, 0.0)
    input_ids = torch.cat([p.input_ids for p in prompts])
    positions = torch.cat([p.position_ids for p in prompts], dim=1)
    bounds = model.bounds([(len(p),) for p in prompts])
    features = image_features(model, prompts).detach()

    lengths = [len(prompt) for prompt in prompts]

    layout = Layout(PROMPTS, options.group, max(lengths), options.completion)

    def filled() -> Cache:
        cache = Cache(model.config, torch.float32, model.device)
        cache.prepare(layout)
        cache.expect(0, lengths)
        with torch.no_grad():
            model(input_ids, positions, bounds, features, cache, torch.tensor([0]))
        return cache

    frozen = replace(pack, prompts=with_image_features(model, prompts))
    cache = filled()
    middle = options.completion // 2  # of a completion
    kept = cache_bytes(model.config, layout._replace(capacity=middle), torch.float32)
    with torch.no_grad():
        step = DecodeStep(model)
    index = cache.index(list(range(samples)), lengths, middle)
    before = [(x, x.clone()) for part in index.values() for x in part]
    where, at = torch.full((samples,), 400), torch.tensor([middle])
    counted = itertools.count(middle)

    def decode():
        cache.between(next(counted))  # seldom more than nothing: not in the median
        step(tokens, where, cache, index, at, middle + 1)
        for x, first in before:  # the step has moved them on by a token
            x.copy_(first)

    def train(logps_of_chunks):
        for logps in logps_of_chunks:
            logps.sum().backward()
        hidden.grad = None
        model.zero_grad(set_to_none=True)

    no_grad = torch.no_grad()
    vision = nbytes(model.visual)
    decoder = nbytes(model.model) - model.model.embed_tokens.weight.nbytes

    def update():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(0.0, 1.0)

    return {
        "images to patches (PIL)": (encode, 0),
        "vision tower": (no_grad(lambda: image_features(model, prompts)), vision),
        "prefill": (no_grad(filled), decoder),
        "one decode step": (no_grad(decode), decoder + kept),
        "its head": (
            no_grad(lambda: head_logits(hidden[:samples], weight)),
            weight.nbytes,
        ),
        "its draw": (no_grad(lambda: sample(logits, sampling, uniforms)), logits.nbytes),
        "reference pass": (no_grad(lambda: pack_logps(model, pack, 1.0)), vision),
        "the head's part": (
            no_grad(lambda: token_logps(hidden, weight, pack.targets, *head)),
            weight.nbytes,
        ),
        "training pass": (
            lambda: train(t.logps for t in pack_chunks(model, pack, 1.0)),
            3 * (decoder + vision),
        ),
        "the head's part of it": (
            lambda: train(
                logps for _, logps, _ in token_chunks(hidden, weight, pack.targets, *head)
            ),
            3 * weight.nbytes,
        ),
        "the same, whole completions": (
            lambda: train([token_logps(hidden, weight, pack.targets, *head)[0]]),
            4 * weight.nbytes,
        ),
        "the same, entropy": (
            lambda: train(
                logps - 0.01 * entropy
                for _, logps, entropy in token_chunks(hidden, weight, pack.targets, *head)
            ),
            4 * weight.nbytes,
        ),
        # what --beta 0 leaves out where half of the groups have no advantage; and --freeze_vision
        "training, half the groups": (
            lambda: train(t.logps for t in pack_chunks(model, half, 1.0)),
            0,
        ),
        "training, vision frozen": (
            lambda: train(t.logps for t in pack_chunks(model, frozen, 1.0)),
            0,
        ),
        "optimizer": (update, 8 * nbytes(model)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "mid", "small"), default="tiny")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--image", type=int, default=448, help="pixels a side")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--group", type=int, default=GROUP)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    load = os.getloadavg()[0]
    rate, bandwidth = machine(options.repeat)
    print(f"matrix product {rate / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':28}{'ms':>9}{'GFLOP':>9}{'MB':>9}{'limit, ms':>11}{'times the limit':>17}")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (part, moved) in parts(Path(folder), options).items():
            with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
                part()
            flops = counter.get_total_flops()
            seconds = median_seconds(part, options.repeat)
            limit = max(flops / rate, moved / bandwidth)
            rows[name] = {"seconds": seconds, "flops": flops, "bytes": moved, "limit_s": limit}
            times = f"{seconds / limit:17.1f}" if limit else ""
            cells = f"{1e3 * seconds:9.2f}{flops / 1e9:9.2f}{moved / 1e6:9.1f}{1e3 * limit:11.2f}"
            print(f"{name:28}{cells}{times}", flush=True)
    if options.json:
        setting = {k: v for k, v in vars(options).items() if k != "json"}
        machine_rates = {"flops_per_s": rate, "bytes_per_s": bandwidth, "load_average": load}
        report = {"setting": setting, "machine": machine_rates, "parts": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
