"""What a GPU is asked to do for a token, on the emulated device that CONTRIBUTING.md tells of.

    REHEARSE=FOLDER pytest tests/test_rehearsal.py

FOLDER/python runs a script on that device. Skipped where it is not there.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

FOLDER = os.environ.get("REHEARSE")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs the emulated device: REHEARSE=FOLDER")
CASES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_vl with adapters")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found():
    command = [Path(FOLDER) / "python", ROOT / "tests" / "rehearsed.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_operations_and_waits_of_a_decoded_token(found, case):
    """16 a layer in bfloat16; one more for the norms of q and k; two for each joined product's
    adapters. The host looks every 16 tokens."""
    expected = {"qwen3_vl": 17, "qwen2_5_vl with adapters": 16 + 2 * 4}.get(case, 16)
    assert found[case]["layer"] == expected
    assert found[case]["rest"] < 60
    assert found[case]["waits"] <= 1 / 16


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_draw_what_launched_ones_draw(found, case):
    """Token by token and bit by bit, in shapes that change, with weights that have changed. Where
    graphs are forgotten, because the cache grew or there were too many, so is their memory."""
    assert found[case]["same"] == [True] * 4
    assert found[case]["pools"] == 3
    assert found[case]["lengths"] > 2 and found[case]["replays"] > 50
