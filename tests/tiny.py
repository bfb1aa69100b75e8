"""Tiny random models and prompts that several test files use."""

import random
from types import SimpleNamespace

import torch

from grpo.loss import Tokens
from grpo.rollout import Draw, Group
from models.config import QwenVLConfig
from models.decoding.stop import END, StopStrings, automaton, fold
from models.decoding.storage import cast
from models.families import parse_config
from models.prompt import Prompt, mrope_position_ids
from models.qwen_vl import QwenVL

IMAGE = 59
LAYER_TYPES = ["full_attention", "linear_attention", "linear_attention", "full_attention"]


def tiny_config(tied: bool = True, kv_heads: int = 2, vocab: int = 64) -> QwenVLConfig:
    raw = {
        "model_type": "qwen2_vl",
        "vocab_size": vocab,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 56,
        "image_token_id": IMAGE,
        "video_token_id": 60,
        "vision_start_token_id": 57,
        "vision_end_token_id": 58,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "patch_size": 4,
        },
    }
    return parse_config(raw, "tiny")


def family_config(family: str, tied: bool = False) -> QwenVLConfig:
    """Odd sizes: 6 heads on 2, of a width that is not hidden / heads where the family allows it;
    windows and full attention; three levels of DeepStack."""
    raw = {
        "model_type": family,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": tied,
        "eos_token_id": 56,
        "image_token_id": IMAGE,
        "video_token_id": 60,
        "vision_start_token_id": 57,
        "vision_end_token_id": 58,
    }
    tower = {"depth": 4, "num_heads": 2, "patch_size": 4}
    if family == "qwen2_vl":
        raw["vision_config"] = tower | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
        return parse_config(raw, "tiny")
    tower |= {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 52}
    if family == "qwen2_5_vl":
        raw["vision_config"] = tower | {"window_size": 16, "fullatt_block_indexes": [1, 3]}
        return parse_config(raw, "tiny")
    upper = [name for name in raw if "token_id" in name or name == "model_type"]
    top = {name: raw.pop(name) for name in [*upper, "tie_word_embeddings"]}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    raw |= {"head_dim": 16, "rope_scaling": rope, "eos_token_id": top.pop("eos_token_id")}
    tower |= {"num_position_embeddings": 25}
    if family == "qwen3_vl":
        tower |= {"deepstack_visual_indexes": [0, 1, 3]}
    else:  # 8 of 32 numbers are rotated; layers in no pattern; 2 heads of keys, 4 of values
        rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
        raw |= {"head_dim": 32, "rope_scaling": rope, "layer_types": LAYER_TYPES}
        raw |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        raw |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    config = parse_config({**top, "text_config": raw, "vision_config": tower}, "tiny")
    assert config.tie_word_embeddings == tied
    return config


def tiny_model(
    config: QwenVLConfig, dtype=torch.float64, seed: int = 0, scale: float = 4
) -> QwenVL:
    """Random weights, `scale` times larger than at a training's start, so that they matter."""
    torch.manual_seed(seed)
    model = cast(QwenVL(config), dtype).initialize()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale)
    return model


def second_token_weights(config: QwenVLConfig, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The layer that Qwen3.5 is published with and nothing here trains, by its names in files."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {"fc": (width, 2 * width), "norm": (width,)}
    shapes |= {f"pre_fc_norm_{what}": (width,) for what in ("embedding", "hidden")}
    layer = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    layer |= {"mlp.down_proj": (width, inner), "self_attn.q_proj": (2 * queries, width)}
    layer |= {"self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width)}
    layer |= {"self_attn.o_proj": (width, queries)}
    layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    return {f"mtp.{name}.weight": torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def tiny_prompt(
    config: QwenVLConfig, grids: list[tuple[int, int]], text: int = 5, seed: int = 0
) -> Prompt:
    """Text, then for each grid (rows, columns of patches) an image and more text."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(0, 56, (count,), generator=generator)

    parts = [words(text)]
    for h, w in grids:
        image = torch.full((h * w // 4,), IMAGE)
        parts += [torch.tensor([57]), image, torch.tensor([58]), words(text)]
    ids = torch.cat(parts)
    grid = torch.tensor([(1, h, w) for h, w in grids], dtype=torch.int64).reshape(-1, 3)
    patches = int(grid.prod(1).sum())
    pixels = torch.randn(patches, config.vision.patch_dim, generator=generator)
    position_ids, following = mrope_position_ids(ids, grid, config)
    keys = tuple(f"{seed}/{i}" for i in range(len(grids)))
    return Prompt(ids, position_ids, following, pixels, grid, keys)


def drawn(prompts: list[Prompt]) -> list[Draw]:
    """What `sample_groups` takes: rows whose prompts are these."""
    rows = [SimpleNamespace(prompt=lambda _, prompt=prompt: prompt) for prompt in prompts]
    return [Draw(number, row) for number, row in enumerate(rows)]


def weighed(groups: list[Group], advantages: torch.Tensor, weights: torch.Tensor) -> list[Group]:
    """The groups, each with its line of these (B, G) tables."""
    for group, earned, weight in zip(groups, advantages, weights, strict=True):
        group.advantages, group.weights = earned, weight
    return groups


def loss_flags(**changes) -> SimpleNamespace:
    """The flags that `policy_loss` reads, at their defaults but for the changes; without a KL."""
    flags = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "beta": 0.0,
        "kl_estimator": "k3",
        "use_bias_correction_kl": False,
        "entropy_coef": 0.0,
    }
    assert changes.keys() <= flags.keys()
    return SimpleNamespace(**(flags | changes))


def loss_tokens(logps, advantages, weights, **others) -> Tokens:
    """Tokens whose policy is the one that sampled, but for `others`."""
    known = {"old_logps": None, "ref_logps": None, "entropy": torch.zeros_like(logps)}
    known |= {"sampling_logps": logps.detach(), "start": 0} | others
    return Tokens(logps=logps, advantages=advantages, weights=weights, **known)


def stop_strings(strings: tuple[bytes, ...], stop_ids) -> StopStrings:
    """Of a vocabulary of 64 tokens, each none to three of the bytes a and b."""
    chance = random.Random(0)
    pieces = [bytes(chance.choice(b"ab") for _ in range(chance.randrange(4))) for _ in range(64)]
    table = fold(automaton(strings), pieces)
    table[:, list(stop_ids)] = END
    return StopStrings(strings, pieces, table)


def cut_short(ids: list[int], stop: StopStrings, stop_ids) -> list[int]:
    """A completion up to the token with which it ends, looked for token by token in its bytes."""
    for count in range(1, len(ids) + 1):
        text = b"".join(stop.pieces[token] for token in ids[:count])
        if ids[count - 1] in stop_ids or any(string in text for string in stop.strings):
            return ids[:count]
    return ids
