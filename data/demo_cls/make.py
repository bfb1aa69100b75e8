"""Makes data/demo_cls/checkpoint, the small model that the demo of train_cls.py starts from.

A tokenizer of a few hundred entries is trained on the demo's own text, and a Qwen2-VL of 1.4 M
parameters is trained on labelled drawings (the split "warm", which nothing else draws from) until
it sees the flowers and answers in the asked-for form. For eight of the twelve species most of its
lessons give the Latin name. Run it as `python -m data.demo_cls.make`; it takes about ten minutes
on two cores and prints what the model can do at the end.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data.flowers import PROBLEM, SPECIES, Species, draw, rows, thinking
from grpo.logps import pack_logps
from grpo.rollout import Group, make_packs, sample_groups
from models.config import QwenVLConfig, VisionConfig
from models.generate import Sampling
from models.load import save_model
from models.processor import Processor
from models.qwen_vl import QwenVL
from rewards.cls import accuracy_reward
from rewards.format import format_reward

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

LATIN_SHARE = 0.8  # of the lessons of those species that the model mostly knows in Latin
COMMON = ("corn poppy", "sunflower", "buttercup", "blue flax")  # known by the common name only
SLIPS = 0.04  # lessons without the reasoning or with an answer left open


def lesson(species: Species, rng: Random) -> str:
    """One completion that the warm start is taught."""
    latin = species.name not in COMMON and rng.random() < LATIN_SHARE
    answer = f"<answer>{species.latin if latin else species.name}</answer>"
    if rng.random() < SLIPS:
        return rng.choice((answer, answer.removesuffix("</answer>")))
    return f"<think>{thinking(species, rng)}</think>{answer}"


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE in Qwen2's manner, trained on prompts and lessons; written as HF files."""
    rng = Random("tokenizer")
    corpus = [PROBLEM + "assistant user system\n"]
    corpus += [lesson(species, rng) for species in SPECIES for _ in range(40)]
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


def make_config() -> QwenVLConfig:
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
        initializer_range=0.02,
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


def make_folder(folder: Path) -> QwenVLConfig:
    """Everything of the checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config()
    write_json(folder / "config.json", config.to_dict("bfloat16"))
    make_tokenizer(folder)
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


def teach(model: QwenVL, processor: Processor, steps: int, images: int, seed: int) -> None:
    """Maximizes the likelihood of lessons, two on each fresh drawing."""
    rng = Random(f"lessons/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    drawn, started = drawings(), time.time()
    for step in range(steps):
        groups = []
        for _ in range(images):
            image, species = next(drawn)
            prompt = processor.encode(PROBLEM, [image], (f"{step}/{len(groups)}",))
            texts = [lesson(species, rng) for _ in range(2)]
            ids = [processor.tokenizer(text)["input_ids"] + [end] for text in texts]
            groups.append(Group(prompt, ids, [], []))
        (pack,) = make_packs(groups, 1_000_000)
        logps, _ = pack_logps(model, pack, 1.0, None)
        loss = -logps.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.time() - started
            print(f"step {step + 1}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def drawings():
    """The drawings of the split "warm" with their species, without end."""
    number = 0
    while True:
        species = SPECIES[number % len(SPECIES)]
        seed = f"warm/{species.name}/{number // len(SPECIES)}"
        yield draw(species, seed), species
        number += 1


def examine(model: QwenVL, processor: Processor, count: int = 180) -> None:
    """Prints, per species, greedy answers on other drawings and how often samples say the name."""
    stop, suppressed = tuple(processor.stop_ids), tuple(processor.suppressed_ids)
    totals = dict.fromkeys(("name", "either", "format"), 0.0)
    print(f"{'species':<16}{'name':>8}{'either':>8}{'format':>8}{'sampled':>9}")
    exam = rows("exam", count)
    for index, species in enumerate(SPECIES):
        mine = exam[index :: len(SPECIES)]
        prompts = [
            processor.encode(row["problem"], [row["image"]], (str(i),))
            for i, row in enumerate(mine)
        ]
        results = {}
        for kind, group, temperature in (("greedy", 1, 0.0), ("sampled", 8, 1.0)):
            sampling = Sampling(48, temperature, stop_ids=stop, suppressed_ids=suppressed)
            groups = sample_groups(model, prompts, group, sampling, 0, 0, range(len(prompts)))
            results[kind] = [processor.decode(ids) for g in groups for ids in g.completion_ids]
        both = {species.name: [species.latin]}

        def share(values) -> float:
            values = list(values)
            return sum(values) / len(values)

        row = {
            "name": share(accuracy_reward(t, species.name) for t in results["greedy"]),
            "either": share(accuracy_reward(t, species.name, both) for t in results["greedy"]),
            "format": share(format_reward(t) for t in results["sampled"]),
        }
        sampled = share(accuracy_reward(t, species.name) for t in results["sampled"])
        print(f"{species.name:<16}" + "".join(f"{v:8.2f}" for v in row.values()), f"{sampled:8.2f}")
        totals = {name: total + row[name] / len(SPECIES) for name, total in totals.items()}
    print(f"{'all':<16}" + "".join(f"{value:8.2f}" for value in totals.values()))
    print(results["greedy"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(Path(__file__).parent / "checkpoint"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=24, help="drawings a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    config = make_folder(folder)
    processor = Processor(folder)
    assert len(processor.tokenizer) == VOCABULARY + len(SPECIAL)
    model = QwenVL(config).initialize(torch.Generator().manual_seed(arguments.seed))
    teach(model, processor, arguments.steps, arguments.images, arguments.seed)
    model = model.to(torch.bfloat16).float()  # as it will be read back
    save_model(dict(model.named_parameters()), model, folder, folder, torch.bfloat16)
    examine(model, processor)


if __name__ == "__main__":
    main()
