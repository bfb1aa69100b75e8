"""Where the emulated device is, and how to start something on it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = "tests/emulated_gpu/setup FOLDER, then pytest --emulated-gpu=FOLDER"


@pytest.fixture(scope="session")
def emulated_gpu(request) -> Path:
    """The folder that `setup` has made; without one the test is skipped."""
    folder = request.config.getoption("--emulated-gpu")
    if folder is None:
        pytest.skip(f"needs the emulated CUDA device: {COMMANDS}")
    if not (folder / "python").is_file():
        pytest.fail(f"no emulated CUDA device in {folder}: {COMMANDS}")
    return folder.resolve()


@pytest.fixture(scope="session")
def start(emulated_gpu):
    """Runs a command of that folder to its end, from the checkout; what it printed."""

    def started(*command) -> str:
        program, *arguments = map(str, command)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [emulated_gpu / program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return started
