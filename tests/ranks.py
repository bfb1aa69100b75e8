"""What tests/test_ranks.py has several ranks do.

A launch costs seconds, so one pair of ranks does many things in turn: `in_turn` takes a list of
[function, arguments], each of which joins a new process group. `python -m tests.ranks FILE`, for
torchrun, reads it from a JSON file.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import grpo.engine.ranks
import grpo.run.run
import grpo.run.same
import models.load
import train_cls
from data.errors import RewardFault, UserError
from grpo.engine.optimizer import Optimizer
from grpo.engine.ranks import Ranks, start
from grpo.engine.shard import (
    checksum,
    full_copy,
    gather_weights,
    load_weights,
    make_mesh,
    materialize,
)
from grpo.logps import pack_chunks
from grpo.pack import filler, make_packs
from grpo.rollout import Group
from grpo.run.checkpoint import save_final
from models.load import empty_model
from tests.replay import record  # noqa: F401  called by name
from tests.tiny import tiny_prompt

WRITE_REPORT = grpo.run.run.write_report


def train(*argv: str) -> None:
    resumed = "--resume_from_checkpoint" in argv  # it alone writes its report, as each takes 2 s
    grpo.run.run.write_report = WRITE_REPORT if resumed else lambda folder: ""
    assert train_cls.main(list(argv)) == 0


def gradient(folder: str, shard_size: int) -> None:
    """Sums of gradients over ranks: rank 0 has two packs with images, rank 1 one without, and the
    rest nothing at all; written by the main rank, and saved by all."""
    ranks = start(60)
    mesh = make_mesh(ranks, shard_size)
    for group in mesh.get_all_groups():
        assert group._get_backend(ranks.device).options._timeout.total_seconds() == 60
    model = materialize(empty_model(Path(folder)), ranks, torch.float32, mesh)
    model.shared_by_ranks(
        torch.device("meta"), True
    )  # as with --cpu_offload: not where weights are
    assert model.bounds([(1,)]).device.type == "meta"
    model.shared_by_ranks(ranks.device, True)
    load_weights(model, Path(folder))
    full = full_copy(empty_model(Path(folder)), ranks, torch.float32)
    gather_weights(model, full)
    packs = uneven_packs(model.config)[ranks.rank] if ranks.rank < 2 else []
    packs += [filler()] * (int(ranks.max(len(packs))) - len(packs))
    score(model, packs)
    optimizer = Optimizer(model, 0.0)
    gathered = {n: g.full_tensor() for n, g in optimizer.gradients().items()}
    norm = optimizer.step(1e-2, 0.1)
    sums = checksum(model, ranks)
    after = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
    limit, models.load.MAX_FILE_BYTES = models.load.MAX_FILE_BYTES, 20_000  # several files
    save_final(Path(folder), Path(folder), model, optimizer, ranks, torch.float32)
    models.load.MAX_FILE_BYTES = limit
    if ranks.is_main:
        found = {"gradients": gathered, "norm": norm, "checksum": sums, "after": after}
        torch.save(found | {"full": full.state_dict()}, Path(folder) / "found.pt")
    ranks.wait()
    ranks.stop()


def in_bf16(folder: str) -> None:
    """As `gradient`, computing in bfloat16; and what linear attention sees of its weights."""
    ranks = start(60)
    model = empty_model(Path(folder))
    model = materialize(model, ranks, torch.bfloat16, make_mesh(ranks, 2))
    load_weights(model, Path(folder))
    seen = {}

    def look(mixer, _) -> None:
        (prefix,) = (name for name, module in model.named_modules() if module is mixer)
        for name, parameter in mixer.named_parameters(prefix):
            seen[name] = parameter.detach().clone()

    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        if kind == "linear_attention":
            layer.mixer.register_forward_pre_hook(look)
    packs = uneven_packs(model.config)[ranks.rank]
    score(model, packs + [filler()] * (int(ranks.max(len(packs))) - len(packs)))
    gradients = Optimizer(model, 0.0).gradients()
    gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    if ranks.is_main:
        torch.save({"seen": seen, "gradients": gradients}, Path(folder) / "found.pt")
    ranks.wait()
    ranks.stop()


def uneven_packs(config) -> list[list]:
    shapes = ([(4, 6)], [(2, 2), (4, 4)]), ([],)
    packs = []
    for rank, prompts in enumerate(shapes):
        groups = [
            Group(tiny_prompt(config, grids, seed=rank + i), [[5, 6, 7], [8] * (i + 1)])
            for i, grids in enumerate(prompts)
        ]
        packs.append(make_packs(groups, 40))
    return packs


def score(model, packs) -> None:
    for level in ("token", "sequence"):
        for pack in packs:
            for tokens in pack_chunks(model, pack, 1.0, level):
                weights = torch.arange(1.0, 100.0)[tokens.start :][: len(tokens.logps)]
                ((tokens.logps - 0.5 * tokens.entropy) * weights).sum().backward()


def agree(folder: str) -> None:
    """A fault on rank 1 alone is raised on both, and they go on together after it."""
    ranks = start(60)
    said = []
    for kind in (RewardFault, UserError):
        try:
            with ranks.agree():
                if ranks.rank == 1:
                    raise kind("a fault of rank 1")
        except kind as error:
            said.append(f"{type(error).__name__}: {error}")
    with ranks.agree():
        pass
    gathered = ranks.gather([said])
    if ranks.is_main:
        Path(folder, "agree.json").write_text(json.dumps(gathered))
    ranks.wait()
    ranks.stop()


def refused(name: str, folder: str, argv_of_ranks: list[list[str]]) -> None:
    """A run whose ranks have flags of their own; what each says is in <name>.<rank>.txt."""
    grpo.run.same.PATIENCE = 0.2
    rank = int(os.environ["RANK"])
    try:
        said = f"code {train_cls.main(argv_of_ranks[rank])}"
    except UserError as error:
        said = str(error)
        dist.barrier()
        dist.destroy_process_group()
    Path(folder, f"{name}.{rank}.txt").write_text(said)


def rough(folder: str) -> None:
    """A run in which rank 1 would name the run folder otherwise, checks its rows for longer than
    collectives wait, and alone has a loss that is not a number (step 2) and an infinite gradient
    (step 3), and is told to end (step 4)."""
    os.chdir(folder)
    clock, true_loss = time.strftime, train_cls.policy_loss
    enter, check_rows = Ranks.enter, train_cls.check_rows
    slow = []

    def slowly(rows, *arguments):
        ranks = here["ranks"]
        if not slow and ranks.rank == 1:  # longer than --timeout, but it works
            slow.append(time.monotonic() + 1.4 * ranks.timeout)
            while time.monotonic() < slow[0]:
                time.sleep(0.01)
                sum(range(20_000))
        return check_rows(rows, *arguments)

    def broken(*arguments):
        loss, stats = true_loss(*arguments)
        if here["phase"] == "training of step 2 on rank 1":
            loss = loss * float("nan")
        if here["phase"] == "training of step 3 on rank 1":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, stats

    def watched(self, name: str) -> None:
        enter(self, name)
        here.update(phase=f"{name} on rank {self.rank}", ranks=self)
        if here["phase"] == "training of step 4 on rank 1":
            os.kill(os.getpid(), signal.SIGTERM)

    here: dict = {"phase": ""}
    time.strftime = lambda _: f"rank-{os.environ['RANK']}"
    train_cls.policy_loss, Ranks.enter, train_cls.check_rows = broken, watched, slowly
    try:
        code = train_cls.main(["--max_steps", "6", "--timeout", "4", *SMALL])
        print(f"code {code}", flush=True)
    finally:
        time.strftime, train_cls.policy_loss = clock, true_loss
        Ranks.enter, train_cls.check_rows = enter, check_rows


def lost(faults: list[list[str]], folder: str, timeout: int, *flags: str) -> None:
    """A run in which rank 1 dies, stops or raises (how) as soon as it enters a phase (moment); each
    time that torchrun starts it again the next of `faults` happens, and after the last one none."""
    grpo.engine.ranks.GRACE = 1.0  # seconds: both ranks are on this machine
    enter = Ranks.enter
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    how, moment = faults[attempt] if attempt < len(faults) else (None, None)

    def watched(self, name: str) -> None:
        enter(self, name)
        if self.rank == 1 and name == moment:
            if how == "raises":
                raise ValueError("a fault of rank 1")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "stops": signal.SIGSTOP}[how])

    Ranks.enter = watched
    sys.argv[1:] = ["--output_dir", folder, "--timeout", str(timeout), "--max_steps", "3", *SMALL]
    sys.argv += ["--config", str(train_cls.DEMO), "--resume_from_checkpoint", "auto", *flags]
    train_cls.run_and_exit(train_cls.main)


CHECKPOINT = Path(train_cls.DEMO).parent / "checkpoint"
SMALL = ["--prompts_per_step", "2", "--num_generations", "4", "--eval_samples", "2"]
SMALL += ["--max_completion_length", "40", "--save_steps", "1"]


def in_turn(calls: list) -> None:
    torch.set_num_threads(1)
    for function, arguments in calls:
        globals()[function](*arguments)
    sys.stdout.flush()
    os._exit(0)  # see grpo.run.exits.run_and_exit


if __name__ == "__main__":
    in_turn(json.loads(Path(sys.argv[1]).read_text()))
