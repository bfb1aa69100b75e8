"""What benchmarks/peer_work.py counts on meta against FlopCounterMode on a CPU, with TRL's own code
on real numbers. Needs TRL (docs/performance.md); skips without it."""

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peer_work
from tests.tiny import family_config

if not all(importlib.util.find_spec(name) for name in ("trl", "peft", "torchvision")):
    pytest.skip("TRL is not installed", allow_module_level=True)

WORK = peer_work.Work(prompts=2, group=2, text=12, image=4, completion=6, limit=40)


def mixed(module, query, key, value, attention_mask, **_):
    """In place of attention: no products, and gradients for all three."""
    repeats = query.shape[1] // key.shape[1]
    both = (key + value).repeat_interleave(repeats, 1)[:, :, -query.shape[2] :]
    return (query + both).transpose(1, 2), None


CASES = [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False)]


@pytest.mark.slow
@pytest.mark.parametrize("family, adapted", CASES)
def test_counts_the_products_of_a_real_step(family, adapted, monkeypatch):
    peer_work.stand_in_for_torchvision()
    from transformers import GenerationConfig
    from trl import GRPOTrainer
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    shapes = family_config(family)
    monkeypatch.setattr(peer_work, "attention", mixed)
    rows = peer_work.step(shapes, WORK, adapted)
    counted = [rows["reference"][0], rows["training"][0]]
    model = peer_work.build(shapes, adapted)
    generated = sum(part[0] for part in peer_work.rollout(model, shapes, WORK, WORK.text))

    model = peer_work.build(shapes, adapted).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.constant_(tensor.data, 0.01)
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)  # completion tokens alone
    product = lambda total, a, b: total.add_(a.float() @ b.float())  # noqa: E731
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", product)  # addmm_ is not counted
    known, batch = peer_work.trainer(), peer_work.micro_batch(shapes, WORK)
    inputs = peer_work.make_inputs(shapes, WORK.samples, WORK.text, WORK.image)
    for given in (inputs, batch):
        given["pixel_values"] = torch.zeros(given["pixel_values"].shape)
    times = WORK.samples // WORK.micro
    with FlopCounterMode(display=False) as real:
        batch["ref_per_token_logps"] = peer_work.score(known, model, batch, WORK.completion)
    measured = [times * real.get_total_flops()]
    model.train()
    peer_work.base(model).gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as real:
        GRPOTrainer._compute_loss(known, model, batch).backward()
    measured.append(times * real.get_total_flops())
    assert counted == measured
    tokens = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=3, eos_token_id=[9999])
    with FlopCounterMode(display=False) as real:
        model.eval().generate(**inputs, generation_config=tokens)
    assert generated == real.get_total_flops()
