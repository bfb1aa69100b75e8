"""What tests/test_ranks.py has several ranks do, under torchrun."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import models.load
import train_cls
from grpo import dist
from grpo.checkpoint import save_final
from grpo.logps import pack_chunks
from grpo.rollout import Group, filler, make_packs
from models.load import empty_model
from tests.tiny import tiny_prompt


def runs(file: str) -> None:
    """Trains once for each list of flags in a JSON file, in one pair of processes."""
    for argv in json.loads(Path(file).read_text()):
        assert train_cls.main(argv) == 0


def gradient(folder: str, shard_size: str) -> None:
    """Sums of gradients over ranks: rank 0 has two packs with images, rank 1 one without, and the
    rest nothing at all; written whole by the main rank, and saved by all."""
    ranks = dist.start(60)
    mesh = dist.make_mesh(ranks, int(shard_size))
    for group in mesh.get_all_groups():
        assert group._get_backend(ranks.device).options._timeout.total_seconds() == 60
    model = dist.place(empty_model(Path(folder)), ranks, torch.float32, mesh)
    model.compute_device = torch.device("meta")  # as with --cpu_offload: not where weights are
    assert model.bounds([(1,)]).device.type == "meta"
    model.compute_device = ranks.device
    dist.load_weights(model, Path(folder))
    whole = dist.whole_model(model, empty_model(Path(folder)), ranks, torch.float32)
    dist.gather_weights(model, whole)
    packs = uneven_packs(model.config)[ranks.rank] if ranks.rank < 2 else []
    packs += [filler()] * (int(ranks.most(len(packs))) - len(packs))
    score(model, packs)
    optimizer = dist.Optimizer(model, 0.0)
    gathered = {n: g.full_tensor() for n, g in optimizer.gradients().items()}
    norm = optimizer.step(1e-2, 0.1)
    sums = dist.checksum(model, ranks)
    after = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
    models.load.MOST_BYTES = 20_000  # several files
    save_final(Path(folder), Path(folder), model, optimizer, ranks, torch.float32)
    if ranks.is_main:
        found = {"gradients": gathered, "norm": norm, "checksum": sums, "after": after}
        torch.save(found | {"whole": whole.state_dict()}, Path(folder) / "found.pt")
    ranks.wait()
    ranks.stop()


def uneven_packs(config) -> list[list]:
    shapes = ([(4, 6)], [(2, 2), (4, 4)]), ([],)
    packs = []
    for rank, prompts in enumerate(shapes):
        groups = [
            Group(tiny_prompt(config, grids, seed=rank + i), [[5, 6, 7], [8] * (i + 1)], [], [])
            for i, grids in enumerate(prompts)
        ]
        packs.append(make_packs(groups, 40))
    return packs


def score(model, packs) -> None:
    for pack in packs:
        for part, logps, _ in pack_chunks(model, pack, 1.0, None):
            weights = torch.arange(1.0, 100.0)[part]
            (logps * weights).sum().backward()


def lost(how: str, phase: str, folder: str) -> None:
    """A run in which rank 1 dies, stops or raises as soon as it is in a phase of step 2; where
    torchrun starts it again, it goes on."""
    enter = dist.Ranks.enter

    def watched(self, name: str) -> None:
        enter(self, name)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and self.rank == 1 and name == f"{phase} of step 2":
            if how == "raises":
                raise ValueError("a fault of rank 1")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "stops": signal.SIGSTOP}[how])

    dist.Ranks.enter = watched
    sys.argv[1:] = ["--output_dir", folder, "--timeout", "10", "--max_steps", "4", *SMALL]
    sys.argv += ["--config", str(train_cls.DEMO), "--resume_from_checkpoint", "auto"]
    started = time.monotonic()
    try:
        train_cls.run(train_cls.main)
    finally:
        print(f"left after {time.monotonic() - started:.0f} s", flush=True)


def rough(folder: str) -> None:
    """A run in which rank 1 would name the run folder otherwise, checks its rows for longer than
    collectives wait, and alone has a loss that is not a number (step 2) and an infinite gradient
    (step 3), and is told to end (step 4)."""
    os.chdir(folder)
    train_cls.time.strftime = lambda _: f"rank-{os.environ['RANK']}"
    true_loss, enter, checked = train_cls.policy_loss, dist.Ranks.enter, train_cls.checked

    def slowly(*arguments):
        time.sleep(8 * int(os.environ["RANK"]))
        return checked(*arguments)

    def broken(*arguments):
        loss, stats = true_loss(*arguments)
        if here == "training of step 2 on rank 1":
            loss = loss * float("nan")
        if here == "training of step 3 on rank 1":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, stats

    def watched(self, name: str) -> None:
        nonlocal here
        enter(self, name)
        here = f"{name} on rank {self.rank}"
        if here == "training of step 4 on rank 1":
            os.kill(os.getpid(), signal.SIGTERM)

    here = ""
    train_cls.policy_loss, dist.Ranks.enter, train_cls.checked = broken, watched, slowly
    argv = ["--max_steps", "6", "--timeout", "12", *SMALL]
    print(f"code {train_cls.main(argv)}", flush=True)


SMALL = ["--prompts_per_step", "2", "--num_generations", "4", "--eval_samples", "2"]
SMALL += ["--max_completion_length", "40", "--save_steps", "1"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    {"runs": runs, "gradient": gradient, "lost": lost, "rough": rough}[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # see grpo.cli.run
