"""What each phase of a step launches and how often it waits for the device; predicted times.

    FOLDER/python benchmarks/launches.py --family qwen2_vl --json FILE
    python -m benchmarks.launches --predict "Qwen2-VL 2B" "Qwen2.5-VL 7B"

The first needs the emulated device that CONTRIBUTING.md describes: a random model of the published
depth and structure, but narrow, in bfloat16 with variable-length FlashAttention. Width does not
change how much is launched. The second needs no device: the published shapes on torch's meta
device, 8 (--prompts) prompts of an image of 448 pixels (512 from Qwen3-VL on: 256 tokens) and 44
more tokens x 8 completions of 256 tokens, with gradient checkpointing. Each operation takes the
larger of two times: its multiplications at 800 TFLOP/s (those in float32, as Qwen3.5's delta rule
has, are slower), and what it reads and writes at 3.0 TB/s. A phase takes the sum of these, but at
least 5 microseconds a launch. Decoding is a formula. What one operation launches beside one kernel
(a sort, say) is not counted. --peer counts TRL's step of the same work beside it
(benchmarks/peer_work.py).
"""

import argparse
import functools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dispatch import BANDWIDTH, FLOPS, Count, Norm, count_fused  # noqa: E402
from benchmarks.memory import SIZES, published  # noqa: E402
from benchmarks.peer_work import Work, beside, step  # noqa: E402
from grpo.engine.optimizer import Optimizer, total_norm  # noqa: E402
from grpo.flags.config import TrainingConfig  # noqa: E402
from grpo.logps import pack_chunks, pack_logps  # noqa: E402
from grpo.loss import policy_loss  # noqa: E402
from grpo.pack import Pack, make_packs  # noqa: E402
from grpo.rollout import Group  # noqa: E402
from grpo.tally import Tally  # noqa: E402
from models.attention import Attention  # noqa: E402
from models.config import QwenVLConfig  # noqa: E402
from models.decoding.cache import Cache  # noqa: E402
from models.decoding.storage import allocate, cast  # noqa: E402
from models.delta_net import WINDOW, DeltaState, GatedDeltaNet  # noqa: E402
from models.families import mixers_of, parse_config  # noqa: E402
from models.flops import Flops, Pass  # noqa: E402
from models.four_bit import use_four_bits  # noqa: E402
from models.lora import LoRA, without_adapters  # noqa: E402
from models.mixer import Layout  # noqa: E402
from models.prompt import Prompt, mrope_position_ids  # noqa: E402
from models.qwen_vl import QwenVL, image_features, with_image_features  # noqa: E402

FAMILIES = {
    "qwen2_vl": "Qwen2-VL 2B",
    "qwen2_5_vl": "Qwen2.5-VL 7B",
    "qwen3_vl": "Qwen3-VL 2B",
    "qwen3_5": "Qwen3.5 2B",
}
OPTIMIZERS = ("adamw_torch", "adamw_8bit")
LAUNCH = 5e-6  # seconds
INSTRUCTIONS = 300  # a weight in 8 bits, of the light optimizers' kernel compiled for sm_90
ISSUED = 132 * 128 * 1.7e9  # an H100's, a second: cores' lanes x clock
PROMPTS, GROUP, COMPLETION, TEXT = 8, 8, 256, 44
IMAGE = 256  # tokens
ADAPTERS: LoRA | None = None  # on the decoder's layers, with all else frozen
IN_4_BITS = False  # the decoder's layers; of benchmarks/gpu, which counts how they are unpacked


# ---- the work of a step -------------------------------------------------------------------------


def narrow(name: str) -> dict:
    """config.json of a published model, of its depth and heads, with few entries and heads of which
    8 numbers are rotated."""
    raw = published(name) | {"image_token_id": 1001, "video_token_id": 1002}
    raw |= {"vision_start_token_id": 1003, "vision_end_token_id": 1004}
    text = raw.get("text_config", raw)
    text |= {"hidden_size": 8 * text["num_attention_heads"], "vocab_size": 1016}
    rope = text.get("rope_scaling") or text["rope_parameters"]
    rope["mrope_section"] = [2, 1, 1]
    text |= {"intermediate_size": 104, "num_hidden_layers": 28}
    text |= {"head_dim": int(8 / rope.get("partial_rotary_factor", 1))}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}  # Qwen3.5's
    vision, wide = raw["vision_config"], 8 * raw["vision_config"]["num_heads"]
    for key in ("out_hidden_size", "hidden_size", "embed_dim"):
        outer = key == "out_hidden_size" or "embed_dim" in vision and key == "hidden_size"
        if key in vision:
            vision[key] = text["hidden_size"] if outer else wide
    if "intermediate_size" in vision:
        vision["intermediate_size"] = 112
    return raw | {"vision_config": vision | {"depth": 32}}


def build(config: QwenVLConfig, device: str) -> QwenVL:
    with torch.device("meta"):
        model = QwenVL(config, "flash_attention_2")
        if IN_4_BITS:
            use_four_bits(model.model.layers)
    if device == "meta":
        model = cast(model, torch.bfloat16)
        if ADAPTERS is not None:
            model.adapt(ADAPTERS)
    else:
        model = allocate(model, torch.bfloat16, device).initialize()
    model.suppressed_ids = torch.tensor([1], device=device)
    model.model.gradient_checkpointing = model.visual.gradient_checkpointing = True
    return model


def make_groups(config: QwenVLConfig, image_tokens: int, completion: int) -> list[Group]:
    """Prompts with an image each, and completions, all of one length."""
    side, groups = math.isqrt(image_tokens), []
    n = side * config.vision.spatial_merge_size
    for index in range(PROMPTS):
        ids = torch.zeros(TEXT + image_tokens, dtype=torch.int64)
        ids[TEXT // 2 : TEXT // 2 + image_tokens] = config.image_token_id
        grid, pixels = torch.tensor([[1, n, n]]), torch.randn(n * n, config.vision.patch_dim)
        places = mrope_position_ids(ids, grid, config)
        prompt = Prompt(ids, *places, pixels, grid, (str(index),))
        answers = [[2] * completion] * GROUP, [torch.zeros(completion)] * GROUP
        groups.append(Group(prompt, *answers, [False] * GROUP))
    return groups


def train(
    model: QwenVL,
    packs: list[Pack],
    tally: Tally,
    config: TrainingConfig,
    chunk: int | None = None,
) -> None:
    """As train_cls.py does."""
    for pack in packs:
        for tokens in pack_chunks(model, pack, 1.0, chunk=chunk):
            loss, stats = policy_loss(tokens, config)
            loss.backward()
            tally.add(pack, tokens, loss, stats)


def phases(config: QwenVLConfig, device: str, image_tokens: int, completion: int, limit: int):
    """Yields (name, Count) of each phase. limit: tokens in a pack."""
    model, meta = build(config, device), device == "meta"
    settings = TrainingConfig(model_name_or_path="m", dataset_name="d")
    groups = make_groups(config, image_tokens, completion)
    prompts = [group.prompt for group in groups]
    ones = torch.ones(len(groups), GROUP)
    for group, line in zip(groups, ones, strict=True):
        group.advantages = group.weights = line
    if ADAPTERS is not None:  # the tower is frozen, and its features are kept for all passes
        for group in groups:
            (group.prompt,) = with_image_features(model, [group.prompt])
    packs = make_packs(groups, limit)
    tokens, lengths = len(packs[0].targets), [len(prompt) for prompt in prompts]
    ids = torch.cat([prompt.input_ids for prompt in prompts]).to(device)
    positions = torch.cat([prompt.position_ids for prompt in prompts], 1).to(device)
    last = (torch.tensor(lengths).cumsum(0) - 1).to(device)
    inside = functools.partial(Count, config.vocab_size)

    with torch.no_grad():
        with inside() as count:
            features = image_features(model, prompts)
        yield "vision tower", count
        with inside() as count:
            bounds = model.bounds([(length,) for length in lengths])
            cache = Cache(config, model.dtype, torch.device(device))
            cache.prepare(Layout(len(prompts), GROUP, max(lengths), completion))
            cache.expect(0, lengths)
            model(ids, positions, bounds, features, cache, last)
        yield "prefill", count
        with inside() as count, without_adapters(model):
            for pack in packs:
                pack.ref_logps = pack_logps(model, pack, 1.0, None if meta else tokens)
        yield "reference", count
    for name in OPTIMIZERS:
        model = build(config, device)
        optimizer, tally = Optimizer(model, 0.0, optim=name), Tally(settings)
        for parts in (1, 2) if not meta else (0,):  # parts: chunks of the head
            with inside() as count:
                train(model, packs, tally, settings, tokens // parts if parts else None)
            yield f"training, {name}" + ", two chunks" * (parts == 2), count
            if parts == 1:
                optimizer.step(1e-6, 1.0)  # the first makes moments
        with inside() as count:
            if meta:
                update_on_meta(optimizer, one_pass=True)
            else:
                _ = tally.drift, tally.is_finite()  # before a step's first update
                optimizer.step(1e-6, 1.0)
        yield f"optimizer, {name}", count
        if meta and optimizer.light is not None:
            with inside() as count:
                update_on_meta(optimizer, one_pass=False)
            yield f"optimizer, {name}, operation by operation", count


def update_on_meta(optimizer: Optimizer, one_pass: bool) -> None:
    """`Optimizer.step`, which reads a norm, without reading it. one_pass: matrices of a light
    optimizer are updated by its Triton kernel, which takes the longer of its bytes and its
    instructions."""
    norm = total_norm(list(optimizer.gradients().values()))
    if optimizer.light is not None:
        optimizer.light.kernel = count_kernel if one_pass else None
        optimizer.light.step(1e-6, 1, 1.0)
    masters = [m for group in optimizer.adamw.param_groups for m in group["params"]]
    if masters:
        torch._foreach_mul_([m.grad for m in masters], norm)  # as clipping does
    if Norm.count is not None:  # fused AdamW: reads four numbers and writes three
        Norm.count.operations["_fused_adamw_"] += 2
        Norm.count.take(0, 7 * sum(m.nbytes for m in masters))
    optimizer._write_back()


def count_kernel(weight, gradient, moments, *_, **__) -> None:
    """One launch of grpo/engine/adamw_kernel.py."""
    Norm.count.operations["adamw_kernel"] += 1
    size = gradient.nbytes + 2 * sum(t.nbytes for t in [weight, *moments[0], *moments[1]])
    Norm.count.bytes += size
    Norm.count.seconds += max(size / BANDWIDTH, weight.numel() * INSTRUCTIONS / ISSUED)


# ---- the two tables -----------------------------------------------------------------------------


def counted(family: str) -> dict:
    """Counts of each phase on the emulated device, and of one more chunk of the head."""
    config = parse_config(narrow(FAMILIES[family]), family)
    found = {}
    print("| phase | launches | on (chunk, V) | copies of it | waits |\n|---|---|---|---|---|")
    for name, count in phases(config, "cuda", 4, 6, 10**9):
        numbers = (count.launches, count.logits, count.logit_copies, count.waits.total())
        if "two chunks" in name:  # less those with one
            first = found[name.removesuffix(", two chunks")]["numbers"]
            numbers = tuple(b - a for a, b in zip(first, numbers, strict=True))
            name = name.replace("two chunks", "of it each chunk of the head")
        print(f"| {name} | " + " | ".join(map(str, numbers)) + " |", flush=True)
        found[name] = {"numbers": numbers, "waits": count.waits, "operations": count.operations}
    for name, row in found.items():
        if row["waits"] and "each chunk" not in name:
            print(f"\nwaits in {name}:")
            for line, times in row["waits"].most_common():
                print(f"  {times:4} {line}")
    return found


def predict(name: str, per_token: int, limit: int) -> dict:
    """Seconds of each phase on one H100, by what is counted at the published shapes."""
    config = parse_config(published(name), name)
    rows, passes = {}, {}
    F.rms_norm = lambda x, shape, weight, eps: Norm.apply(x, weight)
    count_fused()
    for phase, count in phases(config, "meta", IMAGE, COMPLETION, limit):
        rows[phase] = (count.flops, count.bytes, count.launches, count.seconds)
        passes[phase] = f"{phase} {count.elementwise / 1e9:.0f}"
        if phase == "prefill":
            rows |= decoding(config, per_token)
    print(
        f"\n{name}\n\n| phase | TFLOP | GB | launches | multiplications, ms | memory, ms | "
        "launches, ms | operation by operation, ms | predicted, ms | bound by |\n"
        + "|---" * 10
        + "|"
    )
    for phase, (flops, size, launches, busy) in rows.items():
        times = {"multiplications": flops / FLOPS, "memory": size / BANDWIDTH}
        times["launches"] = launches * LAUNCH
        row = {"flops": flops, "bytes": size, "launches": launches, "seconds": times}
        predicted = max(busy, times["launches"])
        rows[phase] = row | {"busy_s": busy, "predicted_s": predicted}
        ms = [f"{1e3 * x:.0f}" for x in (*times.values(), busy, predicted)]
        cells = [f"{flops / 1e12:.1f}", f"{size / 1e9:.0f}", f"{launches:,}", *ms]
        print(f"| {phase} | " + " | ".join(cells) + f" | {max(times, key=times.get)} |")
    print("GB by operations without products of matrices: " + "; ".join(passes.values()))
    every = {phase: row["predicted_s"] for phase, row in rows.items()}
    for how in ("eager", "in a captured graph"):
        for optim in OPTIMIZERS:
            parts = ["vision tower", "prefill", f"decoding, {how}", "reference"]
            parts += [f"training, {optim}", f"optimizer, {optim}"]
            total = sum(every[part] for part in parts)
            print(f"a step, decoding {how}, {optim}: {total:.2f} s")
    return rows


def decoding(config: QwenVLConfig, per_token: int) -> dict[str, tuple]:
    """All tokens but the first: weights and head are read once a token, a prompt's keys and values
    once a group, a sample's own as they grow, and logits are passed over five times in float32.

    A gated delta net's state is read once a token, and every WINDOW tokens its matrices are read
    and written, twice each (models/delta_net.py)."""
    with torch.device("meta"):
        model = QwenVL(config)
    if ADAPTERS is not None:
        model.adapt(ADAPTERS)
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.head_weight.numel()
    kinds = Counter(mixers_of(config))
    kv = 4 * kinds[Attention] * config.num_key_value_heads * config.head_dim
    samples, prompt, steps = PROMPTS * GROUP, TEXT + IMAGE, COMPLETION - 1
    keys = kv * (PROMPTS * prompt + samples * COMPLETION / 2)
    size = steps * (2 * weights + keys + 5 * 4 * samples * config.vocab_size)
    count, rows = Flops(model), ((prompt, *[steps] * GROUP),) * PROMPTS
    prefill = count(Pass(((prompt,),) * PROMPTS, PROMPTS))
    flops = count(Pass(rows, PROMPTS + samples * steps)) - prefill
    if delta := config.delta:
        numbers = delta.values * delta.key_dim * delta.value_dim  # of a layer's matrices
        state = DeltaState.nbytes(config, Layout(1, 1, 1, 1), torch.bfloat16)
        size += steps * samples * kinds[GatedDeltaNet] * (state + 4 * 4 * numbers / WINDOW)
    busy = max(flops / FLOPS, size / BANDWIDTH)
    eager, captured = (flops, size, steps * per_token, busy), (flops, size, steps, busy)
    return {"decoding, eager": eager, "decoding, in a captured graph": captured}


def main() -> None:
    global PROMPTS, COMPLETION, TEXT, IMAGE, ADAPTERS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--predict", nargs="+", choices=SIZES, metavar="MODEL")
    parser.add_argument("--decode_launches", type=int, default=500, help="a token, not captured")
    parser.add_argument("--tokens_per_pack", type=int, default=16384, help="of --predict")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of a rollout")
    parser.add_argument("--prompt_tokens", type=int, default=TEXT + IMAGE, help="of --predict")
    parser.add_argument("--image_tokens", type=int, default=IMAGE, help="of them, of --predict")
    parser.add_argument("--completion", type=int, default=COMPLETION, help="tokens, of --predict")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16, of --predict")
    parser.add_argument("--peer", action="store_true", help="TRL's step beside it, of --predict")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    PROMPTS, COMPLETION = options.prompts, options.completion
    IMAGE = options.image_tokens
    TEXT = options.prompt_tokens - IMAGE
    ADAPTERS = LoRA(r=16, alpha=32.0) if options.lora else None
    torch.manual_seed(0)
    if options.predict:
        numbers = options.decode_launches, options.tokens_per_pack
        found = {name: predict(name, *numbers) for name in options.predict}
        for name in options.predict if options.peer else ():
            work = Work(PROMPTS, GROUP, TEXT, IMAGE, COMPLETION, options.tokens_per_pack)
            config = parse_config(published(name), name)
            found[name]["TRL"] = beside(name, found[name], step(config, work, options.lora), LAUNCH)
    elif not hasattr(torch, "_rehearsal"):
        sys.exit(
            "launches.py counts on the emulated device that CONTRIBUTING.md describes: run it "
            "with that environment's python, or ask for --predict, which needs no device"
        )
    else:
        found = counted(options.family)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
