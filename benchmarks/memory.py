"""The memory that `--dry_run` predicts for the published sizes of each family.

    python -m benchmarks.memory

Prints two tables in Markdown, of bfloat16 and prompts of 1,024 tokens: the peak over the phases of
a step, with the flags' defaults on one GPU and on each of eight, and between them with
--tokens_per_pack 4096 on one; and each phase's GB of two models. Nothing is loaded or measured: the
sizes below are those of the published config.json files, as far as a shape depends on them.
"""

from grpo.flags.config import TrainingConfig
from grpo.plan.memory import Estimate, peak_gb
from grpo.plan.sizes import Facts
from models.config import QwenVLConfig
from models.families import parse_config

PROMPT = 1024  # tokens
TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
TOKENS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}

# name: hidden size, layers, heads, key/value heads, inner size, vocabulary, is the head tied
SIZES = {
    "Qwen2-VL 2B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2-VL 7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2-VL 72B": (8192, 80, 64, 8, 29568, 152064, False),
    "Qwen2.5-VL 3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-VL 7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-VL 32B": (5120, 64, 40, 8, 27648, 152064, False),
    "Qwen2.5-VL 72B": (8192, 80, 64, 8, 29568, 152064, False),
    "Qwen3-VL 2B": (2048, 28, 16, 8, 6144, 151936, True),
    "Qwen3-VL 4B": (2560, 36, 32, 8, 9728, 151936, True),
    "Qwen3-VL 8B": (4096, 36, 32, 8, 12288, 151936, False),
    "Qwen3-VL 32B": (5120, 64, 64, 8, 25600, 151936, False),
    "Qwen3.5 0.8B": (1024, 24, 8, 2, 3584, 248320, True),
    "Qwen3.5 2B": (2048, 24, 8, 2, 6144, 248320, True),
    "Qwen3.5 4B": (2560, 32, 16, 4, 9216, 248320, True),
    "Qwen3.5 9B": (4096, 32, 16, 4, 12288, 248320, False),
    "Qwen3.5 27B": (5120, 64, 24, 4, 17408, 248320, False),
}
# Of Qwen3.5: heads of values in linear attention; depth, width and inner size of the vision tower
DELTA = {"0.8B": 16, "2B": 16, "4B": 32, "9B": 32, "27B": 48}
TOWERS = {"0.8B": (12, 768, 3072), "2B": (24, 1024, 4096), "4B": (24, 1024, 4096)}
TOWERS |= {"9B": (27, 1152, 4304), "27B": (27, 1152, 4304)}
PHASES = [("Qwen2-VL 2B", 1), ("Qwen2-VL 2B", 2), ("Qwen2-VL 7B", 8), ("Qwen2-VL 7B", 1)]


def published(name: str) -> dict:
    """config.json of one of SIZES, in what a shape depends on."""
    width, layers, heads, kv, inner, vocabulary, tied = SIZES[name]
    family, size = name.split()
    text = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip
    vision = {"num_heads": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "Qwen3-VL":
        large = size in ("8B", "32B")
        return TOKENS | {
            "model_type": "qwen3_vl", "tie_word_embeddings": tied,
            "text_config": text | {
                "model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5_000_000,
                "rope_scaling": {
                    "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
                "attention_bias": False,
            },
            "vision_config": vision | {
                "depth": 27 if large else 24, "hidden_size": 1152 if large else 1024,
                "intermediate_size": 4304 if large else 4096, "out_hidden_size": width,
                "deepstack_visual_indexes": [8, 16, 24] if large else [5, 11, 17],
                "patch_size": 16, "num_position_embeddings": 2304, "in_channels": 3,
                "hidden_act": "gelu_pytorch_tanh",
            },
        }  # fmt: skip
    if family == "Qwen3.5":
        depth, tower, inner_tower = TOWERS[size]
        return {
            "model_type": "qwen3_5", "tie_word_embeddings": tied,
            "image_token_id": 248056, "video_token_id": 248057,
            "vision_start_token_id": 248053, "vision_end_token_id": 248054,
            "text_config": text | {
                "model_type": "qwen3_5_text", "head_dim": 256, "attention_bias": False,
                "attn_output_gate": True, "full_attention_interval": 4,
                "linear_num_key_heads": 16, "linear_num_value_heads": DELTA[size],
                "linear_key_head_dim": 128, "linear_value_head_dim": 128,
                "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32",
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10_000_000,
                    "partial_rotary_factor": 0.25, "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                },
            },
            "vision_config": vision | {
                "depth": depth, "hidden_size": tower, "intermediate_size": inner_tower,
                "num_heads": 12 if size == "0.8B" else 16, "out_hidden_size": width,
                "patch_size": 16, "num_position_embeddings": 2304, "in_channels": 3,
                "hidden_act": "gelu_pytorch_tanh",
            },
        }  # fmt: skip
    vision |= {"depth": 32, "in_chans": 3, "patch_size": 14}
    if family == "Qwen2-VL":
        vision |= {"embed_dim": 1280, "hidden_size": width, "mlp_ratio": 4}
        vision |= {"hidden_act": "quick_gelu"}
    else:
        vision |= {"hidden_size": 1280, "out_hidden_size": width, "hidden_act": "silu"}
        vision |= {"intermediate_size": 3420 if size in ("3B", "7B") else 3456}
        vision |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
        vision |= {"spatial_patch_size": 14, "tokens_per_second": 2}
    return TOKENS | text | {
        "model_type": "qwen2_vl" if family == "Qwen2-VL" else "qwen2_5_vl",
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied, "vision_config": vision,
    }  # fmt: skip


def facts(config: QwenVLConfig, world: int) -> Facts:
    """Of prompts that are one image, on each of `world` GPUs."""
    return Facts(config, PROMPT, PROMPT, True, world, "cuda", "flash_attention_2")


def peak(config: QwenVLConfig, world: int, **flags) -> float:
    """The largest phase's GB on each of `world` GPUs."""
    settings = TrainingConfig(model_name_or_path="m", dataset_name="d", **flags)
    return peak_gb(settings, facts(config, world))


def main() -> None:
    print(
        "| model | one GPU | `--optim adamw_8bit` | and `--cpu_offload` | `--use_peft` | "
        "and `--load_in_4bit` | each of eight |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in SIZES:
        config = parse_config(published(name), name)
        light = {"optim": "adamw_8bit", "tokens_per_pack": 4096}
        lora = {"use_peft": True, "tokens_per_pack": 4096}
        cells = [peak(config, 1), peak(config, 1, **light)]
        cells += [peak(config, 1, **light, cpu_offload=True), peak(config, 1, **lora)]
        cells += [peak(config, 1, **lora, load_in_4bit=True), peak(config, 8)]
        print(f"| {name} | " + " | ".join(f"{gb:.0f}" for gb in cells) + " |")

    print("\n| | stays | rollout | reference | training | optimizer |\n|---|---|---|---|---|---|")
    for name, world in PHASES:
        settings = TrainingConfig(model_name_or_path="m", dataset_name="d")
        estimate = Estimate(settings, facts(parse_config(published(name), name), world))
        parts = [estimate.stays(), *estimate.phases().values()]
        cells = [f"{sum(part.values()) / 1e9:.1f}" for part in parts]
        print(f"| {name}, {world} rank{'s' * (world > 1)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
