"""The memory a run will need, phase by phase, from the sizes of the model and the flags.

Weights, gradients, moments and caches follow from their sizes, what autograd keeps from the
operations of a layer. docs/memory.md derives each part and compares the sum with the allocator's
account. Fragments of the allocator are not counted.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from grpo.engine.adamw import MOMENT_BYTES, NUMBERS
from grpo.engine.adapters import vision_is_frozen
from grpo.engine.head import chunk_tokens
from grpo.flags.config import TrainingConfig
from grpo.plan.sizes import adapter_parameters, block_padding, decoder_matrices, root_and_layer
from grpo.rollout import EVAL_BATCH
from models.config import QwenVLConfig
from models.decoding.generate import PREFILL, few_lengths
from models.decoding.graphs import MOST
from models.families import family_of
from models.four_bit import BYTES as FOUR_BIT_BYTES
from models.load import MAX_FILE_BYTES

LIBRARIES = 0.42e9  # bytes of torch, transformers and the tokenizer, in the CPU's memory
GRAPH_NODE = 10e3  # bytes that CUDA holds for each operation of a graph


def peak_gb(config: TrainingConfig, *facts) -> float:
    """The largest phase's GB on a rank. facts: as for `estimate_memory`."""
    return max(sum(parts.values()) for parts in estimate_memory(config, *facts).values())


def estimate_memory(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
    vision_parameters: int,
    longest_prompt: int,
    image_tokens: int,
    bf16: bool,
    world: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """Gigabytes (1e9 bytes) per rank: for each phase of a step, by purpose.

    parameters: of the complete model, with the tower's vision_parameters. longest_prompt: tokens;
    image_tokens: of its images; all prompts and completions count as the longest. --cuda_graphs
    counts if it is true, not by default.
    """
    size, lengths = (2 if bf16 else 4), (longest_prompt, image_tokens)
    adapters, merged = adapter_parameters(config, model)
    if config.eval_only:
        return evaluation_memory(config, model, parameters + adapters, lengths, size, device)
    frozen = vision_parameters * vision_is_frozen(config)  # no part of the reference either
    trained = adapters or parameters - frozen
    parameters += adapters
    prompts = math.ceil(config.prompts_per_step / world)
    longest = longest_prompt + config.num_generations * config.max_completion_length
    tokens = min(config.tokens_per_pack, prompts * longest)  # of the largest pack
    rows = math.ceil(tokens / longest)
    at = activation_numbers(config, model, tokens, rows, lengths, device == "cpu")
    read = min(tokens, rows * (longest - longest_prompt))  # by the head, of the largest pack
    chunk = min(chunk_tokens(model.vocab_size, device), read)
    head = model.vocab_size * model.hidden_size
    logits = chunk * model.vocab_size * (6 if bf16 else 4)  # in float32, beside a copy in bf16
    whole = world == 1 or adapters > 0  # every rank holds the whole model
    share = 1 if whole else config.shard_size or world  # ranks that hold the model together
    light = config.optim in MOMENT_BYTES
    gradients = trained * (size if light else 4) / share
    root, at_once = root_and_layer(model, parameters)
    packed = decoder_matrices(model) * config.load_in_4bit
    padding = block_padding(model) * (config.optim == "adamw_8bit")
    fixed = what_stays(config, parameters, trained, size, whole, share, packed, padding)
    fixed["libraries"] = LIBRARIES * (device == "cpu")
    unpacked = model.intermediate_size * model.hidden_size * size * config.load_in_4bit
    gathered = leaving = 0
    if not whole:
        gathered = (root + 2 * at_once if config.reshard_after_forward else parameters) * size
        # a group's gradients as backward makes them, and in float32 as they leave
        leaving = (size + 4) * (not adapters)
    if config.cpu_offload and not adapters and not (whole and light):
        gradients = 0  # in the CPU's memory; on one rank one after the other
    features = prompts * image_tokens * model.vision.feature_width * vision_is_frozen(config)
    fixed["image features"] = features * size
    reference = (parameters - frozen) * size / share * (config.beta > 0 and not adapters)
    fixed["reference"] = reference * (not config.cpu_offload)
    fixed["decoding"] = decoding_bytes(config, model, prompts, longest_prompt, size)
    kept, beside = backward_peak(
        at,
        size,
        logits + loss_bytes(config, model, read, chunk),
        head=0 if adapters else head,
        head_gradient=(size if light or not whole else 4) * (gradients > 0),
        gradients=gradients,
        of_tower=gradients * (vision_parameters - frozen) / trained,
        earlier=tokens < prompts * longest,
        leaving=(at_once * leaving, root * leaving),
    )
    phases = {
        "rollout": {
            "images, or cache and logits": rollout_bytes(config, model, prompts, lengths, size),
            "unpacked weights": 3 * unpacked,
        },
        "reference": {
            "gathered layers": gathered,
            "its weights": reference * (whole and config.cpu_offload),
            "activations or logits": max(at.forward * size, logits),
            "unpacked weights": unpacked,
        },
        "training": {
            "gathered layers": gathered,
            "activations": kept * size,
            "head or gradients": beside,
            "unpacked weights": unpacked,
        },
        "optimizer": {"gradients": gradients, "rows": light * 36 * min(NUMBERS, head / share)},
    }
    if config.beta == 0 and config.num_iterations == 1:
        del phases["reference"]
    if device == "cpu":  # a GPU's memory holds no file
        file = largest_file(config, parameters * size, trained, head) / share
        merging = max(merged, packed) * size / share
        phases["saving"] = {"merged weights": merging, "file on its way": 2 * file}
    return {
        phase: {name: value / 1e9 for name, value in {**fixed, **parts}.items()}
        for phase, parts in phases.items()
    }


def loss_bytes(config: TrainingConfig, model: QwenVLConfig, read: int, chunk: int) -> int:
    """What a loss needs beside the logits: one of whole completions the slopes of all `read` tokens
    of a pack; a gradient of the entropy a buffer of a chunk, or with both the gradients too."""
    more = 4 * (config.entropy_coef != 0)
    whole = config.importance_sampling_level != "token"
    return chunk * model.vocab_size * more + read * model.hidden_size * (4 + more) * whole


def evaluation_memory(
    config: TrainingConfig,
    model: QwenVLConfig,
    parameters: int,
    lengths: tuple[int, int],
    size: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """`estimate_memory` of --eval_only: the whole model on each rank, and one batch of prompts."""
    packed = decoder_matrices(model) * config.load_in_4bit
    group = max(1, config.eval_samples_per_prompt)
    some = replace(config, num_generations=group)
    parts = {
        "libraries": LIBRARIES * (device == "cpu"),
        "weights": (parameters - packed) * size + packed * FOUR_BIT_BYTES,
        "decoding": decoding_bytes(some, model, EVAL_BATCH, lengths[0], size),
        "images, or cache and logits": rollout_bytes(some, model, EVAL_BATCH, lengths, size),
    }
    return {"evaluation": {name: value / 1e9 for name, value in parts.items()}}


def backward_peak(
    at: "Activations",
    size: int,
    logits: int,
    head: int,
    head_gradient: int,
    gradients: float,
    of_tower: float,
    earlier: bool,
    leaving: tuple[int, int],
) -> tuple[float, float]:
    """Where a training pass holds most: (numbers that autograd keeps, bytes beside them).

    size: bytes of a number. logits: bytes. head: numbers of it that are trained, each with a
    gradient of head_gradient bytes. gradients: bytes of all in the end, and of_tower those of the
    vision tower. earlier: an earlier pack has left all of them. leaving: bytes of a layer's and of
    the root's gradients on their way to other ranks.
    """
    first = gradients if earlier else head * head_gradient
    decoders = gradients if earlier else gradients - of_tower
    layer, root = leaving
    places = [
        # the head's gradient in float32 and, in bf16, a product to be added; then handed on
        (at.kept, gradients * earlier + logits + head * (4 if size == 4 else 6)),
        (at.kept, first + head * 4),
        # the last layer and the embedding; the last and the first block, with all gradients
        (at.kept + at.layer, first + layer),
        (at.tower, decoders + head * size),
        (at.tower + at.layer, decoders + layer),
        (at.tower + at.block, decoders + layer),
        (at.first_block, gradients + layer),
        (0, gradients + root),
    ]
    return max(places, key=lambda place: place[0] * size + place[1])


def largest_file(config: TrainingConfig, model_bytes: int, trained: int, head: int) -> float:
    """Bytes of the largest file that is written: of moments, or of final/."""
    moments = trained * MOMENT_BYTES.get(config.optim, 8) * bool(config.save_steps)
    return min(max(MAX_FILE_BYTES, head * 4), max(moments, model_bytes))


def what_stays(
    config: TrainingConfig,
    parameters: int,
    trained: int,
    size: int,
    whole: bool,
    share: int,
    packed: int = 0,
    padding: int = 0,
) -> dict[str, float]:
    """Bytes that a rank holds throughout: weights, masters and moments.

    size: bytes of a number in the computation. whole: every rank holds the whole model; else
    `share` ranks do so together. packed: how many weights are in 4 bits. padding: numbers
    that whole blocks add to the moments.
    """
    light = config.optim in MOMENT_BYTES
    moments = (trained + padding) * MOMENT_BYTES.get(config.optim, 8)
    here = not config.cpu_offload  # on the device
    if whole:
        return {
            "weights": (parameters - packed) * size + packed * FOUR_BIT_BYTES,
            "float32 masters": trained * 4 * here if size == 2 and not light else 0,
            "AdamW moments": moments * here,
        }
    masters = {"masters": trained * size} if light else {"float32 masters": trained * 4}
    return {
        **{name: number / share * here for name, number in masters.items()},
        "frozen weights": (parameters - trained) * size / share * here,
        "AdamW moments": moments / share * here,
        "sampling copy": parameters * size,
    }


def rollout_bytes(
    config: TrainingConfig, model: QwenVLConfig, prompts: int, lengths: tuple[int, int], size: int
) -> int:
    """What a rollout holds besides weights: while it encodes all images; or later the cache with
    what the prefill or a decode step holds, unless these stay. lengths: of a prompt and of its
    images."""
    images = encoding_numbers(model, prompts * lengths[1]) * size
    tokens = max(lengths[0], min(PREFILL, prompts * lengths[0]))  # of one pass over prompts
    prefill = tokens * 3 * (model.hidden_size + model.intermediate_size) * size
    if config.cuda_graphs:
        return max(images, prefill)
    samples = prompts * config.num_generations
    cache = cache_bytes(config, model, prompts, config.num_generations, lengths[0], size)
    return max(images, cache + max(prefill, samples * model.vocab_size * logit_bytes(config)))


def cache_bytes(
    config: TrainingConfig, model: QwenVLConfig, prompts: int, group: int, longest: int, size: int
) -> int:
    """Keys and values of prompts and of their samples, and a token's queries."""
    tokens = prompts * (longest + group * config.max_completion_length)
    numbers = 2 * tokens * model.num_key_value_heads + prompts * group * model.num_attention_heads
    return numbers * model.head_dim * model.num_hidden_layers * size


def logit_bytes(config: TrainingConfig) -> int:
    """Of a logit, while a token is drawn: itself and its exponential; with --top_p also what is
    sorted, in float64."""
    return 8 if config.top_p == 1 else 40


def decoding_bytes(
    config: TrainingConfig, model: QwenVLConfig, prompts: int, longest: int, size: int
) -> float:
    """What CUDA graphs keep: the largest cache, an evaluation's or a step's, what the largest
    decode step holds, and the graphs themselves."""
    if not config.cuda_graphs:
        return 0
    batch = min(EVAL_BATCH, config.eval_samples or EVAL_BATCH)
    shapes = [(prompts, config.num_generations), (batch, max(1, config.eval_samples_per_prompt))]
    cache = max(cache_bytes(config, model, *shape, few_lengths(longest), size) for shape in shapes)
    logits = max(map(math.prod, shapes)) * model.vocab_size * logit_bytes(config)
    return cache + logits + MOST * (60 + 17 * model.num_hidden_layers) * GRAPH_NODE


def encoding_numbers(model: QwenVLConfig, image_tokens: int) -> int:
    """How many numbers encoding images holds where no gradient is wanted: pixels, and the larger
    half of a block (its feed-forward; or its attention, which rotates in float32)."""
    vision = model.vision
    mlp = min(3, family_of(model).KEPT_BY_VISION_MLP) * vision.intermediate_size
    patch = vision.patch_dim + 3 * vision.embed_dim + max(mlp, 8 * vision.embed_dim)
    return image_tokens * vision.spatial_merge_size**2 * patch


class Activations(NamedTuple):
    """How many numbers the passes of a pack hold besides weights and gradients.

    forward: the most that a pass without gradients holds. kept: what autograd holds as a pass with
    gradients ends; tower: the vision tower's part of it, less its merger's. layer, block: what the
    backward pass of one decoder layer and of one vision block holds besides. first_block: all that
    is held in the first block's.
    """

    forward: int
    kept: int
    tower: int
    layer: int
    block: int
    first_block: int


def activation_numbers(
    config: TrainingConfig,
    model: QwenVLConfig,
    tokens: int,
    rows: int,
    lengths: tuple[int, int],
    sdpa: bool,
) -> Activations:
    """tokens: of the pack, in `rows` rows. lengths: of a prompt and of its images.

    Per token and layer autograd keeps two norms and the residual stream twice, q, the attended
    values and the feed-forward's four products, and the prompt's keys and values once per
    completion. SDPA copies the rows' queries, keys, values and outputs. The second half of the last
    layer works on completions alone. A feed-forward's backward pass makes two gradients of its
    inner width, and two of the outer, while nothing of it is free yet.
    """
    longest_prompt, image_tokens = lengths[0], rows * lengths[1]
    vision = model.vision
    patches = image_tokens * vision.spatial_merge_size**2
    width, kv = model.hidden_size, model.head_dim * model.num_key_value_heads
    inner, q = model.intermediate_size, model.head_dim * model.num_attention_heads
    row = longest_prompt + config.max_completion_length
    gathered = rows * (longest_prompt + config.num_generations * row) * 2 * kv
    attention = width + 2 * q + (q + kv) * model.qk_norm + sdpa * (q + 2 * kv)
    layer = tokens * (attention + 3 * width + 4 * inner) + gathered
    last = layer - rows * longest_prompt * (3 * width + 4 * inner)
    backward = tokens * (2 * width + 2 * inner)

    encoding = encoding_numbers(model, image_tokens)
    mlp_forward, attention_forward = 3 * (width + inner), 2 * width + 3 * q + 2 * kv
    forward = max(tokens * mlp_forward, tokens * attention_forward + gathered)
    mlp = family_of(model).KEPT_BY_VISION_MLP * vision.intermediate_size
    block = patches * (10 * vision.embed_dim + mlp)
    block_backward = 2 * patches * (vision.embed_dim + vision.intermediate_size)
    mergers = 1 + len(vision.deepstack_visual_indexes)
    merger = patches * 4 * mergers * vision.embed_dim
    pixels, stream = patches * vision.patch_dim, patches * vision.embed_dim
    if config.gradient_checkpointing:  # inputs are kept, and one layer or block at a time in full
        decoder = (model.num_hidden_layers + 1) * tokens * width
        tower = pixels + (vision.depth + 1) * stream
        backward, block_backward = layer + backward, block + block_backward
        first_block = pixels + stream + block_backward
    else:
        decoder = (model.num_hidden_layers - 1) * layer + last + tokens * width
        tower = pixels + vision.depth * block
        first_block = pixels + block + block_backward
    if vision_is_frozen(config):
        merger = tower = block_backward = first_block = 0
    else:
        forward = max(forward, encoding)
    kept = decoder + merger + tower
    return Activations(forward, kept, tower, backward, block_backward, first_block)
