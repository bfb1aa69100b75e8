"""Processes that start at once, with torch imported and the demo's pictures drawn.

Python, torch, transformers and the pictures take six seconds of a core, more than most runs of the
tests. One process loads them once (multiprocessing's fork server, with tests/preloaded.py), and
what tests launch is forked from it. It computes nothing, so nothing is carried over.

Not here: torchrun itself (`torchrun` in tests/runs.py).
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from tests.runs import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def fork(log: Path, function: Callable, *arguments, **environment: str) -> BaseProcess:
    """A process that calls function(*arguments) in the project's folder, with the environment of
    this one and `environment`; what it prints is appended to the files `log`.out and `log`.err."""
    given = {**os.environ, **environment}
    with chdir(ROOT):  # Python 3.11 imports what is preloaded from there
        forkserver.ensure_running()
        call = (log, given, function, arguments)
        process = FORKS.Process(target=_call, args=call, daemon=True)
        process.start()
    return process


def _call(log: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    function(*arguments)


@dataclass
class Outcome:
    """How ranks ended: their exit codes (negative: the signal), and what they all printed."""

    codes: list[int]
    stdout: str
    stderr: str


def ranks(
    world: int, folder: Path, function: Callable, *arguments, restarts: int = 0, timeout=600.0
) -> Outcome:
    """`world` processes that call function(*arguments) with the environment that torchrun gives
    them. As with torchrun, one that fails ends the others, and all are started again up to
    `restarts` times. All are killed if they take longer than `timeout` seconds."""
    folder.mkdir(exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(world)}
    for attempt in range(restarts + 1):
        shared["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = folder / f"rank-{rank}"
            processes.append(fork(log, function, *arguments, **shared, **own))
        codes = _end_of_all(processes, timeout)
        if not any(codes):
            break
    logs = {
        end: "".join(file.read_text() for file in sorted(folder.glob(f"rank-*.{end}")))
        for end in ("out", "err")
    }
    return Outcome(codes, logs["out"], logs["err"])


def _end_of_all(processes: list[BaseProcess], timeout: float) -> list[int]:
    """Waits until all have ended, or one has failed and the others were told to end."""
    until = time.monotonic() + timeout
    while (left := until - time.monotonic()) > 0:
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not running or any(process.exitcode for process in processes):
            break
        connection.wait(running, left)
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 60)):
        until = time.monotonic() + seconds
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, number)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    return [process.exitcode for process in processes]
