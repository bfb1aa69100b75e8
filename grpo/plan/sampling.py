"""The memory that sampling holds besides weights, in bytes: images, caches, logits, CUDA graphs."""

import math

import torch

from grpo.flags.config import TrainingConfig
from grpo.plan.passes import Skeleton, decoder_forward, tower_forward
from grpo.plan.sizes import Facts
from grpo.rollout import EVAL_BATCH
from models.decoding.cache import cache_bytes
from models.decoding.generate import PREFILL
from models.decoding.graphs import MOST
from models.decoding.rectangle import few_lengths
from models.families import mixers_of
from models.mixer import Layout

GRAPH_NODE = 10e3  # bytes that CUDA holds for each operation of a graph


def sampling_bytes(
    config: TrainingConfig, facts: Facts, layers: Skeleton, prompts: int, group: int
) -> float:
    """The most of three: encoding all images; the cache beside a pass over prompts; the cache
    beside a token's logits of all samples. With CUDA graphs cache and logits stay
    (`graph_bytes`)."""
    longest = facts.longest_prompt
    images = prompts * tower_forward(layers, facts.image_tokens)
    at_once = max(1, min(prompts, PREFILL // longest))
    prefill = decoder_forward(layers, ((longest,),) * at_once)
    if config.cuda_graphs:
        return max(images, prefill)
    logits = prompts * group * facts.model.vocab_size * logit_bytes(config)
    return max(images, _cache(config, facts, prompts, group, longest) + max(prefill, logits))


def graph_bytes(config: TrainingConfig, facts: Facts, prompts: int, group: int) -> float:
    """What CUDA graphs keep: the largest cache, an evaluation's or a rollout's, what the largest
    decode step holds, and the graphs themselves."""
    if not config.cuda_graphs:
        return 0
    batch = min(EVAL_BATCH, config.eval_samples or EVAL_BATCH)
    shapes = [(prompts, group), (batch, max(1, config.eval_samples_per_prompt))]
    longest = few_lengths(facts.longest_prompt)
    cache = max(_cache(config, facts, *shape, longest) for shape in shapes)
    logits = max(map(math.prod, shapes)) * facts.model.vocab_size * logit_bytes(config)
    operations = 60 + sum(kind.Step.operations(facts.model) for kind in mixers_of(facts.model))
    return cache + logits + MOST * operations * GRAPH_NODE


def _cache(config: TrainingConfig, facts: Facts, prompts: int, group: int, longest: int) -> int:
    """What the layers remember of prompts and of their samples."""
    layout = Layout(prompts, group, longest, config.max_completion_length)
    dtype = torch.bfloat16 if facts.bf16 else torch.float32
    return cache_bytes(facts.model, layout, dtype)


def logit_bytes(config: TrainingConfig) -> int:
    """Of a logit while a token is drawn: itself and its exponential; with --top_p also what is
    sorted, in float64."""
    return 8 if config.top_p == 1 else 40
