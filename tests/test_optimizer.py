"""The optimizer, its schedules, and checkpoints of its state."""

import json
import math
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers

from demo.published import config_dict
from grpo.engine.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, learning_rate
from grpo.engine.ranks import Ranks
from grpo.run import checkpoint
from grpo.run.checkpoint import State, save_checkpoint
from grpo.run.resume import find_checkpoint, resume
from tests.tiny import tiny_config, tiny_model

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder that the model of these tests came from, as far as a save looks at it."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "config.json").write_text(json.dumps(config_dict(tiny_config())))
    return folder


def gradients(model, seed):
    """A gradient for every parameter, by a backward pass, as a pack gives it."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    loss = sum((p * d.to(p)).sum() for p, d in zip(model.parameters(), directions, strict=True))
    loss.backward()
    return directions


def test_bf16_masters_sum_packs_in_float32_and_are_written_back():
    model = tiny_model(tiny_config(), torch.float32).to(torch.bfloat16)
    plain = tiny_model(tiny_config(), torch.float32)
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    half, full = Optimizer(model, 0.1), Optimizer(plain, 0.1)
    for step in range(3):
        expected = [torch.zeros(p.shape) for p in model.parameters()]
        for pack in range(3):
            directions = gradients(model, 10 * step + pack)
            for total, direction in zip(expected, directions, strict=True):
                total += direction.to(torch.bfloat16).float()
        for master, total in zip(half.masters.values(), expected, strict=True):
            assert master.dtype == torch.float32 and torch.equal(master.grad, total)
        for parameter, total in zip(plain.parameters(), expected, strict=True):
            parameter.grad = total.clone()
        norms = [o.step(1e-2, 1.0) for o in (half, full)]
        assert norms[0] == pytest.approx(norms[1])
    for name, parameter in plain.named_parameters():
        assert torch.equal(half.masters[name], parameter)
        assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_matrices_decay_and_vectors_do_not(optim):
    model = tiny_model(tiny_config(), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Optimizer(model, 0.5, optim=optim).step(0.1, 1.0)  # no gradient: zeros
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


@pytest.mark.parametrize("optim, exact", [("adamw_torch", 1e-4), ("adamw_anyprecision", 3e-3)])
def test_clipping_scales_the_whole_gradient(optim, exact):
    """AdamW's first moment after one step is a tenth of the gradient that it saw."""
    seen = {}
    for limit in (0.0, 2.0):
        model = tiny_model(tiny_config(), torch.float32)
        optimizer = Optimizer(model, 0.0, optim=optim)
        gradients(model, 0)
        norm = optimizer.step(1e-3, limit)
        moments = [v for k, v in optimizer.moments().items() if k.startswith("exp_avg.")]
        whole = torch.cat([m.float().flatten() for m in moments])
        seen[limit] = (norm, 10 * whole.norm().item())
    assert seen[0.0][0] == pytest.approx(seen[0.0][1], rel=exact)
    assert seen[2.0][0] == pytest.approx(seen[0.0][0])
    assert seen[2.0][1] == pytest.approx(2, rel=exact)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = tiny_model(tiny_config(), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, 0.1)
    gradients(model, 0)
    next(model.parameters()).grad[0] = float("nan")
    assert math.isnan(optimizer.step(0.1, 1.0)) and optimizer.updates == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def flags(rate: float, schedule: str, warmup: float, **updates: int) -> SimpleNamespace:
    known = {"learning_rate": rate, "lr_scheduler_type": schedule, "warmup_ratio": warmup}
    return SimpleNamespace(**known | {"num_iterations": 1, "num_minibatches": 1} | updates)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule, warmup):
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = transformers.get_scheduler(name, optimizer, int(20 * warmup), 20)
    for step in range(20):
        rate = learning_rate(flags(3e-4, schedule, warmup), step + 1, 20)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
        # five steps of four mini-batches, two passes over each: as many changes
        cut = flags(3e-4, schedule, warmup, num_minibatches=4, num_iterations=2)
        for update in (2 * (step % 4), 2 * (step % 4) + 1):
            assert learning_rate(cut, step // 4 + 1, 5, update) == rate
    with pytest.raises(ValueError, match="linear, cosine, constant"):
        learning_rate(flags(1.0, "sawtooth", 0.0), 1, 1)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_bit_for_bit(tmp_path, source, dtype, optim):
    def start():
        model = tiny_model(tiny_config(), torch.float32).to(dtype)
        return model, Optimizer(model, 0.1, optim=optim)

    model, optimizer = start()
    for step in range(2):
        gradients(model, step)
        optimizer.step(1e-2, 1.0)
    folder = save_checkpoint(tmp_path, source, model, optimizer, State(2), ALONE)
    again, resumed = start()
    resume(folder, resumed, json.loads((folder / "state.json").read_text())["updates"])
    for m, o in ((model, optimizer), (again, resumed)):
        gradients(m, 7)
        o.step(1e-2, 1.0)
    for name, master in optimizer.masters.items():
        assert torch.equal(master, resumed.masters[name])
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))


def test_only_the_newest_checkpoints_are_kept(tmp_path, source):
    model = tiny_model(tiny_config(), torch.float32)
    optimizer = Optimizer(model, 0.0)
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, source, model, optimizer, State(step), ALONE, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}


def test_the_best_checkpoint_by_evaluation_is_kept(tmp_path, source):
    model = tiny_model(tiny_config(), torch.float32)
    optimizer = Optimizer(model, 0.0)
    for step, score in ((1, 0.2), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, None)):
        state = State(step, held_out=score)
        save_checkpoint(tmp_path, source, model, optimizer, state, ALONE, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}


def fail_to_write(limit: int, call) -> None:
    """call() where no file may grow beyond `limit` bytes: a real write that really fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [1000, 300_000, 600_000])
def test_a_save_that_finds_no_room_says_so_and_keeps_the_older(tmp_path, source, limit):
    """Neither weights (0.4 MB) nor moments (0.8 MB) fit, or the moments alone do not."""
    model = tiny_model(tiny_config(), torch.float32)
    optimizer = Optimizer(model, 0.0)
    save_checkpoint(tmp_path, source, model, optimizer, State(1), ALONE, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def save():
        save_checkpoint(tmp_path, source, model, optimizer, State(2), ALONE, 1)

    with pytest.raises(ValueError, match=r"checkpoint-2 could not be written.*Kept: checkpoint-1"):
        fail_to_write(limit, save)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("when", ["weights", "state", "rename"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_whole(tmp_path, source, when, monkeypatch):
    """The process ends between any two calls: what is called checkpoint-N is whole."""
    model = tiny_model(tiny_config(), torch.float32)
    optimizer = Optimizer(model, 0.0)
    save_checkpoint(tmp_path, source, model, optimizer, State(1), ALONE, 1)

    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        where = {"weights": "save_tensors", "state": "save_config", "rename": "_flush"}[when]
        patch.setattr(checkpoint, where, kill)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, source, model, optimizer, State(2), ALONE, 1)
    assert find_checkpoint("auto", tmp_path, ALONE)[0].name == "checkpoint-1"
    resume(tmp_path / "checkpoint-1", optimizer, 0)
    save_checkpoint(tmp_path, source, model, optimizer, State(2), ALONE, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_leftovers_go_with_the_next_save_and_a_damaged_one_is_not_the_best(tmp_path, source):
    model = tiny_model(tiny_config(), torch.float32)
    optimizer = Optimizer(model, 0.0)
    (tmp_path / ".checkpoint-7.partial").mkdir()
    save_checkpoint(tmp_path, source, model, optimizer, State(1, held_out=1.0), ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (tmp_path / "checkpoint-1" / "state.json").write_text("[")
    save_checkpoint(tmp_path, source, model, optimizer, State(2), ALONE, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
