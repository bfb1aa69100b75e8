"""The door of a layer kind (models/mixer.py): a recurrent layer, written here and nowhere else, is
trained on packed rows, sampled from, shrunk, adapted and counted."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import delta_net, qwen2_vl
from models.attention import Attention
from models.config import DeltaHeads
from models.decoding.cache import Cache, cache_bytes
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.decoding.product import Product, joined
from models.decoding.rectangle import SHAPES, HalvedRectangle, Rectangle, SmallestRectangle
from models.decoding.step import DecodeStep
from models.decoding.storage import allocate
from models.delta_net import GatedDeltaNet
from models.families import FAMILIES
from models.lora import LoRA
from models.mixer import Layout
from models.packed_attention import Bounds
from models.qwen_vl import QwenVL, image_features
from tests.tiny import IMAGE, family_config, tiny_config, tiny_model, tiny_prompt

HEADS, KEY, VALUE, TAIL = 3, 4, 5, 3
WIDTH = HEADS * (2 * KEY + VALUE)  # of q | k | v


def sizes(layout, dtype):
    """Bytes of a layer's matrices, which are float32 at least, and of its convolution's columns."""
    wide = torch.promote_types(dtype, torch.float32)
    matrices = layout.slots * HEADS * KEY * VALUE * wide.itemsize
    tails = layout.slots * TAIL * WIDTH * dtype.itemsize
    return wide, -(-matrices // 8) * 8, -(-tails // 8) * 8


class DecayState:
    """For each sample and head one matrix, and the last columns before the convolution."""

    def __init__(self, config, layout, memory, dtype):
        wide, matrices, tails = sizes(layout, dtype)
        count = layout.slots * HEADS * KEY * VALUE, layout.slots * TAIL * WIDTH
        self.matrices = memory[:, :matrices].view(wide)[:, : count[0]]
        self.matrices = self.matrices.unflatten(1, (layout.slots, HEADS, KEY, VALUE))
        self.tails = memory[:, matrices : matrices + tails].view(dtype)[:, : count[1]]
        self.tails = self.tails.unflatten(1, (layout.slots, TAIL, WIDTH))
        self.layout, self.count = layout, layout.slots

    @staticmethod
    def nbytes(config, layout, dtype):
        return sum(sizes(layout, dtype)[1:])

    def expect(self, first, lengths):
        self.expected = slice(first, first + len(lengths))

    def store(self, layer, matrices, tails):
        for kept, new in ((self.matrices, matrices), (self.tails, tails)):
            kept[layer].unflatten(0, (-1, self.layout.group))[self.expected] = new[:, None]

    def index(self, slots, lengths, tokens):
        assert len(slots) == self.count
        return ()

    def between(self, tokens):
        pass

    def shrink(self, move, layout, tokens):
        self.count = len(move.entries)
        for kept in (self.matrices, self.tails):
            kept[:, : self.count] = kept[:, move.entries]


class DecayStep:
    def __init__(self, config, mixers, device):
        self.mixers = mixers
        self.inputs = [Product.of(mixer.in_proj, mixer.in_proj_a) for mixer in mixers]
        self.out = [Product.of(mixer.out_proj) for mixer in mixers]
        self.tensors = [x for product in (*self.inputs, *self.out) for x in product.tensors]

    def begin(self, state, index, positions, tokens, bound):
        return state

    def __call__(self, layer, x, residual, state):
        matrices, tails = state.matrices[layer, : len(x)], state.tails[layer, : len(x)]
        column, decay = self.inputs[layer](x).split((WIDTH, HEADS), 1)
        window = torch.cat((tails, column[:, None]), 1)
        tails.copy_(window[:, 1:])
        out = self.mixers[layer].turn(window, decay.sigmoid(), matrices)
        return self.out[layer](out.to(x.dtype).flatten(1), add=residual)


class Decay(nn.Module):
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, after a causal convolution of q, k and v."""

    NAME = "linear_attn"
    JOINED = (("in_proj", "in_proj_a"),)
    ADAPTED = ("in_proj", "out_proj")
    State, Step = DecayState, DecayStep

    def __init__(self, config):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, WIDTH, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, HEADS, bias=False)
        self.conv = nn.Parameter(torch.empty(TAIL + 1, WIDTH))
        self.out_proj = nn.Linear(HEADS * VALUE, config.hidden_size, bias=False)

    @staticmethod
    def shared(config, position_ids, bounds, dtype):
        return bounds.rows

    @staticmethod
    def products(config, rows):
        """k v^T, and S^T q."""
        return 4 * HEADS * KEY * VALUE * sum(map(sum, rows))

    def turn(self, window, decay, matrices):
        """One token of N sequences; changes matrices (N, H, K, V) in place."""
        mixed = F.silu((window * self.conv).sum(1)).to(matrices.dtype)
        q, k, v = mixed.unflatten(1, (HEADS, -1)).split((KEY, KEY, VALUE), 2)
        matrices.mul_(decay[:, :, None, None].to(matrices.dtype)).add_(k[..., None] * v[:, :, None])
        return torch.einsum("nhk,nhkv->nhv", q, matrices)

    def run(self, columns, decay, matrix, tail):
        """A sequence that continues another: outputs, and the matrix and the columns at its end."""
        padded, outputs = torch.cat((tail, columns)), []
        for t in range(len(columns)):
            matrix = matrix.clone()
            window = padded[t : t + TAIL + 1]
            outputs.append(self.turn(window[None], decay[t : t + 1], matrix[None])[0].flatten())
        return torch.stack(outputs) if outputs else columns[:, :0], matrix, padded[-TAIL:]

    def forward(self, x, shared, store=None, read=None):
        columns, decay = self.in_proj(x), self.in_proj_a(x).sigmoid()
        wide = torch.promote_types(x.dtype, torch.float32)
        outputs, ends, start = [], [], 0
        for row in shared:
            before = x.new_zeros(HEADS, KEY, VALUE, dtype=wide), x.new_zeros(TAIL, WIDTH)
            for number, length in enumerate(row):
                part = slice(start, start + length)
                out, *after = self.run(columns[part], decay[part], *before)
                start, before = start + length, after if number == 0 else before
                outputs += [out] if length else []
            ends.append(before)
        if store is not None:
            store(*map(torch.stack, zip(*ends, strict=True)))
        out = torch.cat(outputs).to(x.dtype)
        return self.out_proj(out if read is None else out[read])


KINDS = {
    "first and last": (Decay, Attention, Decay),
    "first attention": (Attention, Decay, Decay),
    "no attention": (Decay, Decay, Decay),
    "attention": (Attention, Attention, Attention),
    "delta": (GatedDeltaNet, GatedDeltaNet, GatedDeltaNet),
    "three kinds": (GatedDeltaNet, Attention, Decay),
}
DELTA = DeltaHeads(keys=2, values=6, key_dim=5, value_dim=7, kernel=4)
by_kinds = pytest.mark.parametrize("kinds", KINDS)


@pytest.fixture
def mixed(monkeypatch):
    """Makes configs of a family whose layers are of these kinds, which only its file says."""

    def config(kinds: str, **changes):
        family = SimpleNamespace(
            MODEL_TYPE="mixed",
            VisionTower=qwen2_vl.VisionTower,
            mixer=lambda config, index: KINDS[kinds][index],
        )
        monkeypatch.setitem(FAMILIES, "mixed", family)
        return replace(tiny_config(), family="mixed", delta=DELTA, **changes)

    return config


def completion_hidden(model, prompt, completions, rows):
    """Hidden states of the completions, for one row of all of them or a row for each."""
    steps = [torch.arange(len(c)) + prompt.next_position for c in completions]
    ids, positions, bounds = [], [], []
    for row in rows:
        ids += [prompt.input_ids, *(completions[i] for i in row)]
        positions += [prompt.position_ids, *(steps[i].expand(3, -1) for i in row)]
        bounds.append((len(prompt), *(len(completions[i]) for i in row)))
    if len(rows) > 1:  # naive: the prompt and its completion are one sequence
        bounds = [(sum(row),) for row in bounds]
    hidden = model(
        torch.cat(ids),
        torch.cat(positions, 1),
        model.bounds(bounds),
        image_features(model, [prompt] * len(rows)),
    )
    parts = hidden.split([len(part) for part in ids])
    at = [2 * i + 1 for i in range(len(rows))] if len(rows) > 1 else range(1, len(parts))
    return torch.cat([parts[i] for i in at])


@by_kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_training_equals_a_copy_of_the_prompt_for_each_completion(
    mixed, kinds, checkpointing
):
    """Hidden states and every gradient, in float64."""
    model = tiny_model(mixed(kinds))
    model.model.gradient_checkpointing = checkpointing
    prompt = tiny_prompt(model.config, [(4, 4)])
    completions = [torch.randint(0, 56, (n,)) for n in (1, 7, 4)]
    results = []
    for rows in ([[0, 1, 2]], [[0], [1], [2]]):
        model.zero_grad()
        hidden = completion_hidden(model, prompt, completions, rows)
        (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters())])
    for packed, naive in zip(*results, strict=True):
        torch.testing.assert_close(packed, naive, atol=1e-9, rtol=1e-9)
    assert all(gradient.abs().max() > 1e-9 for gradient in results[0][1:])


def drawn_and_expected(model, prompts, group, sampling, seed=0):
    """(completions, log-probs as they were drawn, the same by the packed pass of one sequence)."""
    generator = torch.Generator().manual_seed(seed)
    limit = sampling.max_completion_length
    uniforms = torch.rand(len(prompts) * group, limit, dtype=torch.float64, generator=generator)
    completions, logps = generate(model, prompts, group, sampling, uniforms)
    expected = []
    for i, completion in enumerate(completions):
        prompt = prompts[i // group]
        steps = torch.arange(len(completion)) + prompt.next_position
        hidden = model(
            torch.cat([prompt.input_ids, torch.tensor(completion)]),
            torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1),
            model.bounds([(len(prompt) + len(completion),)]),
            image_features(model, [prompt]),
        )[len(prompt) - 1 : -1]
        logits = F.linear(hidden, model.head_weight)
        logits[:, model.suppressed_ids] = float("-inf")
        expected.append(logits.log_softmax(-1)[range(len(completion)), completion])
    return completions, logps, expected


@by_kinds
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("shapes", [SmallestRectangle(), HalvedRectangle(2, 8)])
def test_what_is_drawn_has_the_log_probs_of_the_packed_pass(
    mixed, monkeypatch, kinds, shapes, adapters
):
    """Prompts prefilled in parts; samples that end at different times; adapters beside weights;
    matrices that are added to every few tokens."""
    monkeypatch.setattr(delta_net, "WINDOW", 4)
    monkeypatch.setitem(SHAPES, "cpu", shapes)
    model = tiny_model(mixed(kinds, qk_norm=True, head_dim=12), torch.float64)
    if adapters:
        model.adapt(LoRA(3, 4.0))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.3)
        model = model.double()
    prompts = [tiny_prompt(model.config, g, seed=i) for i, g in enumerate(([], [(4, 6)], [(4, 4)]))]
    monkeypatch.setattr("models.decoding.generate.PREFILL", sum(map(len, prompts[:2])))
    moves, original = [], Cache.shrink

    def shrink(cache, move, tokens):
        original(cache, move, tokens)
        moves.append(cache.layout[:2])

    monkeypatch.setattr(Cache, "shrink", shrink)
    model.suppressed_ids = torch.tensor((IMAGE, 57, 58, 60))
    sampling = Sampling(15, stop_ids=tuple(range(0, 50, 4)))
    with torch.no_grad():
        completions, logps, expected = drawn_and_expected(model, prompts, 5, sampling)
    for found, wanted in zip(logps, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    assert len({len(completion) for completion in completions}) > 3 and len(set(moves)) > 1


def step_cases():
    for seed in range(3):
        for shapes in (SmallestRectangle(), HalvedRectangle()):
            for kind, qk_norm in ((Attention, False), (Attention, True), (Decay, False)):
                yield seed, shapes, kind, qk_norm
            yield seed, shapes, GatedDeltaNet, False


@pytest.mark.parametrize("seed, shapes, kind, qk_norm", step_cases())
def test_samples_that_end_leave_the_others_as_they_are(monkeypatch, seed, shapes, kind, qk_norm):
    """The rectangle shrinks, prompts leave it, slots stay empty: each sample sees its own tokens.

    Each step beside the packed pass over a sample's whole sequence by itself, in float64, but for
    the weights of the norms of q and k, which a step multiplies into its float32 rotation.
    """
    monkeypatch.setattr(delta_net, "WINDOW", 4)
    exact = 1e-6 if qk_norm else 1e-11
    torch.manual_seed(seed)
    chance, lengths, group, steps = random.Random(seed), [5, 3, 7], 4, 9
    config = replace(tiny_config(), hidden_size=24, head_dim=12, qk_norm=qk_norm, delta=DELTA)
    mixers = [kind(config).double().requires_grad_(False) for _ in range(2)]
    for parameter in (p for mixer in mixers for p in mixer.parameters()):
        parameter.normal_(0, 0.4)
    device = torch.device("cpu")
    layout = Layout(3, group, max(lengths) + 2, steps)
    size = kind.State.nbytes(config, layout, torch.float64)
    memory = torch.zeros(2, size, dtype=torch.uint8)
    state = kind.State(config, layout, memory, torch.float64)
    step_of = kind.Step(config, mixers, device)

    def packed(mixer, x, rows, store=None):
        positions = torch.cat([torch.arange(sum(row)) for row in rows]).expand(3, -1)
        shared = kind.shared(config, positions, Bounds(tuple(rows), device), torch.float64)
        return mixer(x, shared, store)

    past = {}  # sample -> what it has read, (tokens, hidden)
    for first, part in ((0, lengths[:2]), (2, lengths[2:])):
        x = torch.randn(sum(part), 24, dtype=torch.float64)
        state.expect(first, part)
        for layer, mixer in enumerate(mixers):
            keep = lambda *kept, layer=layer: state.store(layer, *kept)  # noqa: E731
            packed(mixer, x, [(length,) for length in part], keep)
        for b, prompt in enumerate(x.split(part), first):
            past |= {b * group + g: prompt for g in range(group)}
    rectangle = Rectangle(3, group, shapes)
    ended, shrank = [False] * 3 * group, set()
    index = state.index(rectangle.batch, lengths, 0)
    for step in range(steps):
        samples, prompts = rectangle.batch_samples(), rectangle.batch_prompts()
        x = torch.randn(len(samples), 24, dtype=torch.float64)
        residual = torch.randn_like(x)
        positions = torch.tensor([lengths[b] + step for b in prompts])
        state.between(step)
        shared = step_of.begin(state, index, positions, torch.tensor([step]), step + 1)
        found = [step_of(layer, x, residual.clone(), shared) - residual for layer in range(2)]
        for entry, sample in enumerate(samples):
            if sample == rectangle.nobody:
                continue
            past[sample] = torch.cat((past[sample], x[entry : entry + 1]))
            for layer, mixer in enumerate(mixers):
                expected = packed(mixer, past[sample], [(len(past[sample]),)])[-1]
                torch.testing.assert_close(found[layer][entry], expected, atol=exact, rtol=exact)
        running = [s for s in samples if s != rectangle.nobody and not ended[s]]
        for sample in chance.sample(running, min(len(running) - 1, chance.randint(0, 3))):
            ended[sample] = True
        if move := rectangle.drop(ended):
            layout = layout._replace(prompts=len(move.prompts), group=len(move.members[0]))
            state.shrink(move, layout, step + 1)
            shrank.add(layout)
            index = state.index(rectangle.batch, [lengths[b] for b in rectangle.prompts], step + 1)
    assert len(shrank) > 1 and layout.slots < 3 * group / 2


def test_adapters_are_on_the_layers_that_a_kind_names(mixed):
    model = tiny_model(mixed("first and last"))
    chosen = Counter(name.split(".", 3)[3] for name in LoRA(2, 2.0).layers(model))
    mlp = {f"mlp.{name}_proj": 3 for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj": 1 for name in "qkvo"}
    assert chosen == mlp | attention | {"linear_attn.in_proj": 2, "linear_attn.out_proj": 2}
    assert len(LoRA(2, 2.0, ("in_proj_a",)).layers(model)) == 2


def test_what_a_kind_joins_is_one_block_of_memory(mixed):
    with torch.device("meta"):
        model = QwenVL(mixed("first and last"))
    model = allocate(model, torch.float32, "cpu").initialize()
    mixer = model.model.layers[2].mixer
    block = joined((mixer.in_proj, mixer.in_proj_a))
    block[-1, -1] = 7
    assert mixer.in_proj_a.weight[-1, -1] == 7


@by_kinds
def test_bytes_of_the_cache_are_what_it_takes(mixed, kinds):
    config, cpu = mixed(kinds), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache(config, dtype, cpu)
        layouts = (Layout(2, 3, 5, 7), Layout(1, 3, 5, 7), Layout(1, 9, 3, 2))
        for layout in layouts:
            held = cache.holds(layout)
            cache.prepare(layout)
            taken = sum(memory.nbytes for memory in cache.memory.values())
            assert taken >= cache_bytes(config, layout, dtype)
            assert held or taken > cache_bytes(config, layout, dtype) - 1
        fresh = Cache(config, dtype, cpu)
        fresh.prepare(layouts[0])
        taken = sum(memory.nbytes for memory in fresh.memory.values())
        assert taken == cache_bytes(config, layouts[0], dtype)


@pytest.mark.parametrize("case", ["qwen2_vl", "qwen3_vl", "adapters", "mixed"])
def test_a_refreshed_step_has_the_weights_of_this_moment(mixed, case):
    """Copies (biases, norms of q and k, adapters) too, each where it was: graphs read it there."""
    config = mixed("first and last") if case == "mixed" else None
    model = tiny_model(config or family_config("qwen2_vl" if case == "adapters" else case))
    if case == "adapters":
        model.adapt(LoRA(4, 8.0))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    model = model.double()
    step = DecodeStep(model)
    where = [tensor.data_ptr() for tensor in step.tensors]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        step.refresh(model)
        assert [tensor.data_ptr() for tensor in step.tensors] == where
        hidden = []
        for one in (step, DecodeStep(model)):
            cache = Cache(model.config, torch.float64, model.device)
            cache.prepare(Layout(1, 3, 4, 2))
            index = cache.index([0, 1, 2], [1], 0)
            ids, zero = torch.tensor([5, 6, 7]), torch.zeros(1, dtype=torch.int64)
            hidden.append(one(ids, zero + 4, cache, index, zero, 1))
        assert torch.equal(*hidden)
