"""Both scripts on the CPU, on one emulated device and on two (FSDP2, gloo): the same numbers.

In float32 the CPU's, to six digits. In bfloat16, where FlashAttention, CUDA graphs and other
kernels are used, one device's and two devices'.
"""

import json

import pytest

from benchmarks.material import make_checkpoint
from tests.runs import ROOT, read_lines, read_steps

SHORT = "--max_steps 2 --prompts_per_step 2 --num_generations 4 --eval_samples 4"
FLOWERS = f"{SHORT} --max_completion_length 40"
RANDOM = f"{SHORT} --dataset_name demo:flowers --max_completion_length 12 --learning_rate 1e-3"
MUCH = "--num_iterations 2 --dynamic_sampling --freeze_vision --gradient_checkpointing true"
MUCH += " --tokens_per_pack 120"
PARTS = "--prompts_per_step 5 --num_minibatches 2 --num_iterations 2 --use_bias_correction_kl"
FLOAT32 = {  # name: script, flags
    "flowers": ("train_cls", FLOWERS),
    "boxes": ("train_det", f"{SHORT} --max_completion_length 96"),
    "LoRA": ("train_cls", f"{FLOWERS} --use_peft --learning_rate 2e-3"),
    "two updates, small packs": ("train_cls", f"{FLOWERS} {MUCH}"),
    "mini-batches": ("train_cls", f"{FLOWERS} {PARTS}"),
    "qwen2_5_vl": ("train_cls", RANDOM),
    "qwen3_vl": ("train_cls", RANDOM),
    "qwen3_5": ("train_cls", RANDOM),
}
BF16 = {
    "flowers": ("train_cls", FLOWERS),
    "boxes": ("train_det", f"{SHORT} --max_completion_length 96"),
    "LoRA": ("train_cls", f"{FLOWERS} --use_peft --learning_rate 2e-3"),
    "mini-batches": ("train_cls", f"{FLOWERS} {PARTS}"),
    "8 bits, offloaded": ("train_cls", f"{FLOWERS} --optim adamw_8bit --cpu_offload"),
    "qwen2_5_vl": ("train_cls", RANDOM),
    "qwen3_vl": ("train_cls", RANDOM),
    "qwen3_5": ("train_cls", RANDOM),
}
ON_CPU, ONE, TWO = ["venv/bin/python"], ["python"], ["torchrun", 2]
TWO_ON_CPU = [*ON_CPU, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Folder of each run: runs[device][case]."""
    folder = tmp_path_factory.mktemp("rehearsal")
    random = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
    models = {family: make_checkpoint(folder / family, "tiny", family) for family in random}

    def case(name: str, dtype: str, script: str, flags: str) -> dict:
        argv = [*flags.split(), "--bf16", str(dtype == "bf16")]
        if name in models:
            argv += ["--model_name_or_path", str(models[name])]
        chance = name in models
        return {"name": f"{dtype} {name}", "script": script, "argv": argv, "by_chance": chance}

    float32 = [case(name, "float32", *how) for name, how in FLOAT32.items()]
    bf16 = [case(name, "bf16", *how) for name, how in BF16.items()]
    # which groups share an update depends on the number of ranks
    parts = [case("mini-batches", "float32", *FLOAT32["mini-batches"])]
    found = {}
    for name, command, cases in (
        ("CPU", ON_CPU, float32),
        ("CPU, two", TWO_ON_CPU, parts),
        ("one", ONE, float32 + bf16),
        ("two", TWO, float32 + bf16),
    ):
        (folder / name).mkdir()
        (folder / f"{name}.json").write_text(json.dumps(cases))
        program = ROOT / "tests" / "emulated_gpu" / "runs.py"
        start(*command, program, folder / f"{name}.json", folder / name)
        found[name] = {case["name"]: folder / name / case["name"] for case in cases}
    return found


def numbers(run) -> list[dict]:
    """Of each step; without those of the clock, of memory, of several ranks, and of rounding."""
    without = ("time/", "memory/", "step_time", "ranks/", "sampling/")
    return [
        {key: value for key, value in step.items() if not key.startswith(without)}
        for step in read_steps(run)
    ]


def texts(run) -> list[str]:
    return sorted(line["completion"] for line in read_lines(run / "completions.jsonl"))


@pytest.mark.parametrize("devices", ["one", "two"])
@pytest.mark.parametrize("name", FLOAT32)
def test_numbers_in_float32_are_those_of_the_cpu(runs, name, devices):
    on_cpu = "CPU, two" if devices == "two" and name == "mini-batches" else "CPU"
    expected, found = (runs[device][f"float32 {name}"] for device in (on_cpu, devices))
    assert texts(found) == texts(expected)
    assert all(step["sampling/logp_difference_max"] < 1e-5 for step in read_steps(found)[1:])
    for here, there in zip(numbers(found), numbers(expected), strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", BF16)
def test_two_devices_begin_as_one_in_bfloat16(runs, name):
    """Until the first update; from then on rounding decides what is drawn. What was sampled has
    the log-probs that the training pass gives it."""
    one, two = (read_steps(runs[devices][f"bf16 {name}"]) for devices in ("one", "two"))
    for key in ("reward", "completions/mean_length"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-3), key
    if name != "mini-batches":  # whose updates are of other groups
        assert two[1]["entropy"] == pytest.approx(one[1]["entropy"], rel=1e-3)
        assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=2e-3)
    for step in one[1:] + two[1:]:
        assert step["sampling/logp_difference_max"] < 0.1


@pytest.mark.parametrize("devices", ["one", "two"])
@pytest.mark.parametrize("name", [name for name in BF16 if "offloaded" not in name])
def test_the_host_waits_for_the_device_a_few_times_a_step(runs, name, devices):
    """Never while it launches a forward or a backward pass. (With --cpu_offload it copies.)"""
    waits = json.loads((runs[devices][f"bf16 {name}"] / "waits.json").read_text())
    assert waits["reference"] == waits["training"] == 0, waits
    updates = 4 if name == "mini-batches" else 1
    assert waits["rollout"] <= 10 and waits["optimizer"] <= 4 * updates, waits
