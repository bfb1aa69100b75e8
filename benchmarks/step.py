"""A GRPO step here and in TRL's GRPOTrainer, on the same checkpoint and images, side by side.

    python benchmarks/step.py --model tiny --image 448 --completion 64 --steps 5 --json FILE

Two prompts a step with 8 completions each, all of one fixed length (no stop token is ever drawn),
float32 on the CPU, two threads, beta 0.04, one update per rollout, random rewards. Each trainer
runs in processes of its own, in turns; the first step of each process is warm-up and not counted;
medians. The peer is measured with gradient checkpointing as it comes (on) and off; ours runs
without, unless --gradient_checkpointing true. Here the scripts are run as they are: train_cls.py's
main() with its own metrics.

On a CPU the peer computes logits at every position, on a GPU only at completions: ratios with a
large vocabulary (small) say nothing of GPUs; mid is the fair one. `pip install -e ".[bench]"`.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPTS, GROUP, BETA, RATE = 2, 8, 0.04, 1e-5
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
KINDS = ("ours", "peer", "peer_without_checkpointing")


def random_reward(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return zlib.crc32(text.encode()) / 2**32


def endless_and_by_chance(script) -> None:
    """Patches a training script: completions have full length and random rewards."""
    import grpo.run.data

    score = script.score

    class Endless(grpo.run.data.Processor):
        suppressed_ids = property(lambda self: [*super().suppressed_ids, *self.stop_ids])

    def scored(completion, *arguments):
        true = score(completion, *arguments)
        return true if all(true.values()) else {name: random_reward(completion) for name in true}

    grpo.run.data.Processor, script.score = Endless, scored


def resident() -> float:
    """Memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    """Peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# ---- ours ---------------------------------------------------------------------------------------


def ours(settings: dict) -> dict:
    """train_cls.py's own main(), with random rewards and without stop tokens."""
    import train_cls

    imported = resident()
    endless_and_by_chance(train_cls)
    run = Path(settings["folder"]) / f"run-{os.getpid()}"
    argv = f"--prompts_per_step {PROMPTS} --num_generations {settings['group']} --beta {BETA} "
    argv += f"--max_completion_length {settings['completion']} --max_steps {settings['steps'] + 1} "
    argv += f"--learning_rate {RATE} --gradient_checkpointing {settings['our_checkpointing']} "
    argv += "--bf16 false --save_steps 0 "
    argv += "--max_prompt_length 4096 --max_pixels 1048576 --loss_type grpo --diagnose_after 0"
    paths = ["--model_name_or_path", settings["checkpoint"], "--dataset_name", settings["images"]]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_cls.main([*argv.split(), *paths, "--output_dir", str(run)])
    predicted = re.search(r"about ([\d.]+) GB a rank", said.getvalue())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len(lines) == settings["steps"] + 1, "a held-out split would add a line"
    assert all(line["completions/mean_length"] == settings["completion"] for line in lines)
    phases = ("rollout", "reference", "training", "optimizer")
    return {
        "seconds": [line["step_time"] for line in lines],
        "phases": {name: [line[f"time/{name}_s"] for line in lines] for name in phases},
        "peak_mb": peak(),
        "above_imports_mb": peak() - imported,
        "predicted_mb": 1000 * float(predicted[1]),
    }


# ---- the peer -----------------------------------------------------------------------------------


def peer(settings: dict) -> dict:
    """TRL's GRPOTrainer on images, its own supported path, without vLLM.

    settings may also have "prompts" of a step, the names of the layers that get an adapter, "lora",
    whether weights and arithmetic are "bf16", and more "options" of GRPOConfig.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    imported = resident()
    processor = AutoProcessor.from_pretrained(settings["checkpoint"], padding_side="left")
    special = processor.tokenizer.all_special_ids + list(processor.tokenizer.added_tokens_decoder)
    table = json.loads((Path(settings["images"]) / "train.json").read_text())
    rows = {"prompt": [], "image": []}
    for row in table:
        rows["prompt"].append([{"role": "user", "content": row["problem"]}])
        rows["image"].append(Image.open(Path(settings["images"]) / row["image"]).convert("RGB"))

    def rewards(completions, **_):
        return [random_reward(completion[0]["content"]) for completion in completions]

    seconds, lengths, phases = [], [], {"rollout": [], "reference": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()
            for spent in phases.values():
                spent.append(0.0)

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, args, state, control, logs=None, **_):
            lengths.append((logs or {}).get("completions/mean_length"))

    bf16, layers = settings.get("bf16", False), settings.get("lora")
    arguments = {
        "output_dir": str(Path(settings["folder"]) / f"run-{os.getpid()}"),
        "use_cpu": True,
        "bf16": bf16,
        "beta": BETA,
        "loss_type": "grpo",
        "learning_rate": RATE,
        # it counts completions
        "per_device_train_batch_size": settings.get("prompts", PROMPTS) * settings["group"],
        "num_generations": settings["group"],
        "max_completion_length": settings["completion"],
        "max_steps": settings["steps"] + 1,
        "gradient_checkpointing": settings["checkpointing"],
        "generation_kwargs": {"suppress_tokens": sorted(set(special))},
        "model_init_kwargs": {"dtype": torch.bfloat16 if bf16 else torch.float32},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "temperature": 1.0,
    }
    trainer = GRPOTrainer(
        model=settings["checkpoint"],
        reward_funcs=rewards,
        args=GRPOConfig(**arguments | settings.get("options", {})),
        train_dataset=Dataset.from_dict(rows),
        processing_class=processor,
        callbacks=[Clock()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=layers) if layers else None,
    )

    def timed(phase: str, call, counts=lambda *_: True):
        def wrapper(*arguments, **options):
            started = time.perf_counter()
            result = call(*arguments, **options)
            if counts(*arguments):
                phases[phase][-1] += time.perf_counter() - started
            return result

        return wrapper

    trainer._generate = timed("rollout", trainer._generate)
    trainer._get_per_token_logps_and_entropies = timed(
        "reference",
        trainer._get_per_token_logps_and_entropies,
        lambda model, *_: model is trainer.ref_model,
    )
    trainer.train()
    assert set(lengths) <= {None, float(settings["completion"])}, lengths
    spent = zip(seconds, phases["rollout"], phases["reference"], strict=True)
    phases["training and optimizer"] = [a - b - c for a, b, c in spent]
    return {
        "seconds": seconds,
        "phases": phases,
        "peak_mb": peak(),
        "above_imports_mb": peak() - imported,
    }


def stand_in_for_torchvision() -> None:
    """Declares the operators that torchvision needs to be imported, where its build lacks them.

    transformers' processors need the import; none of the operators is ever called.
    """
    import torch

    declared = torch.library.Library("torchvision", "FRAGMENT")
    stand_in_for_torchvision.kept = declared
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            declared.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
        else:
            return


# ---- the comparison -----------------------------------------------------------------------------


def in_own_process(script: str, settings: dict, threads: int, seconds: float | None = None) -> dict:
    """What `script --worker SETTINGS` prints as its last line, run in a fresh process. Raises
    subprocess.TimeoutExpired if that takes more than `seconds`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": settings["folder"]}
    command = [sys.executable, script, "--worker", json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        sys.exit(f"{settings['kind']} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(kind: str, settings: dict) -> dict:
    """Runs one trainer in a fresh process; its numbers without the first step's."""
    settings = settings | {"kind": kind, "checkpointing": kind == "peer"}
    result = in_own_process(__file__, settings, threads=2)
    result["seconds"] = result["seconds"][1:]
    result["phases"] = {name: spent[1:] for name, spent in result["phases"].items()}
    return result


def summary(runs: list[dict], tokens: int) -> dict:
    """Medians over all counted steps of several processes."""
    seconds = [value for run in runs for value in run["seconds"]]
    step = statistics.median(seconds)
    phases = {
        name: statistics.median([value for run in runs for value in run["phases"][name]])
        for name in runs[0]["phases"]
    }
    predicted = {"predicted_mb": runs[0]["predicted_mb"]} if "predicted_mb" in runs[0] else {}
    return predicted | {
        "step_s": step,
        "step_s_min_max": [min(seconds), max(seconds)],
        "phases_s": phases,
        "completion_tokens_per_s": tokens / step,
        "peak_mb": statistics.median(run["peak_mb"] for run in runs),
        "peak_above_imports_mb": statistics.median(run["above_imports_mb"] for run in runs),
        "steps": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "mid", "small"), default="tiny")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--image", type=int, default=448, help="pixels a side")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--group", type=int, default=GROUP)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each trainer")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each, in turns")
    parser.add_argument("--gradient_checkpointing", choices=("true", "false"), default="false")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        settings = json.loads(options.worker)
        stand_in_for_torchvision()
        result = (ours if settings["kind"] == "ours" else peer)(settings)
        print("\n" + json.dumps(result))
        return

    report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict:
    """The report of one setting: each trainer's medians, and the ratios."""
    from benchmarks.material import make_checkpoint, make_images

    with tempfile.TemporaryDirectory() as folder:
        each = -(-options.steps // options.rounds)
        settings = {
            "folder": folder,
            "checkpoint": str(
                make_checkpoint(Path(folder) / "model", options.model, options.family)
            ),
            "images": str(
                make_images(Path(folder) / "images", PROMPTS * (each + 1), options.image)
            ),
            "completion": options.completion,
            "group": options.group,
            "our_checkpointing": options.gradient_checkpointing,
            "steps": each,
        }
        load = [os.getloadavg()[0]]
        runs = {kind: [] for kind in options.only}
        for _ in range(options.rounds):
            for kind in options.only:
                runs[kind].append(worker(kind, settings))
                load.append(os.getloadavg()[0])
    tokens = PROMPTS * options.group * options.completion
    report = {
        "setting": f"{options.family} {options.model}, {options.image} pixels, "
        f"{options.completion} tokens, "
        f"G {options.group}",
        "our_gradient_checkpointing": options.gradient_checkpointing == "true",
        "load_average": load,
    }
    report |= {kind: summary(results, tokens) for kind, results in runs.items()}
    for kind, name in (("peer", ""), ("peer_without_checkpointing", "_without_checkpointing")):
        if "ours" in report and kind in report:
            report["ratio" + name] = report["ours"]["step_s"] / report[kind]["step_s"]
            report["memory_ratio" + name] = report["ours"]["peak_mb"] / report[kind]["peak_mb"]
    return report


def show(report: dict) -> None:
    print(report["setting"])
    for kind in (kind for kind in KINDS if kind in report):
        r = report[kind]
        phases = "  ".join(f"{name} {value:.2f}" for name, value in r["phases_s"].items())
        memory = f"peak {r['peak_mb']:.0f} MB, {r['peak_above_imports_mb']:.0f} above imports"
        memory += f", {r['predicted_mb']:.0f} predicted" if "predicted_mb" in r else ""
        speed = f"{r['step_s']:.2f} s a step  {r['completion_tokens_per_s']:.0f} tokens/s"
        print(f"{kind:28}{speed}  {memory}  {phases}")
    for name, value in report.items():
        if "ratio" in name:
            print(f"{name:40}{value:.3f}")
    print("load average " + " ".join(f"{value:.1f}" for value in report["load_average"]))


if __name__ == "__main__":
    main()
