"""Low-rank adapters (LoRA, Hu et al. 2021): a linear layer's W stays as it is, and B A is trained.

    y = W x + b + scale B A x          (Hu et al. 2021, section 4.1, eq. 3)

With its adapters switched off a model is its base, bit for bit: that is the reference of the KL
term, so no second model is loaded. Files are peft's. There is no dropout: sampling and training
must compute the same policy.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import files
from data.errors import UserError, shown
from models.folder import refuse_not_finite
from models.four_bit import FourBitLinear
from models.fused import pays
from models.names import module_name, parameter_name

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoRA:
    """Which linear layers have adapters, and of what size.

    targets: a name such as q_proj means that layer of every decoder layer, visual.qkv that of every
    vision block; a complete name means one layer. Without targets, the decoder's layers say it
    (`DecoderLayer.adapted`). base: the model that they belong to.
    """

    r: int
    alpha: float
    targets: tuple[str, ...] = ()
    use_rslora: bool = False
    base: str | None = None

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, theorem 3.2)."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def in_tower(self) -> bool:
        return any(target.startswith("visual.") for target in self.targets)

    def layers(self, model: nn.Module) -> list[str]:
        """Names of the layers that get an adapter. Raises UserError for a target without one."""
        modules = model.named_modules()  # the head works on chunks, outside of forward
        linear = [n for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"]
        if not self.targets:
            layers = enumerate(model.model.layers)
            default = {f"model.layers.{i}.{name}" for i, layer in layers for name in layer.adapted}
            return [name for name in linear if name in default]
        chosen = set()
        for target in self.targets:
            start = "visual.blocks." if target.startswith("visual.") else "model.layers."
            end = "." + target.removeprefix("visual.")
            found = {n for n in linear if n == target or (n.startswith(start) and n.endswith(end))}
            if not found:
                decoder = sorted(
                    {n.split(".")[-1] for n in linear if n.startswith("model.layers.")}
                )
                tower = sorted({n.split(".")[-1] for n in linear if n.startswith("visual.blocks.")})
                raise UserError(
                    f"no linear layer {target} for an adapter. There are "
                    f"{', '.join(decoder)} in the decoder and "
                    f"{', '.join(f'visual.{name}' for name in tower)} in the vision tower"
                )
            chosen |= found
        return [name for name in linear if name in chosen]


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, (..., in) -> (..., out); lora_A (r, in), lora_B (out, r)."""

    def __init__(self, base: nn.Linear, lora: LoRA, like: Tensor):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        like = {"dtype": like.dtype, "device": like.device}
        self.lora_A = nn.Parameter(torch.empty(lora.r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, lora.r, **like))
        self.scale, self.adapted = lora.scale, True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.adapted:
            return out
        # in place: neither product is kept for the backward pass
        if pays(out) and out.dim() == 2:  # nor written: cuBLAS adds as it multiplies
            return out.addmm_(F.linear(x, self.lora_A), self.lora_B.T, alpha=self.scale)
        return out.add_(F.linear(F.linear(x, self.lora_A), self.lora_B).mul_(self.scale))

    def merged(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """W + scale B A in float32, (out, in), of this W and these adapters (their float32
        masters)."""
        return weight.float() + self.scale * (lora_B.float() @ lora_A.float())


class LoRAFourBitLinear(LoRALinear, FourBitLinear):
    """The same over a weight in 4 bits."""


def add_adapters(model: nn.Module, lora: LoRA) -> None:
    """Gives the model's layers their adapters, uninitialized, and freezes all else.

    Raises UserError as `LoRA.layers`.
    """
    for name in lora.layers(model):
        parent, _, last = name.rpartition(".")
        base = model.get_submodule(name)
        kind = LoRAFourBitLinear if isinstance(base, FourBitLinear) else LoRALinear
        setattr(model.get_submodule(parent), last, kind(base, lora, like=model.model.norm.weight))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters, and they are on."""
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    return model.lora is not None and next(layers).adapted


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base. Nothing changes for a model without adapters."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapted = True


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What an adapter begins with, float32 on the CPU: B is 0, so that the policy is the base; A is
    uniform in +-1 / sqrt(in), as in peft. A follows from the seed and the name alone."""
    if name.endswith(".lora_B"):
        return torch.zeros(shape)
    numbers = int.from_bytes(name.encode(), "big") % (2**61 - 1)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + numbers) % 2**63)
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


# ---- peft's files --------------------------------------------------------------------------------


def adapter_name(name: str) -> str:
    """A parameter's name here -> in adapter_model.safetensors."""
    return f"base_model.model.{module_name(name)}.weight"


def settings(lora: LoRA, model: nn.Module) -> dict:
    """adapter_config.json: every layer by its complete name in transformers' model."""
    names = [n for n, module in model.named_modules() if isinstance(module, LoRALinear)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": lora.base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": [module_name(name) for name in names],
    }


def read_adapter(folder: Path) -> LoRA:
    """What an adapter folder of peft, or of a run here, holds; its layers by complete name.

    Raises UserError if the folder has no readable adapter, or one of a kind that is not done here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        raw = files.read_json(folder / SETTINGS)
        with safe_open(files.regular(folder / WEIGHTS), framework="pt") as file:
            names = [parameter_name(key) for key in file.keys()]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: no readable {SETTINGS} and {WEIGHTS}: {error}{_meant(folder)}"
        ) from error
    refuse_other_kinds(raw, folder)
    if other := [name for name in names if not is_adapter(name)]:
        raise UserError(f"{folder / WEIGHTS}: {other[0]} is no LoRA weight of a linear layer")
    layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
    base = raw.get("base_model_name_or_path")
    return LoRA(raw["r"], raw["lora_alpha"], layers, bool(raw.get("use_rslora")), base)


def _meant(folder: Path) -> str:
    """The newest adapter in a folder below, as a trainer's output folder has them."""
    below = [path.parent for path in folder.glob(f"*/{SETTINGS}")]
    newest = max(below, key=lambda path: (path.name == "final", path.stat().st_mtime), default=None)
    return f"; there is an adapter in {newest}" if newest else ""


# What peft's adapters may have besides; anything else would change what they compute.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
PLAIN |= dict.fromkeys(
    (
        *("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern"),
        *("alpha_pattern", "layer_replication", "target_parameters", "alora_invocation_tokens"),
        "trainable_token_indices",
    ),
    (None, False, [], {}),
)


def refuse_other_kinds(raw, folder: Path) -> None:
    """Raises UserError if this adapter_config.json is of another kind than plain LoRA."""
    where = folder / SETTINGS
    if not isinstance(raw, dict):
        raise UserError(f"{where}: holds no JSON object")
    for key, allowed in PLAIN.items():
        if raw.get(key) not in allowed:
            raise UserError(f"{where}: {key} = {shown(raw.get(key))} is not supported")
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        value = raw.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{where}: {key} is {shown(value)}, not a positive number")


def check_fit(folder: Path, model: nn.Module) -> None:
    """Raises UserError if the adapter's weights have not the shapes that this model's have, or are
    not finite."""
    from safetensors import safe_open

    missing = {n: tuple(p.shape) for n, p in model.named_parameters() if is_adapter(n)}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, found = parameter_name(key), tuple(file.get_slice(key).get_shape())
            if (wanted := missing.pop(name, None)) != found:
                raise UserError(
                    f"{folder}: {name} has shape {found}, this model needs {wanted}: is it "
                    f"another model's adapter?"
                )
            refuse_not_finite(name, file.get_tensor(key), folder)
    if missing:
        raise UserError(f"{folder}: {next(iter(missing))} is missing, and {len(missing) - 1} more")
