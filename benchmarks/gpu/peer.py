"""TRL's GRPOTrainer on the device, on the same weights, images and flags as ours."""

import importlib.util
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.gpu.card import device
from benchmarks.gpu.shapes import WORK, draw_weights, image_side, make_model
from benchmarks.material import make_images
from demo.published import save_model
from models.decoding.storage import allocate
from models.families import read_config
from models.lora import LoRA
from models.names import module_name
from models.qwen_vl import QwenVL

TOGETHER = 16  # completions of a pass of the peer's
STEPS = 3  # of a process, ours as the peer's; its first is not counted


def weights(settings: dict, report) -> None:
    """Writes a checkpoint with numbers to the folder, and images beside it."""
    folder, work = Path(settings["folder"]), WORK[settings["shapes"]]
    folder.mkdir(parents=True, exist_ok=True)
    config = make_model(folder, settings["model"], settings["shapes"])
    with torch.device("meta"):
        model = QwenVL(config)
    model = allocate(model, torch.bfloat16, device())
    draw_weights(model)
    (folder / "model.safetensors").unlink()
    save_model(model, folder, torch.bfloat16)
    make_images(folder / "images", STEPS * work.prompts, image_side(config, work))
    report("weights", str(folder))


def trl(settings: dict, report) -> None:
    """Steps of the peer, all but the first: `seconds` of each, and the device's peak in GB.

    settings: vllm, whether vLLM samples. Passes of TOGETHER completions, gradients summed over
    them; gradient checkpointing, bfloat16, adapters on the same layers.
    """
    needed = ("trl", "peft", "datasets", *(["vllm"] if settings["vllm"] else []))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        report("skipped", f"{', '.join(missing)} not installed")
        return
    step.stand_in_for_torchvision()
    folder, work = Path(settings["folder"]), WORK[settings["shapes"]]
    with torch.device("meta"):
        layers = [module_name(name) for name in LoRA(16, 32.0).layers(QwenVL(read_config(folder)))]
    completions = work.prompts * work.group
    together = min(TOGETHER, completions)
    options = {"use_cpu": device().type == "cpu", "per_device_train_batch_size": together}
    options |= {"gradient_accumulation_steps": completions // together}
    if settings["vllm"]:
        options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    found = step.peer({
        "folder": settings["folder"], "checkpoint": str(folder), "images": str(folder / "images"),
        "prompts": work.prompts, "group": work.group, "completion": work.completion,
        "steps": STEPS - 1, "checkpointing": True, "bf16": True, "lora": layers,
        "options": options,
    })  # fmt: skip
    report("seconds", found["seconds"][1:])
    report("phases", {name: spent[1:] for name, spent in found["phases"].items()})
    if device().type == "cuda":
        report("gb", torch.cuda.max_memory_allocated() / 1e9)
