"""What every test shares: one cache of checked images, signal handlers put back, short runs."""

import signal
from pathlib import Path

import pytest

import grpo  # noqa: F401  before torch: how its threads wait

# isort: split
import grpo.run.run
import train_det
from tests.peer import NORMS
from tests.runs import SHORT, train


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
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The run folder of SHORT, with no other flag: read it, never write in it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder, *SHORT)
    return folder


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    """The run folder of a sixth of train_det.py's demo: read it, never write in it."""
    folder = tmp_path_factory.mktemp("boxes") / "run"
    argv = ["--max_steps", "20", "--eval_samples", "72"]
    train(folder, *argv, script=train_det)
    return folder


@pytest.fixture(autouse=True)
def no_reports(request, monkeypatch):
    """A report takes a process and two seconds. The runs of `plain` and `boxes`, made before this,
    have theirs; a test that wants one asks for `reports`."""
    if "reports" not in request.fixturenames:
        monkeypatch.setattr(grpo.run.run, "write_report", lambda folder: "")


@pytest.fixture
def reports():
    """For tests whose runs write report.html."""


@pytest.fixture
def exact_reference(monkeypatch):
    """transformers takes norms and vision rotations in float32 even in a float64 model."""

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for code, name in NORMS.items():

        def rotate(q, k, cos, sin, code=code):
            return code.apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))

        monkeypatch.setattr(getattr(code, name), "forward", norm)
        monkeypatch.setattr(code, "apply_rotary_pos_emb_vision", rotate)
