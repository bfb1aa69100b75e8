"""What a step's products are counted as: against torch's counter, masks drawn in full, and what
benchmarks/launches.py sees at the dispatcher."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import launches
from grpo.logps import pack_chunks, pack_logps
from grpo.pack import Pack, filler, make_packs
from grpo.rollout import Group
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.families import FAMILIES, mixers_of
from models.flops import Flops, Pass
from models.four_bit import use_four_bits
from models.lora import LoRA, without_adapters
from models.qwen_vl import QwenVL, with_image_features
from tests.tiny import family_config, tiny_model, tiny_prompt

GRIDS = [[(4, 8), (12, 8)], [(6, 6)], []]  # 16 pixels a side are a window of Qwen2.5-VL's: 4 x 4


def tiny_pack(config, features=None) -> Pack:
    """Three prompts, of two images, one and none, and completions of odd lengths."""
    prompts = [tiny_prompt(config, grids, seed=seed) for seed, grids in enumerate(GRIDS)]
    if features is not None:
        prompts = with_image_features(features, prompts)
    groups = []
    for prompt, lengths in zip(prompts, ([3, 7, 1], [4], [2, 2]), strict=True):
        ids, logps = [[1] * n for n in lengths], [torch.zeros(n) for n in lengths]
        groups.append(Group(prompt, ids, logps))
        groups[-1].advantages = groups[-1].weights = torch.ones(len(lengths))
    return make_packs(groups, 10**6)[0]


def train(model: QwenVL, pack: Pack) -> None:
    for tokens in pack_chunks(model, pack, 1.0):
        tokens.logps.sum().backward()


def matrix_products(work) -> int:
    """What torch's counter makes of all products of two matrices. Attention and the delta rule are
    batches of products; SDPA on a CPU is not counted by torch at all."""
    in_place = torch.ops.aten.addmm_  # which torch's counter does not know

    def shapes(_, a, b, **options) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={in_place: shapes}) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, in_place))


def seen(rows) -> int:
    """Pairs of a query and a key that it sees, one by one."""
    pairs = 0
    for prompt, *completions in rows:
        pairs += sum(1 for q in range(prompt) for k in range(prompt) if k <= q)
        for n in completions:
            pairs += sum(1 for q in range(n) for k in range(prompt + n) if k <= prompt + q)
    return pairs


def between_tokens(config, rows) -> int:
    """Of all decoder layers' forward passes: q k^T and its product with v, or the delta rule."""
    total, delta = 0, config.delta
    for kind in mixers_of(config):
        if kind.NAME == "self_attn":
            total += 2 * 2 * config.num_attention_heads * config.head_dim * seen(rows)
        else:  # S^T k, S^T q and k x^T for each head and token
            total += 3 * 2 * delta.values * delta.key_dim * delta.value_dim * sum(map(sum, rows))
    return total


def between_patches(model, images) -> int:
    """Of all blocks' forward passes, with windows as the tower cuts them."""
    vision, total, unit = model.config.vision, 0, 4
    for block in range(vision.depth):
        full = vision.window_size == 0 or block in vision.fullatt_block_indexes
        rows = [h * w for _, h, w in images] if full else None
        if rows is None:
            rows = [unit * size for size in model.visual.windows([list(g) for g in images])[1]]
        total += 2 * 2 * vision.embed_dim * sum(n * n for n in rows)
    return total


LORA = {
    "LoRA": LoRA(r=3, alpha=6),
    "LoRA on v": LoRA(r=3, alpha=6, targets=("v_proj",)),
    "LoRA, tower too": LoRA(r=3, alpha=6, targets=("visual.qkv", "o_proj", "down_proj")),
}


CASES = [(family, "all") for family in FAMILIES]
CASES += [("qwen3_5", "frozen tower"), ("qwen2_vl", "LoRA"), ("qwen3_5", "LoRA")]
CASES += [("qwen2_vl", "LoRA on v"), ("qwen2_5_vl", "LoRA, tower too")]


@pytest.mark.parametrize("family, trained", CASES)
def test_a_pass_is_what_torch_counts(family, trained):
    """Forward alone, and with its backward pass."""
    config = family_config(family, tied=trained == "LoRA")
    model = tiny_model(config, torch.float32)
    frozen = trained not in ("all", "LoRA, tower too")
    if trained in LORA:
        model.adapt(LORA[trained])
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    if frozen:
        model.visual.requires_grad_(False)
    pack = tiny_pack(config, features=model if frozen else None)
    rows, images = pack.segments, [(1, h, w) for grids in GRIDS for h, w in grids]
    attention = between_tokens(config, rows)
    attention += 0 if frozen else between_patches(model, images)

    def score() -> None:
        with torch.no_grad():
            pack_logps(model, pack, 1.0)

    for work, times in ((score, 1), (lambda: train(model, pack), 3)):
        model.passes.clear()
        expected = matrix_products(work) + times * attention
        assert sum(map(Flops(model), model.passes)) == expected
    if trained in LORA:
        model.passes.clear()
        with without_adapters(model):
            base = matrix_products(score)
        assert sum(map(Flops(model), model.passes)) == base + attention


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_one_pass_over_prompts_and_completions(family):
    """Each prompt once and the first token from it, then every token but the last through the
    decoder: torch counts as many linear products while 8 x 2 samples are drawn to the end."""
    config, limit = family_config(family), 5
    model = tiny_model(config, torch.float32)
    prompts = [tiny_prompt(config, [(4, 4)], seed=seed) for seed in range(8)]
    uniforms = torch.rand(16, limit, dtype=torch.float64)
    sampling = Sampling(limit)
    expected = matrix_products(lambda: generate(model, prompts, 2, sampling, uniforms))
    rows = [(len(prompt), limit - 1, limit - 1) for prompt in prompts]
    attention = between_tokens(config, rows) + between_patches(model, [(1, 4, 4)] * 8)
    assert sum(map(Flops(model), model.passes)) == expected + attention


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_launches_counts_at_the_dispatcher(family):
    """Without a backward pass, where FlashAttention counts what is seen. The chunks of the delta
    rule take more than the rule: products within a chunk, which grow with its length."""
    config, side, completion = family_config(family), 4, 6
    found = {}
    for name, count in launches.phases(config, "meta", side**2, completion, 10**9):
        found[name] = count.flops
        if name == "reference":
            break
    prompt, prompts = launches.TEXT + side**2, launches.PROMPTS
    tokens = prompts * launches.GROUP * completion
    rows = ((prompt, *[completion] * launches.GROUP),) * prompts
    grids, flops = ((1, 2 * side, 2 * side),) * prompts, Flops(launches.build(config, "meta"))
    assert found["vision tower"] == flops(Pass(grids=grids))
    prefill = flops(Pass(((prompt,),) * prompts, prompts))
    prefill -= prompts * 2 * config.hidden_size * config.vocab_size  # launches leaves the head out
    reference = flops(Pass(rows, tokens, grids))
    if config.delta is None:
        assert (found["prefill"], found["reference"]) == (prefill, reference)
    else:
        assert prefill < found["prefill"] < 1.1 * prefill
        assert reference < found["reference"] < 1.1 * reference


def test_weights_in_4_bits_take_the_same_products():
    """They are unpacked, but not multiplied more often."""
    one, found = Pass(((5, 2, 2),), 4, is_trained=True, is_adapted=True), []
    for in_four_bits in (False, True):
        with torch.device("meta"):
            model = QwenVL(family_config("qwen3_5"))
            if in_four_bits:
                use_four_bits(model.model.layers)
            model.adapt(LoRA(r=3, alpha=6))
        found.append(Flops(model)(one))
    assert found[0] == found[1]


def test_what_nobody_reads_is_not_counted():
    config = family_config("qwen2_vl")
    model = tiny_model(config, torch.float32)
    with torch.no_grad():
        pack_logps(model, filler(), 1.0)
    assert model.passes == []
