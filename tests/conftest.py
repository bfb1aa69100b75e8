"""What every test shares: how tests are dealt to processes, one cache of checked images, signal
handlers put back, short runs.

What is slow to import is imported where it is used: with several workers (pytest-xdist) this file
is also read by the process that only deals out the tests.
"""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import grpo  # noqa: F401  before torch: how its threads wait

# Before torch: a worker has a core to itself, and sums are rounded alike wherever tests run.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# They begin first, so that no worker is left with a long file at the end.
LONG_FILES = ["ranks", "faults", "report", "run", "lora", "learning"]


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker on each core, up to four as each takes ten seconds to begin; none for one file."""
    if len(config.args) == 1 and not Path(config.args[0]).is_dir():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 4)


def pytest_collection_modifyitems(items) -> None:
    order = [f"test_{name}.py" for name in LONG_FILES]
    items.sort(key=lambda i: order.index(i.path.name) if i.path.name in order else len(order))


def pytest_addoption(parser):
    what = "also run what needs the emulated CUDA device that tests/emulated_gpu/setup FOLDER made"
    parser.addoption("--emulated-gpu", type=Path, metavar="FOLDER", help=what)


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory):
    """Checked images are remembered from test to test, but not beyond."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """A run in this process listens to signals; the next test must not."""
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of `name` as make(folder) leaves it; the first worker that asks makes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.made"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The run folder of SHORT, with no other flag: read it, never write in it."""
    from tests.runs import SHORT, train

    return made_once(tmp_path_factory, "plain", lambda folder: train(folder, *SHORT))


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    """The run folder of a tenth of train_det.py's demo: read it, never write in it."""
    import train_det
    from tests.runs import train

    argv = ["--max_steps", "12", "--eval_samples", "72"]
    return made_once(
        tmp_path_factory, "boxes", lambda folder: train(folder, *argv, script=train_det)
    )


@pytest.fixture(autouse=True)
def no_reports(request, monkeypatch):
    """A report takes a process and two seconds. The runs of `plain` and `boxes`, made before this,
    have theirs; a test that wants one asks for `reports`."""
    import grpo.run.run

    if "reports" not in request.fixturenames:
        monkeypatch.setattr(grpo.run.run, "write_report", lambda folder: "")


@pytest.fixture
def reports():
    """For tests whose runs write report.html."""


@pytest.fixture
def exact_reference(monkeypatch):
    """transformers takes norms and vision rotations in float32 even in a float64 model."""
    from tests.peer import NORMS, exact_qwen3_5

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for code, name in NORMS.items():

        def rotate(q, k, cos, sin, code=code):
            return code.apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))

        monkeypatch.setattr(getattr(code, name), "forward", norm)
        monkeypatch.setattr(code, "apply_rotary_pos_emb_vision", rotate)
    exact_qwen3_5(monkeypatch)
