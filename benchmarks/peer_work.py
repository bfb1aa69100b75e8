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
* Packing: a micro-batch holds the next power of two of sequences that fills --tokens_per_pack.
* Not in it, as for ours: images, rewards, Python, waits for the device (a token has one or none),
  what one operation launches beside one kernel; and Trainer's own bookkeeping.
"""

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.dispatch import BANDWIDTH, FLOPS, LAUNCH, NO_KERNEL, Count, Norm, moved
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


# ---- counting -----------------------------------------------------------------------------------


class PeerCount(Count):
    """As `Count`; integers on the CPU stand for the GPU's, and may meet tensors on meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        found = []
        tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        on_meta = any(t.is_meta for t in found)
        if name == "_to_copy":  # what has no values goes nowhere; what has some keeps them
            kwargs.pop("device", None)
        if on_meta and name == "masked_select":  # of a mask with values
            size = int(args[1].expand_as(args[0]).sum())
            args, func = (args[0].new_empty(size),), torch.ops.aten.clone.default
        elif on_meta and any(not t.is_meta for t in found):
            if name.startswith("index"):  # masks as the indices at which they are true
                args = (args[0], places(args[1]), *args[2:])
            args, kwargs = tree_map(to_meta, (args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [t for t in (result,) if isinstance(t, Tensor)]
        if not on_meta and not any(t.is_meta for t in made) and (found or made):
            if not func.is_view and name not in NO_KERNEL:
                self.operations[name] += 1
                self.take(0, moved(name, func, args, kwargs, found, made))
        return result

    def state(self) -> tuple[float, float, int, float]:
        return self.flops, self.bytes, self.launches, self.seconds


def to_meta(x):
    """A tensor's shape, without its values."""
    if not isinstance(x, Tensor) or x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def places(indices):
    """An operation's indices, with those of its masks in place of the masks."""
    if isinstance(indices, Tensor) or not isinstance(indices, (list, tuple)):
        return indices
    pairs = [
        i.nonzero(as_tuple=True) if i is not None and i.dtype == torch.bool else (i,)
        for i in indices
    ]
    return [index for some in pairs for index in some]


def less(a: tuple, b: tuple) -> tuple:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def plus(a: tuple, b: tuple, times: float = 1) -> tuple:
    return tuple(x + times * y for x, y in zip(a, b, strict=True))


class Flash(torch.autograd.Function):
    """(B, T, heads, D) from q, k, v of (B, heads, T, D); pairs: of queries and keys that see one
    another, over the batch."""

    @staticmethod
    def forward(ctx, q, k, v, pairs):
        ctx.save_for_backward(q, k, v)
        ctx.flops = 2 * q.shape[1] * q.shape[3] * pairs  # of one product
        note("flash", 1, 2 * ctx.flops, 2 * q.nbytes + k.nbytes + v.nbytes)
        return q.new_empty(q.transpose(1, 2).shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        note("flash", 1, 5 * ctx.flops, 4 * q.nbytes + 2 * k.nbytes + 2 * v.nbytes)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def note(name: str, launches: int, flops: float, size: float) -> None:
    """Adds work that torch's dispatcher does not see to the count that is open."""
    Norm.count.operations[name] += launches
    Norm.count.take(flops, size)


def attention(module, query, key, value, attention_mask, is_causal=None, cu_seq_lens_q=None, **_):
    """transformers' door to attention; nothing is padded, so there is no mask."""
    assert attention_mask is None
    rows, seen = query.shape[2], key.shape[2]
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.tolist()
        pairs = sum((b - a) ** 2 for a, b in pairwise(ends))
    elif module.is_causal if is_causal is None else is_causal:
        pairs = query.shape[0] * (rows * seen - rows * (rows - 1) // 2)
    else:
        pairs = query.shape[0] * rows * seen
    return Flash.apply(query, key, value, pairs), None


# ---- TRL's model, inputs and kernels ------------------------------------------------------------


def build(config: QwenVLConfig, adapted: bool) -> nn.Module:
    """transformers' model as TRL would have it after loading, on meta."""
    import transformers
    from peft import LoraConfig, get_peft_model
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
    """The kernels that meta does not have, and ends of waits. drawn: the counts at each draw."""
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
