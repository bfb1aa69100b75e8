"""The memory a run will need, phase by phase, from the model and the flags.

Weights, gradients, moments and caches follow from their sizes; what passes hold is asked of the
layers (grpo/plan/passes.py). docs/memory.md derives each part and compares the sum with the
allocator's account. Fragments of the allocator are not counted.
"""

import math
from functools import cached_property

from grpo.engine.adamw import MOMENT_BYTES, NUMBERS
from grpo.engine.adapters import lora_of, vision_is_frozen
from grpo.engine.head import chunk_tokens
from grpo.flags.config import TrainingConfig
from grpo.plan.passes import (
    Rows,
    TowerHolds,
    decoder_forward,
    decoder_holds,
    skeleton,
    tower_forward,
    tower_holds,
)
from grpo.plan.sampling import EVAL_BATCH, graph_bytes, sampling_bytes
from grpo.plan.sizes import Facts
from models.four_bit import BYTES as FOUR_BIT_BYTES
from models.load import MAX_FILE_BYTES

LIBRARIES = 0.42e9  # bytes of torch, transformers and the tokenizer, in the CPU's memory


def peak_gb(config: TrainingConfig, facts: Facts) -> float:
    """GB (1e9 bytes) of the largest phase on a rank."""
    return max(sum(parts.values()) for parts in estimate_memory(config, facts).values())


def estimate_memory(config: TrainingConfig, facts: Facts) -> dict[str, dict[str, float]]:
    """GB (1e9 bytes) on each rank: for each phase of a step, by purpose.

    --cuda_graphs counts if it is true, not by default.
    Raises UserError for an adapter that does not fit the model.
    """
    phases = Estimate(config, facts).phases()
    return {
        phase: {purpose: size / 1e9 for purpose, size in parts.items()}
        for phase, parts in phases.items()
    }


class Estimate:
    """Bytes on each rank: of each phase by purpose, and what they follow from."""

    def __init__(self, config: TrainingConfig, facts: Facts):
        self.config, self.facts, self.model = config, facts, facts.model
        self.cpu = facts.device == "cpu"
        self.size = 2 if facts.bf16 else 4  # bytes of a number in the computation
        lora = lora_of(config)
        self.lora, self.frozen_vision = lora is not None, vision_is_frozen(config)
        self.layers = skeleton(
            facts.model,
            lora=lora,
            adapter=config.adapter_name_or_path if lora else None,
            bf16=facts.bf16,
            device=facts.device,
            kernel=facts.kernel,
        )
        counts = self.counts = self.layers.counts
        # numbers: of all, of the reference, of what is trained, in 4 bits, of the head
        self.parameters = counts.whole + counts.adapters
        self.complete = counts.whole - (counts.vision if self.frozen_vision else 0)
        self.trained = counts.adapters or self.complete
        self.trained_vision = 0 if self.frozen_vision or self.lora else counts.vision
        self.packed = counts.decoder_matrices if config.load_in_4bit else 0
        self.head = facts.model.vocab_size * facts.model.hidden_size
        # whether every rank holds the whole model, else how many ranks hold one together
        self.is_whole = facts.world == 1 or self.lora
        self.share = 1 if self.is_whole else config.shard_size or facts.world
        self.light = config.optim in MOMENT_BYTES  # weights are their own masters
        self.prompts = math.ceil(config.prompts_per_step / facts.world)  # of a rank
        self.part = math.ceil(self.prompts / config.num_minibatches)  # of these in an update

    def phases(self) -> dict[str, dict[str, float]]:
        """Bytes of each phase, by purpose."""
        if self.config.eval_only:
            return {"evaluation": self.evaluation()}
        stays = self.stays()
        phases = {
            "rollout": self.rollout(),
            "reference": self.reference(),
            "training": self.training(),
            "optimizer": self.optimizer(),
            "saving": self.saving(),
        }
        if self.config.beta == 0 and self.config.updates_per_step == 1:
            del phases["reference"]
        if not self.cpu:  # a GPU's memory holds no file
            del phases["saving"]
        return {phase: stays | parts for phase, parts in phases.items()}

    # ---- what stays ------------------------------------------------------------------------------

    def stays(self) -> dict[str, float]:
        """What a rank holds throughout."""
        config, features = self.config, 0
        if self.frozen_vision:  # encoded once a step
            images = self.prompts * self.facts.image_tokens
            features = images * self.model.vision.feature_width * self.size
        return {
            **(self.whole_model() if self.is_whole else self.shards()),
            "libraries": LIBRARIES * self.cpu,
            "image features": features,
            "reference": 0 if config.cpu_offload else self.reference_weights,
            "decoding": graph_bytes(config, self.facts, self.prompts, config.num_generations),
        }

    def whole_model(self) -> dict[str, float]:
        """Of a model that each rank holds whole."""
        masters = self.size == 2 and not self.light
        return {
            "weights": self.weights,
            "float32 masters": 4 * self.trained if masters and not self.config.cpu_offload else 0,
            "AdamW moments": self.moments,
        }

    def shards(self) -> dict[str, float]:
        """Of a sharded model, and of the whole copy that a rank samples from."""
        here = 0 if self.config.cpu_offload else 1 / self.share
        frozen = (self.parameters - self.trained) * self.size
        return {
            "masters" if self.light else "float32 masters": (
                self.trained * (self.size if self.light else 4) * here
            ),
            "frozen weights": frozen * here,
            "AdamW moments": self.moments,
            "sampling copy": self.parameters * self.size,
        }

    @property
    def weights(self) -> float:
        return (self.parameters - self.packed) * self.size + self.packed * FOUR_BIT_BYTES

    @property
    def moments(self) -> float:
        """On the device. In 8 bits each row of a matrix is filled up to whole blocks."""
        if self.config.cpu_offload:
            return 0
        padding = self.counts.padding * (self.config.optim == "adamw_8bit")
        return (self.trained + padding) * MOMENT_BYTES.get(self.config.optim, 8) / self.share

    @property
    def reference_weights(self) -> float:
        """With adapters the policy without them is the reference."""
        if self.config.beta == 0 or self.lora:
            return 0
        return self.complete * self.size / self.share

    # ---- rollout and evaluation ------------------------------------------------------------------

    def rollout(self) -> dict[str, float]:
        shape = self.prompts, self.config.num_generations
        return {
            "images, or cache and logits": self.sampling(*shape),
            "unpacked weights": 3 * self.unpacked,
        }

    def evaluation(self) -> dict[str, float]:
        """Of --eval_only: the whole model on each rank, and one batch of prompts."""
        shape = EVAL_BATCH, max(1, self.config.eval_samples_per_prompt)
        return {
            "libraries": LIBRARIES * self.cpu,
            "weights": self.weights,
            "decoding": graph_bytes(self.config, self.facts, *shape),
            "images, or cache and logits": self.sampling(*shape),
        }

    def sampling(self, prompts: int, group: int) -> float:
        return sampling_bytes(self.config, self.facts, self.layers, prompts, group)

    @property
    def unpacked(self) -> int:
        """The largest weight that is held in 4 bits, as it is multiplied by."""
        matrix = self.model.intermediate_size * self.model.hidden_size
        return matrix * self.size * self.config.load_in_4bit

    # ---- passes over packs -----------------------------------------------------------------------

    def reference(self) -> dict[str, float]:
        """Scores all groups of a step, whichever mini-batch they will be in."""
        pack = self.rows_of(self.prompts)
        forward = decoder_forward(self.layers, pack)
        if not self.frozen_vision:
            image = tower_forward(self.layers, self.facts.image_tokens)
            forward = max(forward, len(pack) * image)
        comes = self.is_whole and self.config.cpu_offload  # for its pass alone
        return {
            "gathered layers": self.gathered,
            "its weights": self.reference_weights if comes else 0,
            "activations or logits": max(forward, self.logits(pack)),
            "unpacked weights": self.unpacked,
        }

    def training(self) -> dict[str, float]:
        """Where a training pass holds most."""
        activations, beside = max(self.peaks(), key=sum)
        return {
            "gathered layers": self.gathered,
            "activations": activations,
            "head or gradients": beside,
            "unpacked weights": self.unpacked,
        }

    def peaks(self) -> list[tuple[float, float]]:
        """(activations, bytes beside them) at each moment that may be a training pass's peak.

        In the first pack of an update only the gradients count that its backward pass has made.
        """
        recompute = self.config.gradient_checkpointing
        decoder = decoder_holds(self.layers, self.pack, recompute)
        tower = TowerHolds(0, 0, 0)
        if not self.frozen_vision:
            tower = tower_holds(self.layers, self.facts.image_tokens, recompute)
        images, head = len(self.pack), 0 if self.lora else self.head
        in_tower, kept = images * tower.kept, decoder.kept + images * tower.kept
        earlier = self.gradients if self.is_split else 0
        head_gradient = head * (self.size if self.light or not self.is_whole else 4)
        of_head = earlier or head_gradient * (self.gradients > 0)
        of_decoder = earlier or self.gradients * (1 - self.trained_vision / self.trained)
        logits = self.logits(self.pack)
        layer_leaves, root_leaves = (self.leaving * n for n in self.gathered_at_once)
        return [
            # the head's gradient in float32 and, in bf16, a product to be added; then handed on
            (kept, earlier + logits + self.losses + head * (4 if self.size == 4 else 6)),
            (kept, of_head + head * 4),
            # backward through the last decoder layer, the one before it and the first; embedding
            (kept + decoder.last_layer, of_head + layer_leaves),
            (kept - decoder.last_kept + decoder.layer, of_head + layer_leaves),
            (in_tower + decoder.first_layer, of_decoder + layer_leaves),
            (in_tower, of_decoder + head * self.size),
            # the vision tower's last and first block; then all gradients are there
            (in_tower + images * tower.block, of_decoder + layer_leaves),
            (images * tower.first_block, self.gradients + layer_leaves),
            (0, self.gradients + root_leaves),
        ]

    @cached_property
    def pack(self) -> Rows:
        """The rows of the largest pack that is trained on."""
        return self.rows_of(self.part)

    def rows_of(self, prompts: int) -> Rows:
        """The largest pack's rows of so many groups: whole ones, and what is left as a part of
        one."""
        prompt, longest = self.facts.longest_prompt, self.config.max_completion_length
        group = (prompt, *[longest] * self.config.num_generations)
        most = max(self.config.tokens_per_pack, prompt + longest)  # no completion is cut
        tokens = min(most, prompts * sum(group))
        whole, rest = divmod(tokens, sum(group))
        rows = (group,) * whole
        if rest > prompt:
            completions, cut = divmod(rest - prompt, longest)
            rows += ((prompt, *[longest] * completions, *[cut] * (cut > 0)),)
        elif rest:
            rows += ((rest,),)
        return rows

    @property
    def is_split(self) -> bool:
        """Whether an update takes more than one pack."""
        group = self.config.num_generations * self.config.max_completion_length
        return sum(map(sum, self.pack)) < self.part * (self.facts.longest_prompt + group)

    def chunk(self, pack: Rows) -> int:
        """Tokens of a pack whose logits exist at once."""
        return min(chunk_tokens(self.model.vocab_size, self.facts.device), read_of(pack))

    def logits(self, pack: Rows) -> int:
        """In float32, on a CPU beside a copy in bf16; on a GPU twice in bf16."""
        return self.chunk(pack) * self.model.vocab_size * (6 if self.size == 2 and self.cpu else 4)

    @property
    def losses(self) -> int:
        """What a loss needs beside the logits: one of whole completions the slopes of all tokens of
        a pack; a gradient of the entropy a buffer of a chunk (in bf16 on a GPU also the logits in
        float32), or with both the gradients too."""
        more = 4 if self.config.entropy_coef else 0
        buffers = more if self.size == 4 or self.cpu else 2 * more
        held = self.chunk(self.pack) * self.model.vocab_size * buffers
        if self.config.importance_sampling_level != "token":
            held += read_of(self.pack) * self.model.hidden_size * (4 + more)
        return held

    @property
    def gradients(self) -> float:
        """On the device; with --cpu_offload in the CPU's memory, unless weights are their own
        masters and whole."""
        if self.config.cpu_offload and not self.lora and not (self.is_whole and self.light):
            return 0
        return self.trained * (self.size if self.light else 4) / self.share

    @property
    def gathered(self) -> int:
        """Of a sharded model's weights, during a pass: the root and two layers, or all."""
        if self.is_whole:
            return 0
        layer, root = self.gathered_at_once
        numbers = root + 2 * layer if self.config.reshard_after_forward else self.parameters
        return numbers * self.size

    @property
    def gathered_at_once(self) -> tuple[int, int]:
        """Numbers of the largest layer or block, and of all that is in none (the root)."""
        return self.counts.largest_layer, self.parameters - self.counts.in_layers

    @property
    def leaving(self) -> int:
        """Bytes of a gradient on its way to other ranks: as backward made it, and in float32."""
        return 0 if self.is_whole else self.size + 4

    # ---- optimizer and files ---------------------------------------------------------------------

    def optimizer(self) -> dict[str, float]:
        # what one kernel does without; but whether that works is known on the device only
        rows = 36 * min(NUMBERS, self.head / self.share)  # that a light optimizer works on at once
        return {"gradients": self.gradients, "rows": rows if self.light else 0}

    def saving(self) -> dict[str, float]:
        """The largest file of moments or of final/, which is held twice; merged adapters."""
        moments = self.trained * MOMENT_BYTES.get(self.config.optim, 8)
        written = max(moments if self.config.save_steps else 0, self.parameters * self.size)
        file = min(max(MAX_FILE_BYTES, self.head * 4), written)
        merged = max(self.counts.adapted, self.packed) * self.size
        return {"merged weights": merged / self.share, "file on its way": 2 * file / self.share}


def read_of(pack: Rows) -> int:
    """Tokens of a pack whose log-probs are wanted: those of its completions."""
    return sum(sum(completions) for _, *completions in pack)
