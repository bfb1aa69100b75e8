"""Chunked log-probs, packing and sampling: one gradient, however the step is cut."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.engine.head import token_chunks, token_logps
from grpo.engine.ranks import Ranks
from grpo.logps import keep_top_entropy, pack_chunks, pack_logps
from grpo.loss import group_advantages, policy_loss, token_weights
from grpo.pack import filler, make_packs
from grpo.rollout import sample_groups, uniform_numbers
from models.decoding.draw import Sampling
from models.qwen_vl import image_features, with_image_features
from tests.tiny import (
    IMAGE,
    drawn,
    loss_flags,
    loss_tokens,
    tiny_config,
    tiny_model,
    tiny_prompt,
    weighed,
)

SUPPRESSED = torch.tensor((IMAGE, 57, 58, 60, 61, 62, 63))
STOP = (3, 7, 11, 15, 20, 25, 31, 36, 40, 44)
SAMPLING = Sampling(9, temperature=1.2, stop_ids=STOP)
PROMPTS = [[(4, 4)], [], [(2, 8), (6, 4)], [(4, 6)]]


def dense_logps(hidden, weight, targets, temperature, suppressed=()):
    logits = hidden @ weight.T / temperature
    logits[:, list(suppressed)] = float("-inf")
    logps = logits.log_softmax(1)
    entropy = -(logps.exp() * logps.masked_fill(logps.isinf(), 0)).sum(1)
    return logps.gather(1, targets[:, None]).squeeze(1), entropy


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("suppressed", [(), (0, 5, 6)])
def test_chunked_equals_dense_in_float64(chunk, suppressed):
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, 20, (11,))
    direction, other = torch.randn(2, 11, dtype=torch.float64)
    ids = torch.tensor(suppressed, dtype=torch.int64)
    results = []
    for function, extra in ((dense_logps, (suppressed,)), (token_logps, (ids, chunk))):
        logps, entropy = function(hidden, weight, targets, 1.3, *extra)
        results.append([logps, entropy])
        for loss in (logps @ direction, logps @ direction + entropy @ other, entropy @ other):
            results[-1] += torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense, atol=1e-12, rtol=1e-12)
    with torch.no_grad():  # where the entropy would cost a product
        logps, entropy = token_logps(hidden, weight, targets, 1.3, ids, chunk)
        asked = token_logps(hidden, weight, targets, 1.3, ids, chunk, entropies=True)[1]
    assert torch.equal(logps, results[1][0]) and entropy is None
    assert torch.equal(asked, results[1][1]) and not asked.requires_grad


def in_chunks(hidden, weight, targets, temperature, suppressed, chunk, direction, other):
    """The gradients of logps @ direction + entropy @ other as the training pass forms them."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    chunks = token_chunks(leaves[0] * 1, leaves[1], targets, temperature, suppressed, chunk)
    for part, logps, entropy in chunks:
        (logps @ direction[part] + entropy @ other[part]).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["flat", "peaked", "certain"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropys_gradient_is_that_of_finite_differences(temperature, scale):
    """Central differences of the dense entropy in float64, for every hidden number and weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4).double(), scale * torch.randn(9, 4).double()
    targets, ids = torch.tensor([0, 1, 2, 4, 8]), torch.tensor([3, 5])
    direction, other = torch.randn(2, 5, dtype=torch.float64)
    found = in_chunks(hidden, weight, targets, temperature, ids, 2, direction, other)

    def value(h, w):
        logps, entropy = dense_logps(h, w, targets, temperature, (3, 5))
        return (logps @ direction + entropy @ other).item()

    for which, tensor in enumerate((hidden, weight)):
        for place in range(tensor.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [hidden.clone(), weight.clone()]
                moved[which].view(-1)[place] += step
                sides.append(value(*moved))
            slope = (sides[0] - sides[1]) / 2e-5
            assert found[which].view(-1)[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_in_bfloat16_the_entropys_gradient_is_as_good_as_the_log_probs():
    """Both against float64 of the same rounded numbers, with a vocabulary of 3,000."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 32).bfloat16(), (0.3 * torch.randn(3000, 32)).bfloat16()
    targets, zeros = torch.randint(0, 3000, (40,)), torch.zeros(40)
    direction, errors = torch.randn(40), []
    for pair in ((direction, zeros), (zeros, direction)):
        exact = in_chunks(hidden.double(), weight.double(), targets, 1.0, None, 16, *(
            x.double() for x in pair))  # fmt: skip
        found = in_chunks(hidden, weight, targets, 1.0, None, 16, *pair)
        assert found[0].dtype == found[1].dtype == torch.bfloat16
        pairs = zip(found, exact, strict=True)
        errors.append([((f.double() - e).norm() / e.norm()).item() for f, e in pairs])
    assert max(errors[0]) < 0.02, errors
    assert max(errors[1]) < 0.02, errors


def test_gradients_where_only_one_side_is_trained():
    hidden = torch.randn(5, 4, dtype=torch.float64)
    weight = torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 8])
    for i in range(2):
        inputs = [hidden.clone(), weight.clone()]
        inputs[i].requires_grad_()
        chunked = torch.autograd.grad(token_logps(*inputs, targets, chunk=2)[0].sum(), inputs[i])
        dense = torch.autograd.grad(dense_logps(*inputs, targets, 1.0)[0].sum(), inputs[i])
        torch.testing.assert_close(chunked, dense)


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    tokens, vocabulary, chunk = 300, 5000, 16
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    with LargestTensor() as largest:
        token_logps(hidden, weight, torch.arange(tokens), chunk=chunk)[0].sum().backward()
    assert largest.numel == chunk * vocabulary
    with LargestTensor() as largest:
        dense_logps(hidden, weight, torch.arange(tokens), 1.0)[0].sum().backward()
    assert largest.numel == tokens * vocabulary, "the watch sees nothing: a blunt test"


def rollout(model, group=4, seed=0):
    model.suppressed_ids = SUPPRESSED
    sampling = replace(SAMPLING, num_generations=group)
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(PROMPTS)]
    return sample_groups(model, drawn(prompts), None, sampling, seed, 1)


def table(groups):
    torch.manual_seed(5)
    lengths = torch.tensor([[len(c) for c in g.completion_ids] for g in groups])
    return lengths, group_advantages(torch.rand(lengths.shape, dtype=torch.float64))


def packed_gradient(model, groups, tokens_per_pack, reference=None, chunk=7, **flags):
    """One step's loss and gradient, formed as train_cls.py does."""
    model.zero_grad()
    config = loss_flags(beta=0.1 if reference is not None else 0.0, **flags)
    lengths, advantages = table(groups)
    weights = token_weights(lengths, config.loss_type, SAMPLING.max_completion_length)
    total, packs = 0.0, make_packs(weighed(groups, advantages, weights), tokens_per_pack)
    for pack in packs:
        pack.advantages, pack.weights = pack.per_token("advantages"), pack.per_token("weights")
        assert pack.advantages.dtype == torch.float64, "make_packs rounds to float32"
        pack.old_logps = old_logps(pack) if flags else None
        if reference is not None:
            reference.suppressed_ids = SUPPRESSED
            with torch.no_grad():
                pack.ref_logps = pack_logps(reference, pack, SAMPLING.temperature, chunk)
        level = config.importance_sampling_level
        for tokens in pack_chunks(model, pack, SAMPLING.temperature, level, chunk):
            loss, _ = policy_loss(tokens, config)
            loss.backward()
            total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}, len(packs)


def old_logps(pack):
    """Another policy's, the same however the step is packed: ratios on both sides of the clip."""
    shift = torch.tensor([(7 * t) % 11 for t in pack.targets.tolist()]).double() / 11 - 0.5
    return pack.sampling_logps.double() + shift


def naive_gradient(model, groups, reference, level="token", coef=0.0):
    """G copies of each prompt and its images, dense logits, one sequence at a time. At a level of
    sequences the policy is another than `old_logps`."""
    model.zero_grad()
    lengths, advantages = table(groups)
    total = 0.0
    for g, group in enumerate(groups):
        for i, completion in enumerate(group.completion_ids):
            ids = torch.cat([group.prompt.input_ids, torch.tensor(completion)])
            steps = torch.arange(len(completion)) + group.prompt.next_position
            positions = torch.cat([group.prompt.position_ids, steps.expand(3, -1)], dim=1)
            scored = []
            for m in (model, reference):
                features = image_features(m, [group.prompt])
                hidden = m(ids, positions, m.bounds([(len(ids),)]), features)
                hidden = hidden[len(group.prompt) - 1 : -1]
                targets = torch.tensor(completion)
                head = m.head_weight, targets, SAMPLING.temperature, SUPPRESSED
                scored.append(dense_logps(hidden, *head))
            (logps, entropy), ref = scored[0], scored[1][0].detach()
            ratio = (logps - logps.detach()).exp()
            gain = ratio * advantages[g, i]
            if level == "sequence":
                alone = SimpleNamespace(targets=targets, sampling_logps=group.sampling_logps[i])
                s = (logps - old_logps(alone)).mean().exp()
                clipped = s.clamp(0.8, 1.2) * advantages[g, i]
                gain = torch.min(s * advantages[g, i], clipped).expand(len(targets))
            kl = (ref - logps).exp() - (ref - logps) - 1
            loss = (0.1 * kl - gain - coef * entropy).sum() / lengths.sum()
            loss.backward()
            total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_packed_gradient_is_the_naive_one(tied, level, chunk):
    """Several groups, images of different sizes and none, completions of length 1 to the limit."""
    model = tiny_model(tiny_config(tied))
    reference = tiny_model(tiny_config(tied), seed=1)
    groups = rollout(model)
    lengths = {len(c) for g in groups for c in g.completion_ids}
    assert {1, SAMPLING.max_completion_length} <= lengths, f"{lengths}: a blunt test"
    coef = 0.0 if level == "token" else 0.2
    expected_loss, expected = naive_gradient(model, groups, reference, level, coef)
    flags = {"importance_sampling_level": level, "entropy_coef": coef} if coef else {}
    loss, gradient, _ = packed_gradient(model, groups, 10_000, reference, chunk, **flags)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=1e-10, rtol=1e-10)
        assert value.abs().max() > 0


SPLIT = {
    "as sampled": {},
    "GSPO": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.05},
    "GSPO-token": {"importance_sampling_level": "sequence_token", "delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo, entropy": {"loss_type": "sapo", "entropy_coef": 0.2},
    "GSPO, entropy": {"importance_sampling_level": "sequence", "entropy_coef": 0.2},
}


@pytest.mark.parametrize("case", SPLIT)
def test_any_split_into_packs_gives_the_same_gradient(case):
    model = tiny_model(tiny_config())
    groups = rollout(model)
    whole_loss, whole, packs = packed_gradient(model, groups, 10_000, **SPLIT[case])
    assert packs == 1
    counts = []
    for tokens_per_pack in (100, 60, 40, 1):
        loss, gradient, packs = packed_gradient(model, groups, tokens_per_pack, **SPLIT[case])
        counts.append(packs)
        assert loss == pytest.approx(whole_loss, abs=1e-12)
        for name, value in whole.items():
            torch.testing.assert_close(gradient[name], value, atol=1e-11, rtol=1e-9)
    assert counts == sorted(counts) and counts[0] > 1 and counts[-1] == 16


@pytest.mark.parametrize("tokens_per_pack", [10_000, 60, 1])
def test_packs_hold_every_completion_once_and_keep_to_the_limit(tokens_per_pack):
    groups = rollout(tiny_model(tiny_config()))
    packs = make_packs(groups, tokens_per_pack)
    held = [completion for pack in packs for completion in pack.completions]
    assert held == [(group, i) for group in groups for i in range(4)]
    for pack in packs:
        assert len(pack.input_ids) <= tokens_per_pack or len(pack.completions) == 1
        assert pack.input_ids[pack.predicts + 1].shape == pack.targets.shape
        expected = [t for group, i in pack.completions for t in group.completion_ids[i]]
        assert pack.targets.tolist() == expected


def test_scored_log_probs_travel_with_their_groups():
    """However the groups are packed later; and none may lack old log-probs that others have."""
    model = tiny_model(tiny_config())
    groups = rollout(model)
    for pack in make_packs(groups, 60):
        with torch.no_grad():
            logps = pack_logps(model, pack, SAMPLING.temperature)
        pack.store("ref_logps", logps)
        pack.store("old_logps", logps - 1)
        assert pack.ref_logps is logps
    (whole,) = make_packs(groups[::-1], 10_000)
    with torch.no_grad():
        expected = pack_logps(model, whole, SAMPLING.temperature)
    torch.testing.assert_close(whole.ref_logps, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(whole.old_logps, expected - 1, atol=1e-9, rtol=0)
    groups[0].ref_logps = None
    assert make_packs(groups, 10_000)[0].ref_logps is None, "a step scores them all"
    groups[0].old_logps = None
    with pytest.raises(AssertionError, match="some groups have no old_logps"):
        make_packs(groups, 10_000)


def test_sampled_log_probs_equal_training_log_probs():
    model = tiny_model(tiny_config())
    groups = rollout(model)
    table = torch.zeros(len(groups), 4)
    for pack in make_packs(weighed(groups, table, table), 80):
        logps = pack_logps(model, pack, SAMPLING.temperature)
        torch.testing.assert_close(logps.float(), pack.sampling_logps, atol=1e-5, rtol=1e-5)


def test_suppressed_tokens_are_never_sampled_and_stop_tokens_end():
    model = tiny_model(tiny_config())
    with torch.no_grad():  # make the image token by far the likeliest
        model.model.embed_tokens.weight[IMAGE] = 50 * model.model.norm.weight
    groups = rollout(model, group=16)
    for group in groups:
        for completion, truncated in zip(group.completion_ids, group.truncated, strict=True):
            assert not set(completion) & set(SUPPRESSED.tolist())
            assert not set(completion[:-1]) & set(SAMPLING.stop_ids)
            assert truncated == (completion[-1] not in SAMPLING.stop_ids)
            assert len(completion) == SAMPLING.max_completion_length or not truncated


def test_the_stop_token_is_trained():
    """Its log-prob rises after a step on a completion that is rewarded for ending."""
    model = tiny_model(tiny_config())
    groups = rollout(model)
    g, i = next(
        (g, i) for g, group in enumerate(groups) for i, cut in enumerate(group.truncated) if not cut
    )
    chosen = [make_packs(groups, 1)[4 * g + i]]
    logps = pack_logps(model, chosen[0], 1.0)
    assert chosen[0].targets[-1].item() in SAMPLING.stop_ids
    advantages = torch.zeros_like(logps)
    advantages[-1] = 1.0
    policy_loss(loss_tokens(logps, advantages, torch.ones_like(logps)), loss_flags())[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert pack_logps(model, chosen[0], 1.0)[-1] > logps[-1]


def test_random_numbers_depend_on_their_four_names_alone():
    names = [(s, t, p, g) for s in (0, 1) for t in (1, 2) for p in (0, 1) for g in (0, 1)]
    rows = [uniform_numbers(*name, 50) for name in names]
    assert len({tuple(row.tolist()) for row in rows}) == len(names)
    assert torch.equal(uniform_numbers(0, 1, 0, 1, 20), uniform_numbers(0, 1, 0, 1, 50)[:20])
    assert all(((row >= 0) & (row < 1)).all() for row in rows)


def test_groups_do_not_depend_on_which_prompts_share_a_rank():
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(PROMPTS)]
    sampling = replace(SAMPLING, num_generations=3)
    rows = drawn(prompts)
    whole = sample_groups(model, rows, None, sampling, 0, 1)
    shared = [sample_groups(model, rows[rank::2], None, sampling, 0, 1) for rank in range(2)]
    for place, group in enumerate(whole):
        assert group.completion_ids == shared[place % 2][place // 2].completion_ids
    assert sample_groups(model, [], None, sampling, 0, 1) == []


def test_one_pass_forms_no_tokens_by_vocabulary_tensor_and_wants_backward_in_time():
    config = tiny_config(vocab=2000)
    model = tiny_model(config, torch.float32)
    groups = rollout(model)
    lengths, advantages = table(groups)
    pack = make_packs(weighed(groups, advantages, advantages), 10_000)[0]
    tokens, chunk = len(pack.targets), 5
    assert tokens > 20 * chunk
    with LargestTensor() as largest:
        for part in pack_chunks(model, pack, 1.0, chunk=chunk):
            part.logps.sum().backward()
    weights = 2000 * config.hidden_size
    assert largest.numel <= max(weights, chunk * 2000) < tokens * 2000

    late = []
    with pytest.raises(AssertionError, match="backward"):
        late += [part.logps for part in pack_chunks(model, pack, 1.0, chunk=chunk)]
    chunks = pack_chunks(model, pack, 1.0, chunk=chunk)
    first = next(chunks).logps
    first.sum().backward(retain_graph=True)
    next(chunks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


@pytest.mark.parametrize("frozen", ["model.embed_tokens", "visual", "model.layers"])
def test_one_pass_leaves_frozen_weights_alone(frozen):
    model = tiny_model(tiny_config())
    groups = rollout(model)
    _, whole, _ = packed_gradient(model, groups, 10_000)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    model.zero_grad(set_to_none=True)
    lengths, advantages = table(groups)
    weights = token_weights(lengths, "dapo", SAMPLING.max_completion_length)
    (pack,) = make_packs(weighed(groups, advantages, weights), 10_000)
    pack.advantages, pack.weights = pack.per_token("advantages"), pack.per_token("weights")
    for tokens in pack_chunks(model, pack, SAMPLING.temperature):
        loss, _ = policy_loss(tokens, loss_flags())
        loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-12, rtol=1e-9)


def test_prompts_with_and_without_encoded_images_share_a_pack():
    """Encoded apart, as --dynamic_sampling does round by round: the same log-probs."""
    model = tiny_model(tiny_config())
    groups = rollout(model)
    assert [len(g.prompt.image_keys) for g in groups] == [1, 0, 2, 1]
    encoded = [
        replace(group, prompt=with_image_features(model, [group.prompt])[0]) for group in groups
    ]
    plain, known = (
        pack_logps(model, make_packs(some, 10_000)[0], 1.0) for some in (groups, encoded)
    )
    torch.testing.assert_close(known, plain, atol=1e-12, rtol=1e-12)
    (alone,) = make_packs([encoded[1]], 10_000)
    assert pack_logps(model, alone, 1.0).isfinite().all()


class Both(Ranks):
    """One of two ranks; `gather` is told what the other one has."""

    def gather(self, items):
        return [*items, self.other]


def test_the_tokens_of_highest_entropy_are_the_whole_steps():
    """However it is packed, and whichever rank has the tokens; without an advantage none counts."""
    model = tiny_model(tiny_config())
    groups = rollout(model)
    lengths, advantages = table(groups)
    advantages[1] = 0.0  # a dead group
    lengths[0, 1] = 0  # left out of the loss
    weights = token_weights(lengths, "dapo", SAMPLING.max_completion_length)
    config = loss_flags()
    config.temperature, config.top_entropy_quantile = SAMPLING.temperature, 0.2
    entropies, counted, kept = [], [], []
    for tokens_per_pack in (10_000, 60, 1):
        packs = make_packs(weighed(groups, advantages, weights), tokens_per_pack) + [filler()]
        keep_top_entropy(model, packs, config, Ranks(0, 1, torch.device("cpu")))
        kept.append(torch.cat([pack.kept for pack in packs]))
    for pack in packs:
        for tokens in pack_chunks(model, pack, SAMPLING.temperature):
            entropies.append(tokens.entropy.detach())
            counted.append((pack.advantages != 0) & (pack.weights > 0))
            tokens.logps.sum().backward()
    entropies, counted = torch.cat(entropies), torch.cat(counted)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    expected = entropies >= entropies[counted].quantile(0.8)
    assert torch.equal(kept[0].bool(), expected)
    assert 0 < (expected & counted).sum() <= 0.2 * counted.sum() + 1 and not counted.all()

    config.top_entropy_quantile = 0.0  # the token of highest entropy alone
    keep_top_entropy(model, packs, config, Ranks(0, 1, torch.device("cpu")))
    one = torch.cat([pack.kept for pack in packs]).bool()
    assert (one & counted).sum() == 1 and entropies[one & counted] == entropies[counted].max()

    shared = Both(0, 2, torch.device("cpu"))
    shared.other = entropies[counted] + 100.0  # the other rank's are all higher: half of all
    config.top_entropy_quantile = 0.5 - 1 / len(shared.other)
    keep_top_entropy(model, packs, config, shared)
    assert not torch.cat([pack.kept for pack in packs]).any()


def test_a_step_without_any_advantage_keeps_every_token():
    pack = filler()
    config = SimpleNamespace(temperature=1.0, top_entropy_quantile=0.2)
    keep_top_entropy(tiny_model(tiny_config()), [pack], config, Ranks(0, 1, torch.device("cpu")))
    assert pack.kept is None


@pytest.mark.parametrize("coef", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_filler_has_a_gradient_of_zero_and_not_none(level, coef):
    """A rank without completions must run the backward pass that the others run."""
    model = tiny_model(tiny_config())
    for tokens in pack_chunks(model, filler(), 1.0, level):
        loss, _ = policy_loss(
            tokens, loss_flags(importance_sampling_level=level, entropy_coef=coef)
        )
        loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers"):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_tokens_that_are_left_out_have_no_gradient_from_any_pack_or_chunk():
    """What `keep_top_entropy` marks reaches the loss: against one formed by hand from its marks."""
    model = tiny_model(tiny_config())
    groups = rollout(model)
    lengths, advantages = table(groups)
    weights = token_weights(lengths, "dapo", SAMPLING.max_completion_length)
    config = loss_flags()
    config.temperature, config.top_entropy_quantile = SAMPLING.temperature, 0.3
    found = []
    for by_hand in (False, True):
        model.zero_grad()
        packs = make_packs(weighed(groups, advantages, weights), 60)
        keep_top_entropy(model, packs, config, Ranks(0, 1, torch.device("cpu")))
        assert len(packs) > 2
        for pack in packs:
            if by_hand:
                logps = pack_logps(model, pack, SAMPLING.temperature)
                (-logps * pack.advantages * pack.weights * pack.kept).sum().backward()
                continue
            for tokens in pack_chunks(model, pack, SAMPLING.temperature, chunk=7):
                policy_loss(tokens, config)[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-9, rtol=1e-6)
