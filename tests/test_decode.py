"""Decoding: its cache and shapes, against the full forward pass and transformers; the draw."""

import weakref

import pytest
import torch
from torch.nn.functional import linear

from models.decoding.cache import Cache
from models.decoding.draw import BLOCK, Sampling, sample
from models.decoding.generate import generate
from models.decoding.graphs import Graphs
from models.decoding.rectangle import SHAPES, HalvedRectangle, few_lengths, halved
from models.decoding.storage import cast
from models.mixer import Layout
from models.qwen_vl import image_features
from tests.peer import reference_inputs, reference_model
from tests.test_models import GRIDS
from tests.tiny import IMAGE, family_config, stop_strings, tiny_config, tiny_model, tiny_prompt


def greedy(length, **options):
    return Sampling(length, temperature=0, **options)


def test_cached_decoding_equals_the_full_forward():
    """Prompts of different lengths, samples that stop at different times."""
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    sampling = Sampling(12, stop_ids=(3, 7, 11, 20, 31))
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    uniforms = torch.rand(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    completions, logps = generate(model, prompts, 3, sampling, uniforms)
    lengths = {len(c) for c in completions}
    assert len(lengths) > 3, f"all samples end alike {lengths}: a blunt test"
    for i, (completion, logp) in enumerate(zip(completions, logps, strict=True)):
        prompt = prompts[i // 3]
        assert not set(completion[:-1]) & set(sampling.stop_ids)
        steps = torch.arange(len(completion)) + prompt.next_position
        hidden = model(
            torch.cat([prompt.input_ids, torch.tensor(completion)]),
            torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1),
            model.bounds([(len(prompt) + len(completion),)]),
            image_features(model, [prompt]),
        )[len(prompt) - 1 : -1]
        logits = linear(hidden, model.head_weight)
        logits[:, model.suppressed_ids] = float("-inf")
        expected = logits.log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(logp.double(), expected, atol=1e-6, rtol=1e-6)


def test_greedy_text_equals_transformers_generate():
    model = tiny_model(tiny_config(), torch.float32, scale=6)
    peer = reference_model(model, torch.float32)
    stop = (7, 11)
    for seed, grids in enumerate([*GRIDS.values()] * 2):
        prompt = tiny_prompt(model.config, grids, seed=seed)
        (own,), _ = generate(model, [prompt], 1, greedy(24, stop_ids=stop), torch.zeros(1, 24))
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": list(stop)}
        out = peer.generate(**reference_inputs(prompt, torch.float32), pad_token_id=0, **options)
        assert own == out[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_the_company_they_are_drawn_in():
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    sampling = Sampling(10, stop_ids=(3, 7))
    uniforms = torch.rand(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together, _ = generate(model, prompts, 2, sampling, uniforms)
    for i, prompt in enumerate(prompts):
        alone, _ = generate(model, [prompt], 2, sampling, uniforms[2 * i : 2 * i + 2])
        assert alone == together[2 * i : 2 * i + 2]


def test_long_prompts_are_prefilled_some_at_a_time(monkeypatch):
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    uniforms = torch.rand(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, _ = generate(model, prompts, 2, Sampling(10, stop_ids=(3, 7)), uniforms)
    passes, original = [], model.hidden_states

    def counted(ids, *rest):
        passes.append(len(ids))
        return original(ids, *rest)

    monkeypatch.setattr(model, "hidden_states", counted)
    monkeypatch.setattr("models.decoding.generate.PREFILL", sum(map(len, prompts[:2])))
    found, _ = generate(model, prompts, 2, Sampling(10, stop_ids=(3, 7)), uniforms)
    assert found == expected
    assert passes == [sum(map(len, prompts[:2])), len(prompts[2])]


def test_sampler_draws_from_the_softmax():
    """Chi-square of 40,000 draws, with temperature, top-k, top-p, min-p and suppression."""
    from scipy.stats import chisquare

    torch.manual_seed(0)
    logits = 2 * torch.randn(12)
    logits[4] = float("-inf")
    count = 40_000
    uniform = torch.rand(count, dtype=torch.float64)
    cuts = [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.9}, {"min_p": 0.1}]
    for options in (*cuts, {"top_k": 7, "top_p": 0.95, "min_p": 0.2}):
        sampling = Sampling(1, temperature=1.3, **options)
        tokens, logps = sample(logits.repeat(count, 1), sampling, uniform)
        full = (logits / 1.3).softmax(0)
        torch.testing.assert_close(logps, full.log()[tokens])
        probs = full.clone()
        if "top_k" in options:
            probs[probs < probs.topk(options["top_k"]).values[-1]] = 0
        if "top_p" in options:
            order = probs.argsort(descending=True)
            held, kept = 0.0, []
            for token in order.tolist():
                if held < options["top_p"] * probs.sum():
                    kept.append(token)
                held += float(probs[token])
            probs[[t for t in range(12) if t not in kept]] = 0
        if "min_p" in options:
            assert probs[(probs > 0) & (probs < options["min_p"] * full.max())].any(), "blunt"
            probs[probs < options["min_p"] * full.max()] = 0
        counts = torch.bincount(tokens, minlength=12)
        assert not counts[probs == 0].any()
        expected = probs.double()[probs > 0]
        expected *= count / expected.sum()
        assert chisquare(counts[probs > 0], expected).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_may_be_drawn_is_what_transformers_keeps(dtype):
    """Every token that a draw can reach, against transformers' warpers in their order, in which
    min-p comes last. Greedy knows none of them."""
    from transformers import generation

    generator = torch.Generator().manual_seed(0)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for trial in range(20):
        logits = 2 * torch.randn(1, 30, generator=generator, dtype=dtype)
        logits[0, trial] = float("-inf")
        for top_k, top_p, min_p in ((0, 1.0, 0.1), (0, 1.0, 1.0), (9, 0.9, 0.2), (0, 0.7, 0.05)):
            scores = generation.TemperatureLogitsWarper(0.8)(None, logits)
            if top_k:
                scores = generation.TopKLogitsWarper(top_k)(None, scores)
            scores = generation.TopPLogitsWarper(top_p)(None, scores)
            scores = generation.MinPLogitsWarper(min_p)(None, scores)
            sampling = Sampling(1, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
            tokens, logps = sample(logits.float().repeat(4000, 1), sampling, uniform)
            kept = (scores[0] > float("-inf")).nonzero().squeeze(1)
            assert tokens.unique().tolist() == kept.tolist()
            before = (logits / 0.8).float().log_softmax(1)[0]  # of all tokens
            torch.testing.assert_close(logps, before[tokens])
    assert Sampling(1, min_p=0.3).greedy().min_p == 0


def test_sampler_survives_the_ends_of_the_unit_interval():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for uniform, expected in ((torch.zeros(1, dtype=torch.float64), 1), (last, 2)):
        assert sample(logits, Sampling(1), uniform)[0].item() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_not_sampled_from(temperature):
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    prompt = tiny_prompt(model.config, [])
    with pytest.raises(FloatingPointError, match="diverged"):
        generate(model, [prompt], 2, Sampling(3, temperature), torch.full((2, 3), 0.5).double())


@pytest.mark.parametrize("size, needed, expected", [(8, 5, 8), (8, 4, 4), (7, 4, 4), (7, 1, 1)])
def test_a_side_is_halved_as_often_as_it_can_be(size, needed, expected):
    assert halved(size, needed) == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_the_shapes_for_a_gpu_draw_the_same_tokens(monkeypatch, family):
    """Slots of nobody, samples that are drawn on after their end, halved rectangles."""
    model = tiny_model(family_config(family))
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    sampling = Sampling(21, stop_ids=tuple(range(0, 50, 4)))
    uniforms = torch.rand(24, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = generate(model, prompts, 8, sampling, uniforms)
    sizes = []
    original = Cache.shrink
    monkeypatch.setattr(
        Cache,
        "shrink",
        lambda self, *args: (original(self, *args), sizes.append(self.layout[:2])),
    )
    monkeypatch.setitem(SHAPES, "cpu", HalvedRectangle(2, 8))
    found = generate(model, prompts, 8, sampling, uniforms)
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert len(sizes) > 1, "it never shrank"


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 1000, 1024])
def test_a_draw_inverts_the_cumulative_sum_over_many_blocks(vocabulary):
    """Against one long sum in float64, at the ends too, and no token of weight 0."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(300, vocabulary, generator=generator) * 3
    if vocabulary > 1:
        gone = torch.rand(300, vocabulary, generator=generator) < 0.5
        gone[torch.arange(300), torch.randint(vocabulary, (300,), generator=generator)] = False
        logits.masked_fill_(gone, float("-inf"))
    uniform = torch.rand(300, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    if vocabulary > 1:  # the largest number, and nothing to draw in the last block
        logits[1, 0], logits[1, -min(BLOCK, vocabulary - 1) :] = 0.0, float("-inf")
    token, logp = sample(logits, Sampling(1), uniform)
    probs = logits.double().softmax(1)
    upper = probs.cumsum(1).gather(1, token[:, None]).squeeze(1)
    chosen = probs.gather(1, token[:, None]).squeeze(1)
    assert (chosen > 0).all()
    assert (uniform <= upper + 1e-6).all() and (uniform >= upper - chosen - 1e-6).all()
    torch.testing.assert_close(logp, chosen.log().float(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_replayed_steps_draw_what_launched_ones_draw(family):
    """As tests/emulated_gpu/test_decoding.py, on a device: the cache grows, weights and their
    copies change, stop strings end completions."""
    model = cast(tiny_model(family_config(family), torch.float32).to("cuda"), torch.bfloat16)
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    graphs = Graphs(model)
    for limit in (30, 70, 70, 30):
        ends = tuple(range(0, 60, 12))
        sampling = Sampling(limit, stop_ids=ends, stop=stop_strings((b"abbab",), ends))
        uniforms = torch.rand(24, limit, dtype=torch.float64)
        found = []
        for model.graphs in (graphs, None):
            ids, logps = generate(model, prompts, 8, sampling, uniforms)
            found.append((ids, [logp.tolist() for logp in logps]))
        assert found[0] == found[1]
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("length, expected", [(1, 64), (65, 128), (300, 320), (1000, 1024)])
def test_lengths_are_rounded_to_few(length, expected):
    assert few_lengths(length) == expected
    assert len({few_lengths(n) for n in range(513, 1025)}) == 4


def test_a_cache_that_grows_is_freed_first():
    cache = Cache(tiny_config(), torch.float32, torch.device("cpu"))
    cache.prepare(Layout(2, 3, 5, 7))
    (memory,) = cache.memory.values()
    old, kept = weakref.ref(memory), memory.data_ptr()
    del memory
    cache.prepare(Layout(1, 3, 5, 7))
    assert old().data_ptr() == kept and cache.holds(Layout(2, 3, 5, 7))
    alive, zeros = [], torch.zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *a, **k: alive.append(old()) or zeros(*a, **k))
        cache.prepare(Layout(2, 3, 5, 8))
    assert alive == [None]
