"""What a GPU is asked to do for a token, counted on the emulated device."""

import json

import pytest

from models.attention import Attention
from models.delta_net import GatedDeltaNet
from models.families import FAMILIES
from tests.runs import ROOT
from tests.tiny import family_config

CASES = (*FAMILIES, "qwen2_5_vl with adapters", "qwen3_5 with adapters")
QWEN3_5 = family_config("qwen3_5")
# What the memory plan takes for each kind; linear attention launches 10 more each 16th token.
GATED = Attention.Step.operations(QWEN3_5)
DELTA = GatedDeltaNet.Step.operations(QWEN3_5) + 10 / 16
LAUNCHED = {family: Attention.Step.operations(family_config(family)) for family in FAMILIES} | {
    "qwen3_5": (GATED + DELTA) / 2,
    "qwen2_5_vl with adapters": 16 + 2 * 4,
    "qwen3_5 with adapters": (GATED + DELTA) / 2 + 2 * 4,
    "qwen3_5 full_attention": GATED,
    "qwen3_5 linear_attention": DELTA,
}


@pytest.fixture(scope="module")
def found(start):
    said = start("python", ROOT / "tests" / "emulated_gpu" / "decoding.py")
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("case", LAUNCHED)
def test_operations_and_waits_of_a_decoded_token(found, case):
    """16 a layer in bfloat16; one more for the norms of q and k; two for a gate of attention, and
    four for norms that are float32; 40 with linear attention; two for each joined product's
    adapters. The host looks every 16 tokens."""
    assert found[case]["layer"] == LAUNCHED[case]
    assert found[case]["rest"] < (70 if "qwen3_5" in case else 60)  # two kinds of layers
    assert found[case]["waits"] <= 1 / 16


def test_stop_strings_end_completions_between_the_looks(found):
    """As on the CPU, with graphs and without. Two operations a token, and no wait more."""
    case = found["stop strings"]
    assert case["same"] == [True] * 6 and case["lengths"] > 2
    assert case["operations"] <= 3 and case["waits"] <= 1 / 16


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_draw_what_launched_ones_draw(found, case):
    """Token by token and bit by bit, in shapes that change, with weights that have changed. Where
    graphs are forgotten, because the cache grew or there were too many, so is their memory."""
    assert found[case]["same"] == [True] * 4
    assert found[case]["pools"] == 3
    assert found[case]["lengths"] > 2 and found[case]["replays"] > 50
