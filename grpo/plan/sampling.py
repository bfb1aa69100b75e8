"""The memory that sampling holds besides weights, in bytes: images, caches, logits, CUDA graphs."""

import math

from grpo.flags.config import TrainingConfig
from grpo.plan.passes import Skeleton, decoder_forward, tower_forward
from grpo.plan.sizes import Facts
from models.decoding.generate import PREFILL, few_lengths
from models.decoding.graphs import MOST

EVAL_BATCH = 32  # prompts that an evaluation takes at once
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
    return max(images, cache_bytes(config, facts, prompts, group, longest) + max(prefill, logits))


def graph_bytes(config: TrainingConfig, facts: Facts, prompts: int, group: int) -> float:
    """What CUDA graphs keep: the largest cache, an evaluation's or a rollout's, what the largest
    decode step holds, and the graphs themselves."""
    if not config.cuda_graphs:
        return 0
    batch = min(EVAL_BATCH, config.eval_samples or EVAL_BATCH)
    shapes = [(prompts, group), (batch, max(1, config.eval_samples_per_prompt))]
    longest = few_lengths(facts.longest_prompt)
    cache = max(cache_bytes(config, facts, *shape, longest) for shape in shapes)
    logits = max(map(math.prod, shapes)) * facts.model.vocab_size * logit_bytes(config)
    return cache + logits + MOST * (60 + 17 * facts.model.num_hidden_layers) * GRAPH_NODE


def cache_bytes(
    config: TrainingConfig, facts: Facts, prompts: int, group: int, longest: int
) -> int:
    """Keys and values of prompts and of their samples, and a token's queries."""
    model, size = facts.model, 2 if facts.bf16 else 4
    tokens = prompts * (longest + group * config.max_completion_length)
    heads = 2 * tokens * model.num_key_value_heads + prompts * group * model.num_attention_heads
    return heads * model.head_dim * model.num_hidden_layers * size


def logit_bytes(config: TrainingConfig) -> int:
    """Of a logit while a token is drawn: itself and its exponential; with --top_p also what is
    sorted, in float64."""
    return 8 if config.top_p == 1 else 40
