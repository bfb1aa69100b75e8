"""The emulated device itself: what it computes, counts and refuses."""

import json
import subprocess

import pytest

SCRIPT = """
import json, sys
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

operations, waits = torch._rehearsal
x, found, refused = torch.arange(6.0, device="cuda"), {}, {}

def attempt(name, action, captured=True):
    try:
        if captured:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                action()
        else:
            action()
        refused[name] = None
    except RuntimeError as error:
        refused[name] = str(error)

attempt("other device", lambda: x + torch.ones(6), captured=False)
q = torch.randn(4, 2, 8, device="cuda")
bounds = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
attempt("float32", lambda: varlen_attn(q, q, q, bounds, bounds, 4, 4), captured=False)
attempt("a value is read", lambda: x.sum().item())
attempt("a mask", lambda: x[x > 2])
attempt("to the host", lambda: x.cpu())
attempt("from a list", lambda: torch.tensor([1, 2], device="cuda"))
attempt("from the host", lambda: torch.arange(3).to("cuda"))
attempt("nothing wrong", lambda: (x * 2).softmax(0))

before = operations["aten::mul.Tensor"], waits.total()
found["product"] = (x * x).tolist()
found["counted"] = operations["aten::mul.Tensor"] - before[0], waits.total() - before[1]

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2 + 1
    x.add_(1)
found["captured"] = x.tolist()
graph.replay()
graph.replay()
found["replayed"] = y.tolist(), x.tolist()

held = torch.cuda.memory_allocated()
block = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
found["allocated"] = torch.cuda.memory_allocated() - held

def difference(ours, theirs):
    pairs = [(a.detach().cpu().float(), b.detach().float()) for a, b in zip(ours, theirs)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

torch.manual_seed(0)
heads, parts = (4, 2, 2), (3, 5)
dense = [torch.randn(sum(parts), n, 16).bfloat16() for n in heads]
packed = [t.cuda().requires_grad_() for t in dense]
wide = [t.double().requires_grad_() for t in dense]
bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
out = varlen_attn(*packed, bounds, bounds, 5, 5, window_size=(-1, 0), enable_gqa=True)
out.float().square().sum().backward()
expected = torch.cat([
    F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in split), is_causal=True,
                                   enable_gqa=True).transpose(0, 1)
    for split in zip(*(t.split(parts) for t in wide))
])
expected.square().sum().backward()
found["attention"] = difference([out], [expected])
found["its gradients"] = difference([t.grad for t in packed], [t.grad for t in wide])

t, weight = torch.randn(3, 16), torch.randn(16)
here = [t.cuda().requires_grad_(), weight.cuda().requires_grad_()]
there = [t.requires_grad_(), weight.requires_grad_()]
ours, theirs = (F.rms_norm(a, (16,), b, 1e-6) for a, b in (here, there))
for result in (ours, theirs):
    result.pow(3).sum().backward()
found["norm"] = difference([ours, *(p.grad for p in here)], [theirs, *(p.grad for p in there)])

print(json.dumps([found, refused]))
sys.exit(3)
"""


@pytest.fixture(scope="module")
def told(emulated_gpu, tmp_path_factory):
    script = tmp_path_factory.mktemp("device") / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([emulated_gpu / "python", script], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr[-3000:]  # the script's own
    return json.loads(done.stdout.splitlines()[-1])


def test_it_computes_and_counts(told):
    found = told[0]
    assert found["product"] == [0, 1, 4, 9, 16, 25] and found["counted"] == [1, 1]
    assert found["captured"] == [0, 1, 2, 3, 4, 5]  # a capture executes nothing
    assert found["replayed"] == [[3, 5, 7, 9, 11, 13], [2, 3, 4, 5, 6, 7]]
    assert found["allocated"] == 1 << 20
    assert found["norm"] < 1e-5
    assert found["attention"] < 0.01 and found["its gradients"] < 0.01  # bfloat16


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("other device", "mixes cuda and cpu tensors"),
        ("float32", "half precision"),
        ("a value is read", "waits for the device while a graph is captured"),
        ("a mask", "by a mask waits"),
        ("to the host", "copies to the host"),
        ("from a list", "copies between host and device"),
        ("from the host", "copies between host and device"),
    ],
)
def test_it_refuses_what_a_device_refuses(told, what, reason):
    assert reason in (told[1][what] or "")
    assert told[1]["nothing wrong"] is None
