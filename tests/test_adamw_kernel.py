"""The Triton kernel of the light optimizers, run by Triton's interpreter on a CPU: bit for bit.

Triton is looked for here and where --emulated-gpu points to (tests/emulated_gpu)."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from grpo.engine import adamw
from grpo.engine.adamw import BETA1, MOMENTS, Bf16Moment, LightAdamW, disagreement, seed_of
from tests.runs import ROOT

SCRIPT = """
import sys
import numpy as np
import torch
from torch import nn
from triton.runtime import interpreter
from grpo.engine import adamw
from grpo.engine.adamw import LightAdamW
from grpo.engine.adamw_kernel import update

def fma(self, x, y, z):  # the interpreter rounds twice
    exact = x.data.astype(np.longdouble) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

def root(t):  # MKL's is not IEEE's
    return torch.from_numpy(np.sqrt(t.contiguous().numpy()))

ones = torch.full((16,), 1 + 2**-12)
if (1 + 2**-11 - ones.new_zeros(16)).sub_(ones, alpha=1 + 2**-12).any():  # this CPU joins
    interpreter.InterpreterBuilder.create_fma = fma
torch.Tensor.sqrt, torch.Tensor.sqrt_ = root, lambda t: t.copy_(root(t))
optim, least, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
adamw.local_shard = lambda tensor: (tensor, first)
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((9, 512), (5, 300), (3, 7), (4, 1), (6, 3, 2, 4)):
        found = []
        for kernel in (None, update):
            generator = torch.Generator().manual_seed(0)
            weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            light = LightAdamW({"w": weight}, optim, 0.1, seed=3)
            light.kernel = kernel
            for number in range(1, 5):
                sizes = 10.0 ** torch.randint(least, 10, shape, generator=generator)
                weight.grad = (torch.randn(shape, generator=generator) * sizes).to(dtype)
                weight.grad.flatten()[:: 1 if number == 2 else 3] = 0
                light.step(1e-2, number, 0.37)
            found.append([weight.detach(), *light.tensors().values()])
        for one, two in zip(*found, strict=True):
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), (dtype, shape)
"""


@pytest.fixture
def python(request) -> str:
    """A Python that has Triton."""
    if importlib.util.find_spec("triton"):
        return sys.executable
    if folder := request.config.getoption("--emulated-gpu"):
        return str(folder.absolute() / "venv" / "bin" / "python")
    pytest.skip("Triton is not installed")


@pytest.mark.parametrize("first", [0, 9_000_003])
@pytest.mark.parametrize("optim", MOMENTS)
def test_it_is_the_update_operation_by_operation_bit_for_bit(python, optim, first):
    """Whole blocks, with rest, tiny; zeros, huge and (the interpreter misreads those of bf16)
    denormal gradients; a first update and later ones; a shard's first row, also where its numbers
    need more than 32 bits."""
    least = -10 if MOMENTS[optim] is Bf16Moment else -44
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-c", SCRIPT, optim, str(least), str(first)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_kernel_is_told_and_a_wrong_one_is_found_out(monkeypatch):
    """A kernel that does nothing differs in nearly all numbers from the CPU."""
    monkeypatch.setattr(adamw, "local_shard", lambda tensor: (tensor, 2))  # of a second rank
    weight = nn.Parameter(torch.zeros(4, 300))
    light, told = LightAdamW({"w": weight}, "adamw_8bit", 0.1, seed=3), []
    light.kernel = lambda *tensors, **numbers: told.append(numbers)
    weight.grad = torch.ones_like(weight)
    light.step(0.5, 1, 0.37)
    assert told[0]["seed"] == seed_of("3/1/w") and told[0]["first"] == 2 * 300
    assert told[0]["kept"] == 0.95 and told[0]["m_part"] == 1 - BETA1
    nothing = disagreement(lambda *_, **__: None, "adamw_8bit", torch.float32, torch.device("cpu"))
    assert nothing > 0.9


def updated(weight: torch.Tensor, kernel) -> torch.Tensor:
    """The weight after two updates."""
    light = LightAdamW({"w": nn.Parameter(weight)}, "adamw_8bit", 0.1, seed=3)
    light.kernel = kernel
    for number in (1, 2):
        light.weights["w"].grad = weight.detach().cos()
        light.step(1e-2, number, 0.37)
    return light.weights["w"].detach()


def test_a_kernel_that_fails_on_other_widths_is_given_up_and_the_update_goes_on(capsys):
    """Triton compiles anew for each kind of width and alignment, of which the door tries two."""
    weight, calls = torch.randn(4, 300), []

    def kernel(*tensors, **numbers):
        calls.append(numbers)
        raise RuntimeError("PassManager::run failed\nand more")

    assert torch.equal(updated(weight.clone(), kernel), updated(weight.clone(), None))
    assert len(calls) == 1
    said = capsys.readouterr()
    assert (said.out + said.err).count("does not work here") == 1


def test_a_weight_that_is_not_contiguous_is_updated_without_the_kernel():
    weight, called = torch.randn(300, 4), []

    def kernel(*tensors, **numbers):
        called.append(numbers)

    assert torch.equal(updated(weight.clone().T, kernel), updated(weight.clone().T, None))
    assert not called
