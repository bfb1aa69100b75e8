"""Are a device's numbers right? Each check reports errors beside what is allowed of them.

The reference is the same arithmetic in float64, on the CPU unless said otherwise. An error is the
largest difference, divided by the largest number of the reference. A bfloat16 number has 8 bits:
rounding one is an error of 0.004.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.card import device
from benchmarks.gpu.shapes import config_of
from benchmarks.launches import make_groups
from grpo.engine.adamw import LightAdamW, one_pass
from grpo.engine.head import token_chunks
from grpo.engine.optimizer import Optimizer
from grpo.logps import pack_logps
from grpo.pack import make_packs
from models import layers, qwen2_vl
from models.config import DeltaHeads
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.decoding.graphs import Graphs
from models.decoding.storage import allocate
from models.delta_rule import delta_rule
from models.families import parse_config
from models.layers import RMSNorm
from models.packed_attention import Bounds, attention, choose_implementation
from models.packed_chunks import packed_chunks
from models.qwen_vl import QwenVL

CPU = torch.device("cpu")
BF16 = torch.bfloat16
HEAD_SIZES = (64, 80, 128, 256)


def error(found: Tensor, reference: Tensor) -> float:
    found, reference = (t.detach().cpu().double() for t in (found, reference))
    return ((found - reference).abs().max() / reference.abs().max()).item()


def row(what: str, error: float, allowed: float) -> dict:
    """A finding. NaN is never allowed."""
    return {"what": what, "error": error, "allowed": allowed, "ok": bool(error <= allowed)}


def both(shapes: dict[str, tuple[int, ...]], dtype=BF16) -> tuple[dict, dict]:
    """The same random numbers as leaves: on the device in `dtype`, and on the CPU in float64."""
    torch.manual_seed(0)
    numbers = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    here = {name: t.clone().to(device()).requires_grad_() for name, t in numbers.items()}
    return here, {name: t.double().requires_grad_() for name, t in numbers.items()}


def compare(what: str, found: Tensor, reference: Tensor, here: dict, there: dict, allowed: float):
    """Rows of an operation's values and of its leaves' gradients, in one random direction."""
    direction = torch.randn(reference.shape, dtype=torch.float64)
    (reference * direction).sum().backward()
    (found.float() * direction.to(found.device, torch.float32)).sum().backward()
    yield row(what, error(found, reference), allowed)
    for name, leaf in here.items():
        yield row(f"{what}, gradient of {name}", error(leaf.grad, there[name].grad), 2 * allowed)


def attention_kernel(settings: dict, report) -> None:
    """Rows of a prompt and completions, and plain ones, of 8 heads on 2."""
    rows = ((5, 3, 4), (6,)) if settings["quick"] else ((300, 256, 100, 17), (129,), (1, 1, 64))
    tokens, kernel = sum(map(sum, rows)), choose_implementation("auto", device(), BF16)
    for size in HEAD_SIZES:
        here, there = both({"q": (tokens, 8, size), "k": (tokens, 2, size), "v": (tokens, 2, size)})
        found = attention(*here.values(), Bounds(rows, device(), implementation=kernel))
        reference = attention(*there.values(), Bounds(rows, CPU))
        what = f"attention ({kernel}), head size {size}"
        for one in compare(what, found, reference, here, there, 0.02):
            report(one["what"], one)


def norm(settings: dict, report) -> None:
    width = 64 if settings["quick"] else 1536
    here, there = both({"x": (300, width), "weight": (width,)})

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        layer = RMSNorm(width, 1e-6)
        del layer.weight
        layer.weight = weight
        return layer(x)

    reference = normed(**there)
    exact = there["x"] * (there["x"].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    apart = error(reference, exact * there["weight"])
    report("reference", row("RMSNorm's reference against its equation", apart, 1e-12))
    for one in compare("RMSNorm", normed(**here), reference, here, there, 0.02):
        report(one["what"], one)


def head(settings: dict, report) -> None:
    """Log-probs, entropy and both gradients of the head in two chunks and a rest."""
    tokens, width, entries = (9, 16, 1016) if settings["quick"] else (500, 1536, 151936)
    here, there = both({"hidden": (tokens, width), "weight": (entries, width)})
    for leaf in (here["weight"], there["weight"]):
        leaf.data.mul_(0.125 if width == 16 else 0.03125)  # exact in bfloat16
    targets = torch.randint(entries, (tokens,))
    exact = (there["hidden"] @ there["weight"].T).log_softmax(1)
    logps = exact.gather(1, targets[:, None]).squeeze(1)
    entropies = -(exact.exp() * exact).sum(1)
    direction = torch.randn(2, tokens, dtype=torch.float64)
    (logps * direction[0] + entropies * direction[1]).sum().backward()
    found, way = [], direction.to(device(), torch.float32)
    for part, *pair in token_chunks(*here.values(), targets.to(device()), chunk=-(-tokens // 3)):
        (pair[0] * way[0, part] + pair[1] * way[1, part]).sum().backward()
        found.append(torch.stack(pair).detach())
    for name, one, reference in zip(("log-probs", "entropies"), torch.cat(found, 1),
                                    (logps, entropies), strict=True):  # fmt: skip
        report(f"head, {name}", row(f"head, {name}", error(one, reference), 0.01))
    for name, leaf in here.items():
        what = f"head, gradient of {name}"
        report(what, row(what, error(leaf.grad, there[name].grad), 0.04))


def delta(settings: dict, report) -> None:
    """The gated delta rule in chunks, as published: float32 after the convolution."""
    heads = DeltaHeads(keys=16, values=16, key_dim=128, value_dim=128, kernel=4)
    rows = ((300, 256, 100, 17), (129,), (1, 1, 64))
    if settings["quick"]:
        heads, rows = DeltaHeads(keys=2, values=4, key_dim=8, value_dim=8, kernel=4), ((70, 3, 65),)
    tokens, width = sum(map(sum, rows)), sum(heads.widths)
    shapes = {"columns": (tokens, width), "g": (tokens, heads.values)}
    shapes |= {"beta": (tokens, heads.values), "convolution": (width, heads.kernel)}
    here, there = both(shapes, torch.float32)

    def ruled(leaves: dict, on: torch.device) -> Tensor:
        columns, g, beta, convolution = leaves.values()
        decay = -g.square() / 8  # from hardly any to all within some tokens
        packed = packed_chunks(rows, heads, on)
        return delta_rule(columns, decay, beta.sigmoid(), convolution, packed, heads)[0]

    for one in compare("delta rule", ruled(here, device()), ruled(there, CPU), here, there, 1e-3):
        report(one["what"], one)


@torch.no_grad()
def fused(settings: dict, report) -> None:
    """Functions that torch.compile makes one kernel of (models/fused.py), and whether it did."""
    tokens, heads, size = (16, 2, 8) if settings["quick"] else (4096, 16, 128)
    torch.manual_seed(0)
    x, other, grad = torch.randn(3, tokens, heads * size).to(BF16)
    turned = x.view(tokens, heads, size), *torch.randn(2, tokens, 1, size).to(BF16)
    for function, inputs in (
        (layers.gated, (x, other)), (layers.gated_backward, (x, other, grad)),
        (layers.rotated, turned), (layers.rotated_backward, turned),
        (qwen2_vl.quick_gelu, (x,)), (qwen2_vl.quick_gelu_backward, (x, grad)),
    ):  # fmt: skip
        found = function(*(t.to(device()) for t in inputs))
        reference = function.function(*(t.double() for t in inputs))
        pair = (found, reference) if isinstance(found, tuple) else ((found,), (reference,))
        how = "compiled" if function.compiled not in (None, function.function) else "by PyTorch"
        what = f"{function.__name__}, {how}"
        report(what, row(what, max(map(error, *pair)), 0.02))


def adamw(settings: dict, report) -> None:
    """Three updates: float32 masters against AdamW's equations; the light kinds against the CPU,
    of which they are to make the same numbers."""
    size = (24, 300) if settings["quick"] else (1024, 1000)
    torch.manual_seed(0)
    start, gradients = torch.randn(size), torch.randn(3, *size)
    module = nn.Module()
    module.matrix = nn.Parameter(start.to(device()))
    optimizer = Optimizer(module, weight_decay=0.1)
    w, m, v = start.double(), 0, 0
    for update, gradient in enumerate(gradients, 1):
        module.matrix.grad = gradient.to(device())
        optimizer.step({"learning_rate": 1e-2}, float("inf"))
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double().square()
        move = m / (1 - 0.9**update) / ((v / (1 - 0.999**update)).sqrt() + 1e-8)
        w = (1 - 1e-2 * 0.1) * w - 1e-2 * move
    what = "AdamW, float32 masters"
    report(what, row(what, error(module.matrix, w), 1e-6))
    for optim in ("adamw_anyprecision", "adamw_8bit"):
        ends, how = [], "by PyTorch"
        for on in (device(), CPU):
            weight = nn.Parameter(start.to(on, BF16))
            light = LightAdamW({"matrix": weight}, optim, 0.1, seed=0)
            light.kernel = one_pass(light)
            how = "in one kernel" if light.kernel else how
            for update, gradient in enumerate(gradients, 1):
                weight.grad = gradient.to(on, BF16)
                light.step(1e-2, update, 1.0)
            ends.append(weight.detach().cpu())
        # a number that rounds to the other neighbour is off by 1/128 of itself
        share = (ends[0] != ends[1]).float().mean().item()
        for what, found, allowed in (("numbers unlike", share, 0.01), ("", error(*ends), 0.02)):
            what = f"{optim} {how}, {what or 'weights beside'} the CPU's"
            report(what, row(what, found, allowed))


def small_model(settings: dict) -> QwenVL:
    """The first layers of a published model, random, in bfloat16 on the device."""
    config = parse_config(config_of("Qwen2-VL 2B", settings["shapes"]), "benchmark")
    layers = min(4, config.num_hidden_layers)
    config = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    with torch.device("meta"):
        model = QwenVL(config, choose_implementation("auto", device(), BF16))
    torch.manual_seed(0)
    with torch.no_grad():
        model = allocate(model, BF16, device()).initialize()
    model.suppressed_ids = torch.tensor([1], device=device())
    return model


@torch.no_grad()
def sampling(settings: dict, report) -> None:
    """Drift of sampled log-probs from those of the training pass; and that decode steps captured in
    CUDA graphs draw what launched ones draw, bit for bit."""
    model, tokens, group = small_model(settings), 20 if settings["quick"] else 130, 8
    drawn = make_groups(model.config, 4 if settings["quick"] else 256, completion=1)[:2]
    prompts = [one.prompt for one in drawn]
    uniforms = torch.rand(len(prompts) * group, tokens, dtype=torch.float64)

    def completions(graphs: Graphs | None):
        model.graphs = graphs
        return generate(model, prompts, group, Sampling(tokens), uniforms)

    ids, logps = completions(None)
    drift = []
    for index, one in enumerate(drawn):
        members = slice(index * group, (index + 1) * group)
        one.completion_ids, one.sampling_logps = ids[members], logps[members]
    for pack in make_packs(drawn, 10**9):
        trained = pack_logps(model, pack, 1.0).cpu()
        drift.append((trained - pack.sampling_logps.cpu()).abs())
    drift = torch.cat(drift)
    for what, value, allowed in (("mean", drift.mean(), 0.02), ("largest", drift.max(), 0.2)):
        what = f"sampled against trained log-probs, nats, {what}"
        report(what, row(what, value.item(), allowed))
    if device().type != "cuda":
        return
    graphs = Graphs(model)
    for what in ("captured", "replayed"):
        again, repeated = completions(graphs)
        same = ids == again and all(map(torch.equal, logps, repeated))
        what = f"decode steps {what}: other than launched"
        report(what, row(what, float(not same), 0.0))
