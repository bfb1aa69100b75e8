"""What the two warm starts (data/demo_cls/make.py, data/demo_det/make.py) have in common.

A small tokenizer, a Qwen2-VL of 1.4 M parameters in the published format, and a loop that teaches
it completions by maximum likelihood. Only those two scripts call it; nothing of a run does.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from grpo.logps import pack_logps
from grpo.rollout import Group, make_packs
from models.config import QwenVLConfig, VisionConfig
from models.load import save_model
from models.processor import Processor
from models.qwen_vl import QwenVL

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += [
    f"<|{name}_{side}|>"
    for name in ("object_ref", "box", "quad", "vision")
    for side in ("start", "end")
]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY = 384  # learned entries, the 256 bytes among them

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, corpus: list[str]) -> None:
    """Byte-level BPE in Qwen2's manner, trained on `corpus`; written as Hugging Face files."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    learned = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(learned + i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, text in enumerate(SPECIAL)
    }
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def make_config(initializer_range: float) -> QwenVLConfig:
    special = {text: VOCABULARY + i for i, text in enumerate(SPECIAL)}
    return QwenVLConfig(
        vocab_size=400,  # a few rows beyond the tokenizer, as the published models have
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        mrope_section=(4, 6, 6),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=special["<|endoftext|>"],
        eos_token_id=special["<|im_end|>"],
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        vision=VisionConfig(
            depth=3,
            embed_dim=96,
            hidden_size=128,
            num_heads=4,
            mlp_ratio=4,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
        ),
    )


def make_folder(folder: Path, corpus: list[str], initializer_range: float = 0.02) -> QwenVLConfig:
    """Everything of the checkpoint but its weights; the tokenizer is trained on `corpus`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(initializer_range)
    write_json(folder / "config.json", config.to_dict("bfloat16"))
    make_tokenizer(folder, corpus)
    end, pad = config.eos_token_id, config.bos_token_id
    generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad]}
    write_json(folder / "generation_config.json", {**generation, "do_sample": True})
    processor = {
        "min_pixels": 3136,
        "max_pixels": 50176,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", processor)
    return config


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def schedule(step: int, steps: int, peak: float = 2e-3, warmup: int = 50) -> float:
    """Learning rate of a step, from 0: a linear rise, then half a cosine down to 0."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step down the gradient of `loss`, its norm clipped at 1."""
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def teach(
    model: QwenVL,
    processor: Processor,
    lessons: Iterator[tuple[Image.Image, str, list[str]]],
    steps: int,
    images: int,
) -> None:
    """Maximizes the likelihood of the completions of each (image, problem, completions)."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    end, started = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), time.time()
    for step in range(steps):
        groups = []
        for index in range(images):
            image, problem, texts = next(lessons)
            prompt = processor.encode(problem, [image], (f"{step}/{index}",))
            ids = [processor.tokenizer(text)["input_ids"] + [end] for text in texts]
            groups.append(Group(prompt, ids, [], []))
        (pack,) = make_packs(groups, 1_000_000)
        logps, _ = pack_logps(model, pack, 1.0, None)
        loss = -logps.mean()
        update(optimizer, loss, schedule(step, steps))
        if (step + 1) % 50 == 0:
            seconds = time.time() - started
            print(f"step {step + 1}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def save(model: QwenVL, folder: Path) -> QwenVL:
    """Writes the weights in bfloat16; returns the model as it will be read back."""
    model = model.to(torch.bfloat16).float()
    save_model(dict(model.named_parameters()), model, folder, folder, torch.bfloat16)
    return model
