"""What a step of TRL's GRPOTrainer multiplies, moves and launches, counted as our own is.

    python -m benchmarks.launches --predict "Qwen2-VL 2B" --peer

transformers' model and `generate`, and TRL's `_get_per_token_logps_and_entropies`, `_compute_loss`
and head, run as they are on torch's meta device at the published shapes: one GPU, bfloat16 weights,
flash attention, gradient checkpointing in training, no vLLM, no compilation, and TRL's defaults
else. The prompts and completions are of one length each, so nothing is padded. Numbers that the
code reads (ids, masks, grids) are tensors on the CPU; in TRL they are on the GPU, so what is done
with them counts as launches too. What is not counted as it runs:

* Decoding: a token is counted at the first, the middle and the last length of the cache, and
  integrated linearly between them.
* Flash attention: one launch, and one in the backward pass; q, k and v read, the output written;
  products of what is seen alone, in the backward pass five for the forward's two. As for ours.
* The draw of a token: `torch.multinomial` as three launches over (B, V) in float32 that pass over
  it five times (its fast path), and a token that ends nothing.
* The head's two Triton kernels: one launch each a tile; the first reads it, the second reads and
  writes it. The float32 gradients of the head and its input are accumulated by one product each.
* AdamW: as fused, two launches that read four numbers a weight and write three, in the weights'
  dtype. With all weights that is bfloat16 without a float32 master (updates smaller than the
  rounding are lost); TRL's default, float32 weights under autocast, moves more.
* Micro-batches: one holds the next power of two of sequences that fills --tokens_per_pack.
* Not in it, as for ours: images, rewards, Python, waits for the device (a token has one or none),
  what one operation launches beside one kernel; and Trainer's own bookkeeping.
"""

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.dispatch import Norm
from benchmarks.peer_count import PeerCount, attention, less, note, plus
from benchmarks.step import stand_in_for_torchvision
from demo.published import config_dict
from models.config import QwenVLConfig

FLASH = "counted_flash"
PAD, EOS, TOKEN = 3, 4, 2
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # the layers that LoRA has here
RANK, ALPHA = 16, 32


@dataclass
class Work:
    """One step: prompts x group completions of `completion` tokens; `text` and image tokens in a
    prompt; at most about `limit` tokens in a micro-batch."""

    prompts: int
    group: int
    text: int
    image: int
    completion: int
    limit: int

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    @property
    def micro(self) -> int:
        """Sequences of a micro-batch."""
        fitting = self.limit / (self.text + self.image + self.completion)
        return min(self.samples, 2 ** math.ceil(math.log2(max(1, fitting))))


# ---- TRL's model, inputs and kernels ------------------------------------------------------------


def build(config: QwenVLConfig, adapted: bool) -> nn.Module:
    """transformers' model as TRL would have it after loading, on meta."""
    import transformers
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from trl.trainer.utils import add_fused_lm_head

    transformers.AttentionInterface.register(FLASH, attention)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    settings = transformers.CONFIG_MAPPING[config.family](**config_dict(config, "bfloat16"))
    kind = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(settings, dtype=torch.bfloat16, attn_implementation="eager")
    for part in (settings, settings.text_config, settings.vision_config, model.config):
        part._attn_implementation_internal = FLASH  # by its name it would look for a library
    model.generation_config.pad_token_id = PAD
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if adapted:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ADAPTED)
        with torch.device("meta"):
            model = get_peft_model(model, settings, autocast_adapter_dtype=False)
        model.to(torch.bfloat16)  # as peft gives adapters the layer's dtype, where there are values
        model.enable_input_require_grads()
    return model


def base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def make_inputs(config: QwenVLConfig, rows: int, text: int, image: int) -> dict[str, Tensor]:
    """What TRL gives `generate` for `rows` prompts with an image each: half the text before it."""
    side = math.isqrt(image) * config.vision.spatial_merge_size
    ids = torch.full((rows, text + image), TOKEN)
    ids[:, text // 2] = config.vision_start_token_id
    kinds = torch.zeros_like(ids)
    kinds[:, text // 2 + 1 : text // 2 + 1 + image] = 1
    ids[kinds == 1] = config.image_token_id
    pixels = torch.empty(rows * side * side, config.vision.patch_dim, device="meta")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds.int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, side, side]] * rows),
    }


@contextlib.contextmanager
def stand_ins(drawn: list):
    """Counts, in the place of running them, the draw and the Triton kernels, which the meta device
    does not have. drawn: gets the counts so far at each draw."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    def draw(probs, num_samples):
        note("multinomial", 3, 0, 5 * probs.nbytes)
        drawn.append(Norm.count.state())
        return torch.full((len(probs), 1), TOKEN)

    def add_product(total, a, b):
        size = a.nbytes + b.nbytes + 2 * total.nbytes
        note("addmm", 1, 2 * a.shape[0] * a.shape[1] * b.shape[1], size)

    def of_tile(passes: int):
        return lambda tile, *_, **__: note("triton", 1, 0, passes * tile.nbytes)

    with contextlib.ExitStack() as stack:
        for where, name, what in (
            (torch, "multinomial", draw),
            (torch, "is_autocast_enabled", lambda device=None: False),
            (utils, "_use_triton", lambda device: True),  # so it takes completion tokens alone
            (chunked_logprob, "_addmm_fp32", add_product),
            (chunked_logprob, "_forward_tile", of_tile(1)),
            (chunked_logprob, "_backward_tile", of_tile(2)),
        ):
            stack.enter_context(mock.patch.object(where, name, what))
        yield


# ---- a step -------------------------------------------------------------------------------------


def rollout(model: nn.Module, config: QwenVLConfig, work: Work, text: int) -> list[tuple]:
    """[vision tower, prefill with a first token, one more token] of `generate`."""
    from transformers import GenerationConfig

    drawn, tower = [], []
    tokens = GenerationConfig(
        max_new_tokens=2, do_sample=True, pad_token_id=PAD, bos_token_id=None, eos_token_id=[EOS],
        temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
        cache_implementation=None, suppress_tokens=[config.image_token_id], disable_compile=True,
    )  # fmt: skip
    visual, inputs = base(model).model.visual, make_inputs(config, work.samples, text, work.image)
    hooks = [
        visual.register_forward_pre_hook(lambda *_: tower.append(Norm.count.state())),
        visual.register_forward_hook(lambda *_: tower.append(Norm.count.state())),
    ]
    with torch.no_grad(), stand_ins(drawn), PeerCount(config.vocab_size):
        model.eval().generate(**inputs, generation_config=tokens)
    for hook in hooks:
        hook.remove()
    seen = less(tower[1], tower[0])
    return [seen, less(drawn[0], seen), less(drawn[1], drawn[0])]


def trainer() -> SimpleNamespace:
    """What TRL's methods ask of the trainer, for one process. Metrics have no values."""
    from trl import GRPOTrainer

    known = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1,
            is_main_process=False,
            autocast=contextlib.nullcontext,
            gather=lambda x: torch.zeros(x.shape),
            reduce=lambda x, reduction: torch.zeros(x.shape),
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.04, loss_type="dapo", epsilon_low=0.2,
        epsilon_high=0.2, use_vllm=False, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    known._get_per_token_logps_and_entropies = lambda *given, **named: (
        GRPOTrainer._get_per_token_logps_and_entropies(known, *given, **named)
    )
    return known


def micro_batch(config: QwenVLConfig, work: Work) -> dict:
    inputs = make_inputs(config, work.micro, work.text, work.image)
    shape = (work.micro, work.completion)
    kinds = inputs.pop("mm_token_type_ids")
    kinds = torch.cat([kinds, kinds.new_zeros(shape)], 1)
    return {
        "prompt_ids": inputs.pop("input_ids"),
        "prompt_mask": inputs.pop("attention_mask"),
        "completion_ids": torch.full(shape, TOKEN),
        "completion_mask": torch.ones(shape, dtype=torch.long),
        "advantages": torch.ones(work.micro),
        "num_items_in_batch": torch.tensor(work.samples * work.completion),
        "mm_token_type_ids": kinds,
        "num_images": [1] * work.micro,
        **inputs,
    }


def score(known: SimpleNamespace, model: nn.Module, batch: dict, keep: int) -> Tensor:
    """The reference's log-probs, as `_generate_and_score_completions` asks for them."""
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    off = model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()
    with torch.no_grad(), off:
        return known._get_per_token_logps_and_entropies(
            model, ids, mask, keep, **{name: batch[name] for name in names}
        )[0]


def step(config: QwenVLConfig, work: Work, adapted: bool) -> dict[str, tuple]:
    """(operations, bytes, launches, seconds one by one) of each phase of TRL's step."""
    stand_in_for_torchvision()
    from trl import GRPOTrainer

    model, rows = build(config, adapted), {}
    steps = work.completion - 1
    at = [rollout(model, config, work, work.text + more) for more in (0, steps // 2, steps - 1)]
    rows["vision tower"], rows["prefill"] = at[0][:2]
    first, middle, last = (costs[2] for costs in at)
    half = tuple((steps / 4) * (a + 2 * b + c) for a, b, c in zip(first, middle, last, strict=True))
    rows["decoding"] = half

    known, batches = trainer(), work.samples // work.micro
    batch = micro_batch(config, work)
    with stand_ins([]):
        with PeerCount(config.vocab_size) as count:
            model.eval()
            batch["ref_per_token_logps"] = score(known, model, batch, work.completion)
        rows["reference"] = tuple(batches * x for x in count.state())
        model.train()
        base(model).gradient_checkpointing_enable()
        first = train(GRPOTrainer, known, model, batch, config)
        second = train(GRPOTrainer, known, model, batch, config)  # adds to its gradients
        rows["training"] = plus(first, second, batches - 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    with PeerCount(config.vocab_size) as count:
        nn.utils.clip_grad_norm_(trained, 1.0)
        note("_fused_adamw_", 2, 0, 7 * sum(p.nbytes for p in trained))
    rows["optimizer"] = count.state()
    return rows


def train(peer, known: SimpleNamespace, model: nn.Module, batch: dict, config) -> tuple:
    with PeerCount(config.vocab_size) as count:
        peer._compute_loss(known, model, batch).backward()
    return count.state()


# ---- the table ----------------------------------------------------------------------------------

OPTIM = "adamw_torch"
OURS = {
    "decoding": "decoding, in a captured graph",
    "training": f"training, {OPTIM}",
    "optimizer": f"optimizer, {OPTIM}",
}


def beside(name: str, ours: dict, theirs: dict[str, tuple], launch: float) -> dict:
    """Prints both steps, phase by phase, and returns TRL's. ours: `predict`'s rows; theirs:
    `step`'s; launch: seconds. The line of the vision tower is that of generation: what scoring and
    training run of it is in their lines."""
    keys = ("flops", "bytes", "launches", "predicted_s")
    rows, total = {}, {"ours": (0,) * 4, "TRL": (0,) * 4}
    print(f"\n{name}, beside TRL\n\n| phase | TFLOP | GB | launches | ms ", end="")
    print("| TRL: TFLOP | GB | launches | ms | TRL / ours |\n" + "|---" * 10 + "|")

    def line(phase: str, a: tuple, b: tuple) -> None:
        cells = [
            f"{row[0] / 1e12:.0f} | {row[1] / 1e9:,.0f} | {row[2]:,.0f} | {1e3 * row[3]:,.0f}"
            for row in (a, b)
        ]
        print(f"| {phase} | " + " | ".join(cells) + f" | {b[3] / a[3]:.1f} |")

    for phase, (flops, size, launches, busy) in theirs.items():
        a = tuple(ours[OURS.get(phase, phase)][key] for key in keys)
        b = (flops, size, launches, max(busy, launches * launch))
        line(phase, a, b)
        rows[phase] = dict(zip(keys, b, strict=True))
        total = {"ours": plus(total["ours"], a), "TRL": plus(total["TRL"], b)}
    line("a step", total["ours"], total["TRL"])
    # with vLLM: our own generation's cost, and a second scoring pass, for the sampled log-probs
    shared = total["TRL"]
    for phase in ("vision tower", "prefill", "decoding"):
        row = ours[OURS.get(phase, phase)]
        shared = plus(less(shared, tuple(rows[phase].values())), tuple(row[key] for key in keys))
    shared = plus(shared, tuple(rows["reference"].values()))
    line("TRL, generating as here, and scoring twice", total["ours"], shared)
    return rows
