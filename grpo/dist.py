"""Ranks, and the optimizer step over them.

Every rank holds the whole model; prompts are dealt to ranks, gradients are summed, never averaged:
token weights already count the whole step. A rank without prompts takes part with zeros. Weights
are not sharded here.
"""

import datetime
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, items: list) -> list:
        """This rank's share of `items`, dealt one by one."""
        return items[self.rank :: self.world]

    def gather(self, items: list) -> list:
        """The whole list on every rank, from shares as `mine` deals them."""
        if self.world == 1:
            return items
        shares = [None] * self.world
        dist.all_gather_object(shares, items)
        whole = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            whole[rank :: self.world] = share
        return whole

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over ranks (float64); every rank must name the same values."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        return self.sum({"flag": float(flag)})["flag"] > 0

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def start() -> Ranks:
    """Joins the process group that torchrun describes; without torchrun, or with one process, none.

    One GPU per process where CUDA is present, else the CPU with gloo. Raises ValueError where there
    are more processes than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, present = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= present:
            raise ValueError(f"--nproc_per_node asks for more processes than the {present} GPU(s)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return Ranks(rank, world, device)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) on float32 master weights.

    A float32 model's parameters are their own masters. For a bf16 model, float32 masters and
    float32 gradient sums are kept beside it: each backward pass adds its bf16 gradient to them, and
    each step rounds the masters back into the model. Matrices decay, biases and norms do not.
    """

    def __init__(self, model: nn.Module, weight_decay: float):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("no parameter is trainable")
        self.parameters = parameters
        self.masters = {n: self._master(p) for n, p in parameters.items()}
        masters = self.masters.values()
        self.adamw = torch.optim.AdamW(
            [
                {"params": [m for m in masters if m.ndim > 1], "weight_decay": weight_decay},
                {"params": [m for m in masters if m.ndim <= 1], "weight_decay": 0.0},
            ],
            fused=True,
        )

    @staticmethod
    def _master(parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master = parameter.detach().float()

        def add_gradient(parameter: nn.Parameter) -> None:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add_gradient)
        return master

    def step(self, ranks: Ranks, learning_rate: float, max_grad_norm: float) -> float:
        """Sums gradients over ranks, clips their global norm, updates; returns the norm before.

        max_grad_norm 0 does not clip. Raises FloatingPointError where the norm is not finite; the
        weights are then as they were.
        """
        for master in self.masters.values():
            if master.grad is None:  # e.g. the vision tower where no prompt had an image
                master.grad = torch.zeros_like(master)
            if ranks.world > 1:
                dist.all_reduce(master.grad)
        gradients = [master.grad for master in self.masters.values()]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)} and the update was not made; start again or "
                f"from the last checkpoint's weights, with a lower --learning_rate"
            )
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_grad_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """The moments under names, for safetensors; empty before the first step."""
        moments = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                moments[f"{key}.{name}"] = value
        return moments

    def load(self, masters: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Takes up weights and moments as `state` and `masters` gave them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(masters[name])
                self.parameters[name].copy_(master)
        for name, master in self.masters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := moments.get(f"{key}.{name}")) is not None:
                    self.adamw.state[master][key] = value.to(master.device)


def learning_rate(step: int, max_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of update `step` (0-based) of `max_steps`, as transformers' schedules of that name.

    warmup: share of max_steps (rounded up) over which the rate rises linearly from 0. Raises
    ValueError for an unknown name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type {schedule!r} is none of {', '.join(SCHEDULES)}")
    rising = math.ceil(warmup * max_steps)
    if step < rising:
        return peak * step / rising
    done = (step - rising) / max(1, max_steps - rising)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
