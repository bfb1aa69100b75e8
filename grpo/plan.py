"""What a run will do and need, told before a weight is loaded.

Memory is an estimate by phase: what weights, gradients, moments and caches take follows from their
sizes, what autograd keeps from the operations of a layer (docs/performance.md compares it with
measurements). Fragments that an allocator holds back are not counted.
"""

import math

from grpo.cli import TrainingConfig
from grpo.logps import chunk_tokens
from models.config import QwenVLConfig
from models.load import MOST_BYTES


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Steps of the run: --max_steps, else as many as --num_train_epochs over `rows` take."""
    return config.max_steps or math.ceil(config.num_train_epochs * rows / config.prompts_per_step)


def describe(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
    vision_parameters: int,
    prompt_lengths: list[int],
    train_rows: int,
    test_rows: int,
    world: int,
    device: str,
    dtype: str,
    attention: str,
) -> str:
    """The plan as text. prompt_lengths: tokens of every prompt, images included."""
    ordered = sorted(prompt_lengths)
    longest, median = ordered[-1], ordered[len(ordered) // 2]
    steps = total_steps(config, train_rows)
    samples = config.prompts_per_step * config.num_generations
    epochs = steps * config.prompts_per_step / train_rows
    memory = estimate_memory(
        config, model, parameters, vision_parameters, longest, dtype == "bfloat16", world, device
    )
    peak = max(sum(parts.values()) for parts in memory.values())
    phases = [
        f"  {name:<10}{sum(parts.values()):.2f}: "
        + ", ".join(f"{what} {gb:.2f}" for what, gb in parts.items() if round(gb, 2))
        for name, parts in memory.items()
    ]
    return "\n".join(
        [
            f"model     {config.model_name_or_path}: {parameters / 1e6:,.1f} M parameters, "
            f"{dtype}, {attention}, {world} x {device}",
            f"data      {config.dataset_name}: {train_rows} rows to train on, {test_rows} held out",
            f"prompts   {median} tokens in the median, {longest} at most, images included",
            f"steps     {steps} ({epochs:.2f} epochs), each {config.prompts_per_step} prompts x "
            f"{config.num_generations} completions = {samples}, "
            f"{config.num_iterations} update(s) a step",
            f"memory    about {peak:.2f} GB a rank at the peak (estimate), GB by phase:",
            *phases,
        ]
    )


def estimate_memory(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
    vision_parameters: int,
    longest_prompt: int,
    bf16: bool,
    world: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """Gigabytes (1e9 bytes) per rank: for each phase of a step, by purpose.

    parameters: of the whole model, the vision tower's vision_parameters among them; one rank holds
    it, several share it (docs/memory.md derives each part). longest_prompt: tokens; all prompts are
    taken to be as long, and all of it image, and all completions to be of --max_completion_length.
    """
    size, vision = (2 if bf16 else 4), model.vision
    trained = parameters - vision_parameters * config.freeze_vision
    prompts = math.ceil(config.prompts_per_step / world)
    samples = prompts * config.num_generations
    longest = longest_prompt + config.num_generations * config.max_completion_length
    tokens = min(config.tokens_per_pack, prompts * longest)  # of the largest pack
    rows = math.ceil(tokens / longest)
    patches = rows * longest_prompt * vision.spatial_merge_size**2

    # What autograd keeps: per token and layer the norms, the residual stream, q before and after
    # its rotation, the attended values, the feed-forward's four products; SDPA holds the prompt's
    # keys and values once per completion. The last layer's second half works on completions alone.
    width, kv = model.hidden_size, model.head_dim * model.num_key_value_heads
    attention = tokens * (6 * width + 3 * kv)
    attention += (
        rows * config.num_generations * (longest_prompt + config.max_completion_length) * 2 * kv
    )
    mlp = 4 * width + 4 * model.intermediate_size
    layer, last = attention + tokens * mlp, attention + (tokens - rows * longest_prompt) * mlp
    block = patches * (11 + 3 * vision.mlp_ratio) * vision.embed_dim
    ends = patches * (vision.patch_dim + 4 * vision.embed_dim)  # first and last products
    if config.gradient_checkpointing:  # inputs, and one layer or block at a time in full
        decoder, tower = (
            model.num_hidden_layers * tokens * width,
            vision.depth * patches * vision.embed_dim,
        )
        again = layer if config.freeze_vision else max(layer, block)
    else:
        decoder, tower = (model.num_hidden_layers - 1) * layer + last, vision.depth * block
        again = 0
    activations = (decoder + again + (tower + ends) * (not config.freeze_vision)) * size

    head, chunk = model.vocab_size * width, min(chunk_tokens(model.vocab_size), tokens)
    logits = chunk * model.vocab_size * 4
    cache = (prompts * longest_prompt + samples * config.max_completion_length) * 2 * kv
    fused = width * (width + 2 * kv + 2 * model.intermediate_size)
    share = config.shard_size or world  # ranks that hold the model together
    frozen = vision_parameters * config.freeze_vision  # no part of the reference either
    gradients = trained * 4 / share
    in_layers = model.num_hidden_layers * decoder_layer_parameters(model)
    in_layers += vision.depth * vision_block_parameters(model)
    root = parameters - in_layers  # embedding, head, the tower's ends: gathered for a whole pass
    at_once = max(decoder_layer_parameters(model), vision_block_parameters(model))
    fixed = {"libraries": 0.42e9 if device == "cpu" else 0}  # torch, transformers, the tokenizer
    if world == 1:
        fixed |= {
            "weights": parameters * size,
            "float32 masters": trained * 4 if bf16 else 0,
            "AdamW moments": trained * 8,
        }
        gathered = 0
        gradients_at_once = gradients + head * size * model.tie_word_embeddings
    else:
        here = not config.cpu_offload  # on the device
        fixed |= {
            "float32 masters": parameters * 4 / share * here,
            "AdamW moments": trained * 8 / share * here,
            "sampling copy": parameters * size,
        }
        gathered = (root + 2 * at_once if config.reshard_after_forward else parameters) * size
        # a group's gradients as backward makes them, and in float32 as they leave
        gradients_at_once = gradients * here + root * (size + 4)
        gradients *= here
    if config.beta > 0:
        here = world == 1 or not config.cpu_offload
        fixed["reference"] = (parameters - frozen) * size / share * here
    phases = {
        "rollout": {
            "key/value cache": cache * model.num_hidden_layers * size,
            "decode weights": fused * model.num_hidden_layers * size,
            "logits": 2 * samples * model.vocab_size * 4,
        },
        "reference": {
            "gathered layers": gathered,
            "activations": max(layer, block) * size,
            "logits": logits,
        },
        "training": {
            "gathered layers": gathered,
            "activations": activations,
            # while the head works; then all gradients, the embedding's for itself where it is tied
            "head or gradients": max(logits + head * 4, gradients_at_once),
        },
        "optimizer": {"gradients": gradients},
    }
    if config.beta == 0 and config.num_iterations == 1:
        del phases["reference"]
    if device == "cpu":  # a GPU's memory holds no file
        largest = trained * 8 if config.save_steps else parameters * size  # moments, or final/
        largest = min(max(MOST_BYTES, head * 4), largest)
        phases["saving"] = {"file on its way": 2 * largest / share}
    return {
        phase: {name: value / 1e9 for name, value in {**fixed, **parts}.items()}
        for phase, parts in phases.items()
    }


def decoder_layer_parameters(model: QwenVLConfig) -> int:
    """Numbers in one decoder layer."""
    width, kv = model.hidden_size, model.head_dim * model.num_key_value_heads
    attention = 2 * width * (width + kv) + width + 2 * kv
    return attention + 3 * width * model.intermediate_size + 2 * width


def vision_block_parameters(model: QwenVLConfig) -> int:
    """Numbers in one block of the vision tower."""
    width, ratio = model.vision.embed_dim, model.vision.mlp_ratio
    return (4 + 2 * ratio) * width**2 + (9 + ratio) * width
