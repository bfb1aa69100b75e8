"""Run on the emulated device by test_decoding.py: prints what it found as JSON.

For each family, and with adapters: operations and waits of a decoded token, for two depths; and
whether captured steps draw what the same steps draw operation by operation, before and after the
weights have changed. With stop strings: the same counts, and whether completions are those that the
CPU draws without them, cut short.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import models.decoding.graphs
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.decoding.graphs import Graphs
from models.decoding.storage import cast
from models.families import FAMILIES
from models.lora import LoRA
from tests.tiny import cut_short, family_config, stop_strings, tiny_model, tiny_prompt

OPERATIONS, WAITS = torch._rehearsal
SHORT, LONG, GROUP = 33, 97, 4  # tokens: both end with a look at what has ended


def make(family: str, layers: int, adapters: bool = False, kind: str | None = None):
    """kind: of all layers, where a family has several; None takes them in turn."""
    config = family_config(family)
    types = layers * config.layer_types if kind is None else layers * (kind,)
    config = replace(config, num_hidden_layers=layers, layer_types=types[:layers])
    model = tiny_model(config, torch.float32)
    if adapters:
        model.adapt(LoRA(4, 8.0))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return cast(model, torch.bfloat16).to("cuda")


def prompts_of(model):
    return [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(([], [(4, 4)]))]


def drawn(model, tokens: int, **options):
    generator = torch.Generator().manual_seed(tokens)
    uniforms = torch.rand(2 * GROUP, tokens, dtype=torch.float64, generator=generator)
    return generate(model, prompts_of(model), GROUP, Sampling(tokens, **options), uniforms)


def per_token(model, **options) -> tuple[Counter, float]:
    """Operations of a token by name, and waits."""
    drawn(model, 2, **options)  # tables that are made once
    counts = []
    for tokens in (SHORT, LONG):
        before = Counter(OPERATIONS), Counter(WAITS)
        drawn(model, tokens, **options)
        counts.append((Counter(OPERATIONS) - before[0], Counter(WAITS) - before[1]))
    (short, few), (long, many) = counts
    long.subtract(short)
    many.subtract(few)
    between = LONG - SHORT
    return Counter({n: c / between for n, c in long.items()}), sum(many.values()) / between


def launches(family: str, adapters: bool, kind: str | None = None) -> dict:
    (small, waits), (large, _) = (per_token(make(family, n, adapters, kind)) for n in (4, 8))
    layer = (sum(large.values()) - sum(small.values())) / 4
    return {"layer": layer, "rest": sum(small.values()) - 4 * layer, "waits": waits}


def captured(family: str, adapters: bool) -> dict:
    """Samples that end at different times, so that the shapes change."""
    model, same, replays = make(family, 4, adapters), [], 0
    graphs, pools = Graphs(model), set()
    for change in range(4):  # the cache grows; stays; there are too many graphs
        models.decoding.graphs.MOST = 1 if change == 3 else 48
        found = []
        for model.graphs in (graphs, None):
            before = OPERATIONS["graph replays"]
            ids, logps = drawn(model, SHORT + 16 * min(change, 1), stop_ids=tuple(range(0, 60, 12)))
            found.append((ids, [logp.tolist() for logp in logps]))
            replays += OPERATIONS["graph replays"] - before
        same.append(found[0] == found[1])
        pools.add(graphs._pool)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name if adapters else "visual" not in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
    lengths = {len(completion) for completion in found[0][0]}
    return {"same": same, "replays": replays, "lengths": len(lengths), "pools": len(pools)}


def stopped() -> dict:
    """At limits that end at a look, before it, and before the first one."""
    model = make("qwen2_vl", 4)
    never = stop_strings((b"c",), ())
    (plain, _), (more, waits) = per_token(model), per_token(model, stop=never)
    stop_ids, found = (5, 50), []
    stop = stop_strings((b"abbab", b"bbbbb"), stop_ids)
    uniforms = torch.rand(2 * GROUP, LONG, dtype=torch.float64)

    def at(limit: int, **options) -> list[list[int]]:
        sampling = Sampling(limit, min_p=0.01, **options)
        return generate(model, prompts_of(model), GROUP, sampling, uniforms[:, :limit])[0]

    model = cast(model, torch.float32).to("cpu")
    expected = [cut_short(ids, stop, stop_ids) for ids in at(LONG)]
    model = model.to("cuda")
    for graphs in (None, Graphs(model)):
        model.graphs = graphs
        for limit in (LONG, SHORT - 1, 2):
            ids = at(limit, stop_ids=stop_ids, stop=stop)
            found.append(ids == [one[:limit] for one in expected])
    lengths = {len(one) for one in expected}
    operations = sum(more.values()) - sum(plain.values())
    return {"operations": operations, "waits": waits, "same": found, "lengths": len(lengths)}


def main() -> None:
    cases = [(family, False) for family in FAMILIES]
    cases += [("qwen2_5_vl", True), ("qwen3_5", True)]
    found = {
        family + " with adapters" * adapters: launches(family, adapters)
        | captured(family, adapters)
        for family, adapters in cases
    }
    for kind in ("full_attention", "linear_attention"):
        found[f"qwen3_5 {kind}"] = launches("qwen3_5", False, kind)
    found["stop strings"] = stopped()
    print(json.dumps(found))


main()
