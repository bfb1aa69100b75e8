"""Ranks, sharding by FSDP2, and the optimizer step.

Prompts are dealt to ranks; gradients are summed over them, never averaged: token weights already
count the whole step. One rank holds a plain model. Several share one: `place` shards parameters,
gradients and moments, and `gather_weights` fills a whole copy for sampling once per step, so that
ranks may decode for as long as they like. All ranks make the same collective calls because each
scores the same number of packs (`Ranks.most`, grpo/rollout.py's `filler`) and every pass runs every
layer (models/qwen_vl.py's `always_encodes`).
"""

import datetime
import math
import os
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from models.load import load_slices, weight_files
from models.qwen_vl import QwenVL

SCHEDULES = ("linear", "cosine", "constant")
GRACE = 3.0  # seconds in which ranks that saw a collective fail say that they are there


@dataclass
class Ranks:
    """This process's place among `world` processes, and its device.

    timeout: seconds that a collective waits. doing: the phase at hand, for messages; other ranks
    can read it in `store`.
    """

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None
    timeout: float = 1800.0
    doing: str = field(default="the start", init=False)

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

    def most(self, count):
        """The largest `count` of any rank."""
        return max(self.gather([count]))

    def any(self, flag: bool) -> bool:
        return self.sum({"flag": float(flag)})["flag"] > 0

    def first(self, problem: str | None) -> str | None:
        """The lowest rank's `problem` that is not None, on every rank."""
        return next((text for text in self.gather([problem]) if text is not None), None)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def done(self, what: str, result: str = "") -> None:
        """Lets the others go on who `wait_for` it, and tells them the result."""
        if self.store is not None:
            self.store.set(f"done/{self.rank}/{what}", result)

    def wait_for(self, what: str, rank: int = 0) -> str:
        """Waits until that rank is done, however long; returns its result. Leaves where that rank
        has left, which has said why."""
        while not self.store.check([f"done/{rank}/{what}"]):
            if self.store.check([f"left/{rank}"]):
                sys.exit(2)
            time.sleep(0.1)
        return self.store.get(f"done/{rank}/{what}").decode()

    def wait_for_all(self, what: str) -> None:
        for rank in range(self.world if self.world > 1 else 0):
            self.wait_for(what, rank)

    def enter(self, phase: str) -> None:
        """Says which phase begins, here and to the others."""
        self.doing = phase
        if self.store is not None:
            self.store.set(f"phase/{self.rank}", phase)

    @staticmethod
    def collective_failed(error: Exception) -> bool:
        """Whether it came out of a call that all ranks must make."""
        words = ("gloo", "NCCL", "Connection closed by peer", "ProcessGroup")
        return isinstance(error, dist.DistError) or any(word in str(error) for word in words)

    def who_is_missing(self) -> str:
        """After a collective failed: the ranks that do not say within a few seconds that they saw
        it fail, and what each was doing last."""
        self.leave("saw the failure")
        time.sleep(GRACE)
        missing = []
        for rank in range(self.world):
            if not self.store.check([f"left/{rank}"]):
                told = self.store.check([f"phase/{rank}"])
                last = self.store.get(f"phase/{rank}").decode() if told else "the start"
                missing.append(f"rank {rank} is dead or stuck in {last}")
            elif (why := self.store.get(f"left/{rank}").decode()) != "saw the failure":
                missing.append(f"rank {rank} left: {why}")
        return "; ".join(missing) or "all ranks are there: the connection between them failed"

    def leave(self, why: str) -> None:
        """Says why this rank will make no further collective call."""
        if self.store is not None and not self.store.check([f"left/{self.rank}"]):
            self.store.set(f"left/{self.rank}", why)

    def said_by_main(self, why: str) -> bool:
        """Whether the main rank left for the same reason, and has said so."""
        until = time.monotonic() + GRACE
        while not self.is_main and time.monotonic() < until:
            if self.store.check(["left/0"]):
                return self.store.get("left/0").decode() == why
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


joined: Ranks | None = None  # where `start` joined others: for the message of a run that breaks
starts = 0


def start(timeout: float = 1800.0) -> Ranks:
    """Joins the process group that torchrun describes; without torchrun, or with one process, none.

    timeout: seconds after which a collective that some rank does not join fails. One GPU per
    process where CUDA is present, else the CPU with gloo. Raises ValueError where there are more
    processes than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, store = torch.device("cpu"), None
    if torch.cuda.is_available():
        local, present = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= present:
            raise ValueError(f"--nproc_per_node asks for more processes than the {present} GPU(s)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        # both backends: what is offloaded to the CPU is reduced there
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        # a restarted job must not read what the last attempt said
        global joined, starts
        starts += 1
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{starts}"
        groups = dist.PrefixStore(f"groups/{attempt}", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=limit)
        store = dist.PrefixStore(f"ranks/{attempt}", store)
    ranks = Ranks(rank, world, device, store, timeout)
    if world > 1:
        joined = ranks
    return ranks


# ---- sharding -----------------------------------------------------------------------------------


def check_sharding(
    ranks: Ranks, shard_size: int | None, reshard_after_forward: bool, cpu_offload: bool
) -> None:
    """Raises ValueError where a flag of sharding cannot be meant for these ranks."""
    given = {
        "--shard_size": shard_size is not None,
        "--reshard_after_forward false": not reshard_after_forward,
        "--cpu_offload": cpu_offload,
    }
    for name, is_given in given.items():
        if is_given and ranks.world == 1:
            raise ValueError(f"{name} is about sharding, and one rank does not shard")
    if cpu_offload and ranks.device.type == "cpu":
        raise ValueError("--cpu_offload: the device is the CPU already")
    if shard_size and ranks.world % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {ranks.world} ranks")


def make_mesh(ranks: Ranks, shard_size: int | None) -> DeviceMesh | None:
    """The ranks that a model is spread over: all, or sets of `shard_size` that hold copies of each
    other (HSDP), "replicate" by "shard". None for one rank."""
    if ranks.world == 1:
        return None
    if shard_size in (None, ranks.world):
        return init_device_mesh(ranks.device.type, (ranks.world,))
    grid = torch.arange(ranks.world).view(-1, shard_size)

    def group_of(sets: list[list[int]]) -> dist.ProcessGroup:  # every rank makes them all
        limit = datetime.timedelta(seconds=ranks.timeout)  # a mesh's own would wait 30 minutes
        groups = [dist.new_group(members, timeout=limit) for members in sets]
        return next(g for g, members in zip(groups, sets, strict=True) if ranks.rank in members)

    groups = [group_of(grid.T.tolist()), group_of(grid.tolist())]
    names = ("replicate", "shard")
    return DeviceMesh.from_group(groups, ranks.device.type, grid, mesh_dim_names=names)


def place(
    model: QwenVL,
    ranks: Ranks,
    dtype: torch.dtype,
    mesh: DeviceMesh | None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> QwenVL:
    """A model on the meta device (models/load.py's `empty_model`) -> one with memory, unfilled.

    On one rank the plain model in `dtype`. On several, FSDP2 over `mesh`: decoder layers, vision
    blocks and the rest are groups of their own, gathered when they compute. A model with trainable
    parameters keeps them in float32, computes in `dtype` and sums gradients over ranks in float32.

    reshard_after_forward false keeps layers whole from forward to backward. cpu_offload keeps
    shards, gradients and moments in the CPU's memory.
    """
    if mesh is None:
        return model.to(dtype).to_empty(device=ranks.device)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    model = model.to(torch.float32 if trained else dtype)
    options = {
        "mesh": mesh,
        # inputs stay as they are: the vision tower's rotation is float32
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    blocks = [] if model.visual is None else list(model.visual.blocks)
    for layer in [*blocks, *model.model.layers]:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # the head works after the forward
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")
    # a frozen tower's features come with the prompts
    model.always_encodes = model.visual is not None and (
        not trained or any(p.requires_grad for p in model.visual.parameters())
    )
    model.compute_device = ranks.device
    return model.to_empty(device="cpu" if cpu_offload else ranks.device)


def release(model: QwenVL | None) -> None:
    """Frees what a pass without gradient left gathered: embedding, head, final norm, and all layers
    that are not resharded after the forward pass."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(policy: QwenVL, empty: QwenVL, ranks: Ranks, dtype: torch.dtype) -> QwenVL:
    """The model to sample from: on one rank the policy itself, else `empty` (on the meta device)
    with memory on this rank, for `gather_weights` to fill."""
    if ranks.world == 1:
        return policy
    return empty.requires_grad_(False).to(dtype).to_empty(device=ranks.device)


@torch.no_grad()
def gather_weights(policy: QwenVL, whole: QwenVL) -> None:
    """Copies a sharded policy's weights into `whole`, one at a time; nothing for the same model."""
    if whole is policy:
        return
    for name, parameter in policy.named_parameters():
        target = whole.get_parameter(name)
        target.copy_(parameter.detach().to(target.device, target.dtype).full_tensor())


def shard(tensor: Tensor) -> tuple[Tensor, int, int]:
    """(local part, first row, rows of the whole) of a tensor that is sharded by rows, or whole."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, tensor.shape[0] if tensor.ndim else 1
    mesh, dim = tensor.device_mesh, tensor.device_mesh.ndim - 1
    local, rows = tensor.to_local(), tensor.shape[0]
    # as torch.chunk cuts: all parts of the same size but the last ones
    first = min(mesh.get_local_rank(dim) * math.ceil(rows / mesh.size(dim)), rows)
    return local, first, rows


def fill(tensors: dict[str, Tensor], files: list) -> list[str]:
    """Fills tensors, sharded or not, from safetensors files; reads this rank's rows alone.

    Returns the names that no file has.
    """
    parts = {name: shard(tensor.detach())[:2] for name, tensor in tensors.items()}
    wanted = {name: (first, len(local)) for name, (local, first) in parts.items()}
    for name, rows in load_slices(files, wanted):
        parts.pop(name)[0].copy_(rows)
    return list(parts)


def load_weights(model: QwenVL, folder) -> None:
    """Streams a checkpoint's weights into a model that `place` made.

    Names, shapes and dtypes were compared by `empty_model`.
    """
    with torch.no_grad():
        missing = fill(dict(model.named_parameters()), weight_files(folder))
    assert not missing, missing


def checksum(model: QwenVL, ranks: Ranks) -> str:
    """A sum over the bits of all weights, the same for any number of ranks; any single weight that
    changes changes it."""
    total = 0
    for parameter in model.parameters():
        local = shard(parameter.detach())[0]
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if mesh is None or mesh.ndim == 1 or mesh.get_local_rank(0) == 0:
            bits = local.contiguous().view(torch.int16 if local.itemsize == 2 else torch.int32)
            total += int(bits.sum(dtype=torch.int64))
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        total = sum(ranks.gather([total]))
    return f"{str(model.dtype).removeprefix('torch.')}:{total % 2**64:016x}"


# ---- the optimizer ------------------------------------------------------------------------------


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) on float32 master weights.

    A float32 model's parameters are their own masters. For a bf16 model, float32 masters and
    float32 gradient sums are kept beside it: each backward pass adds its bf16 gradient to them, and
    each step rounds the masters back into the model. A sharded model's parameters are float32 and
    FSDP2 has summed their gradients over ranks. Matrices decay, biases and norms do not.
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
        self.updates = 0

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

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each trainable parameter, float32; zeros where no pass gave one."""
        for master in self.masters.values():
            if master.grad is None:  # e.g. the vision tower where no prompt had an image
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items()}

    def discard(self) -> None:
        """Drops the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clips the gradients' global norm and updates; returns the norm before.

        max_grad_norm 0 does not clip. Where the norm is not finite nothing is updated, and the
        gradients are dropped. Every rank sees the same norm.
        """
        norm = torch.nn.utils.get_total_norm(self.gradients().values())
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(value):
            self.discard()
            return value
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_grad_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.updates += 1
        self.discard()
        self._write_back()
        return value

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments by name, zeros before the first update; sharded as the masters are."""
        found = {}
        for name, master in self.masters.items():
            state = self.adamw.state[master]
            if not state:
                state["step"] = torch.tensor(0.0, device=master.device)
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)
            found |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        return found

    @torch.no_grad()
    def resume(self, updates: int, weights: list, moments: list) -> list[str]:
        """Takes up what a checkpoint's files hold; returns the names that they lack.

        updates: how many were made. weights, moments: safetensors files.
        """
        missing = fill(self.masters, weights) + fill(self.moments(), moments)
        for state in self.adamw.state.values():
            state["step"].fill_(updates)
        self.updates = updates
        self._write_back()
        return missing


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
