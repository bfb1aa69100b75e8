"""How torch's threads wait on a busy machine: set before torch is loaded, unless the user has."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

WATCH = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(*(os.environ.get(n) for n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
            sys.exit()

sys.meta_path.insert(0, Finder())
import {module}
"""
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def seen_by_torch(module: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", WATCH.format(module=module)]
    out = subprocess.check_output(command, cwd=ROOT, env=clean | environment, text=True)
    return out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train_cls", "train_det", "demo.warm_start", "benchmarks.head"])
def test_threads_that_wait_sleep_soon_whoever_begins(module):
    assert seen_by_torch(module) == "1000 None"


@pytest.mark.slow
def test_what_the_user_has_set_stays():
    assert seen_by_torch("train_cls", OMP_WAIT_POLICY="active") == "None active"
    assert seen_by_torch("train_cls", GOMP_SPINCOUNT="7") == "7 None"
