"""What a run will do and need, told before a weight is loaded.

Memory is an estimate: weights, gradients, moments and caches follow from sizes; activations from a
formula that no allocator was asked about.
"""

import math

from grpo.cli import TrainingConfig
from grpo.logps import chunk_tokens
from models.config import QwenVLConfig


def total_steps(config: TrainingConfig, rows: int) -> int:
    """Steps of the run: --max_steps, else as many as --num_train_epochs over `rows` take."""
    return config.max_steps or math.ceil(config.num_train_epochs * rows / config.prompts_per_step)


def describe(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
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
    memory = estimate_memory(config, model, parameters, longest, dtype == "bfloat16", world)
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in memory.items() if name != "peak" and gb)
    return "\n".join(
        [
            f"model     {config.model_name_or_path}: {parameters / 1e6:,.1f} M parameters, "
            f"{dtype}, {attention}, {world} x {device}",
            f"data      {config.dataset_name}: {train_rows} rows to train on, {test_rows} held out",
            f"prompts   {median} tokens in the median, {longest} at most, images included",
            f"steps     {steps} ({epochs:.2f} epochs), each {config.prompts_per_step} prompts x "
            f"{config.num_generations} completions = {samples}, "
            f"{config.num_iterations} update(s) a step",
            f"memory    about {memory['peak']:.2f} GB a rank at the peak (estimate): {parts}",
        ]
    )


def estimate_memory(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
    longest_prompt: int,
    bf16: bool,
    world: int,
) -> dict[str, float]:
    """Gigabytes (1e9 bytes) per rank by purpose, and the "peak" of those that coincide.

    parameters: of the whole model, which every rank holds. longest_prompt: tokens.
    """
    size = 2 if bf16 else 4
    prompts = math.ceil(config.prompts_per_step / world)
    completions = prompts * config.num_generations * config.max_completion_length
    step_tokens = prompts * longest_prompt + completions
    pack = min(config.tokens_per_pack, step_tokens)
    # Kept per token and layer for the backward pass: norms, q k v, attention, the feed-forward's
    # three products; with checkpointing each layer's input alone, and one layer in full.
    kv = model.head_dim * model.num_key_value_heads
    layer = 6 * model.hidden_size + 2 * kv + 4 * model.intermediate_size
    kept = model.hidden_size if config.gradient_checkpointing else layer
    fixed = {
        "weights": parameters * size,
        "float32 masters": parameters * 4 if bf16 else 0,
        "gradients": parameters * 4,
        "AdamW moments": parameters * 8,
        "reference": parameters * size if config.beta > 0 else 0,
    }
    training = {
        "activations": pack * (model.num_hidden_layers * kept + layer) * size,
        "logits": 2 * min(chunk_tokens(model.vocab_size), pack) * model.vocab_size * 4,
    }
    rollout = {"key/value cache": step_tokens * model.num_hidden_layers * 2 * kv * size}
    peak = sum(fixed.values()) + max(sum(training.values()), sum(rollout.values()))
    parts = {**fixed, **training, **rollout, "peak": peak}
    return {name: value / 1e9 for name, value in parts.items()}
