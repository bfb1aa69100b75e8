"""Steps of train_cls.py as it is: how fast, in how much memory; and the demo, on any devices."""

import contextlib
import importlib
import io
import json
import re
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

import grpo.engine.load
import grpo.rollout
import grpo.run.run
import models.decoding.generate
import train_cls
from benchmarks.gpu.card import device, synchronize
from benchmarks.gpu.shapes import WORK, allow_any_torchvision, draw_weights, image_side, make_model
from benchmarks.material import PROBLEM, make_images
from benchmarks.step import endless_and_by_chance
from grpo.flags.parser import parse_config
from grpo.plan.memory import peak_gb
from grpo.plan.sizes import Facts
from grpo.run import Run
from models.families import read_config
from models.packed_attention import choose_implementation
from models.processor import Processor

USABLE = 0.97  # of a device's memory
COMMON = "--bf16 true --save_steps 0 --learning_rate 1e-5 --diagnose_after 0 --min_pixels 3136 "
COMMON += "--max_prompt_length 4096 --logging_steps 1 "
MEASURED = {"seconds": "time/{}_s", "gb": "memory/{}_gb"}
PHASES = ("rollout", "reference", "training", "optimizer")
SYNCHRONIZES = "synchronizing CUDA operation"  # what torch says of a wait


def steps(settings: dict, report) -> None:
    """Steps of a model of published shapes, random weights, with random rewards and completions of
    full length: the first is not counted, and in the last the host's waits are.

    settings: model, shapes, flags, counted (steps). Reports `work` (tokens of a prompt, and of its
    image), `plan` (GB by phase, predicted), `graphs`; and after all steps `seconds` and `gb` by
    phase (medians, peaks), `step` (seconds), `perf` (tokens a second, MFU), `drift` (nats),
    `decode` (seconds of a rollout after its prefill), `waits` by phase, `used` (GB of the device,
    at the end, with what CUDA holds). If the plan does not fit the device: `skipped`, why. With
    settings["checkpoint"] the model and its images are those of that folder.
    """
    folder, work = Path(settings["folder"]) / settings["name"], WORK[settings["shapes"]]
    folder.mkdir(parents=True, exist_ok=True)
    last, model = settings["counted"] + 2, Path(settings.get("checkpoint", folder))
    if model == folder:
        config = make_model(folder, settings["model"], settings["shapes"])
        make_images(folder / "images", work.prompts * last, image_side(config, work))
        grpo.engine.load.load_weights = draw_weights
    side = image_side(read_config(model), work)
    argv = [*COMMON.split(), *work.flags.split(), *settings["flags"].split()]
    argv += ["--max_steps", str(last), "--output_dir", str(folder / "run")]
    argv += ["--model_name_or_path", str(model), "--dataset_name", str(model / "images")]
    allow_any_torchvision()
    processor = Processor(model)
    tokens = processor.count_tokens(PROBLEM, [(side, side)])
    of_image = processor.image_tokens(side, side)
    report("work", {"prompt": tokens, "image": of_image})
    if why := too_large(model, argv, tokens, of_image):
        report("skipped", why)
        return
    save_nothing()
    endless_and_by_chance(train_cls)
    decoding, waits, said = Decoding(), Waits(last), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = train_cls.main(argv)
    plan = re.findall(r"^  (\w+) +([\d.]+): ", said.getvalue(), re.MULTILINE)
    report("plan", {phase: float(gb) for phase, gb in plan})
    report("graphs", "sampling  with CUDA graphs" in said.getvalue())
    if code:
        raise RuntimeError(said.getvalue()[-1000:])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    measured(lines[1:-1], report)
    report("decode", statistics.median(decoding.seconds[1:-1]))
    report("waits", waits.counts)
    if device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        report("used", (total - free) / 1e9)


def too_large(folder: Path, argv: list[str], tokens: int, of_image: int) -> str | None:
    """Why a run does not fit the device, by its plan without CUDA graphs."""
    if device().type == "cpu":
        return None
    config, _ = parse_config(train_cls.Config, argv)
    kernel = choose_implementation("auto", device(), torch.bfloat16)
    facts = Facts(read_config(folder), tokens, of_image, True, 1, "cuda", kernel)
    needed = peak_gb(config, facts)
    present = torch.cuda.get_device_properties(device()).total_memory / 1e9
    if needed > USABLE * present:
        return f"the plan needs {needed:.0f} GB, the device has {present:.0f}"
    return None


def measured(lines: list[dict], report) -> None:
    """Reports what the metrics of some steps say."""
    for what, name in MEASURED.items():
        of_phase = {phase: [line.get(name.format(phase)) for line in lines] for phase in PHASES}
        unite = statistics.median if what == "seconds" else max
        report(what, {phase: unite(v) for phase, v in of_phase.items() if None not in v})
    report("step", statistics.median(line["step_time"] for line in lines))
    names = [name for name in lines[0] if name.startswith("perf/")]
    report("perf", {name: statistics.median(line[name] for line in lines) for name in names})
    report("drift", max(line["sampling/logp_difference_max"] for line in lines))


def save_nothing() -> None:
    """Runs end without final/ and report.html, which take a disk's time and no device's."""
    grpo.run.run.save_final = lambda *_: None
    grpo.run.run.write_report = lambda folder: ""


class Decoding:
    """Seconds of each rollout from the end of its prefill on."""

    def __init__(self):
        self.seconds: list[float] = []
        generate, prefill = grpo.rollout.generate, models.decoding.generate.prefill

        def timed_prefill(*arguments):
            hidden = prefill(*arguments)
            synchronize()
            self.began = time.perf_counter()
            return hidden

        def timed(*arguments):
            drawn = generate(*arguments)
            synchronize()
            self.seconds.append(time.perf_counter() - self.began)
            return drawn

        grpo.rollout.generate, models.decoding.generate.prefill = timed, timed_prefill


class Waits:
    """counts: how often the host waited for the device in each phase of step `last`, as torch
    reports it, or as the emulated device counts it."""

    def __init__(self, last: int):
        self.counts: dict[str, int] = {}
        self.last, self.name = last, "begin"
        self.emulated = getattr(torch, "_rehearsal", ({}, Counter()))[1]
        begin, phase = Run.begin, Run.phase

        def begins(run, step, *arguments):
            if step == last:
                self.emulated.clear()  # of earlier steps
                self.listen()
            return begin(run, step, *arguments)

        def enters(run, name, *arguments):
            phase(run, name, *arguments)
            if run.clock.step == last:
                self.enter(name)

        Run.begin, Run.phase = begins, enters

    def listen(self) -> None:
        if device().type != "cuda":
            return

        def heard(message, *_, **__):
            if SYNCHRONIZES in str(message):
                self.add(1)

        warnings.simplefilter("always")
        warnings.showwarning = heard
        torch.cuda.set_sync_debug_mode("warn")

    def enter(self, name: str) -> None:
        self.add(self.emulated.total())
        self.emulated.clear()
        self.name = name

    def add(self, count: int) -> None:
        if count:
            self.counts[self.name] = self.counts.get(self.name, 0) + count


# ---- the demo -----------------------------------------------------------------------------------


def rewards(settings: dict, report) -> None:
    """Reports, for each of settings["runs"] (name -> flags), the mean rewards, gradient norms and
    seconds of its steps; on as many ranks as there are. settings["script"]: whose demo it is."""
    script, folder = importlib.import_module(settings["script"]), Path(settings["folder"])
    save_nothing()
    allow_any_torchvision()
    for name, flags in settings["runs"].items():
        output = folder / settings["name"] / name
        argv = ["--eval_samples", "1", "--save_steps", "0", *flags.split()]
        if code := script.main([*argv, "--output_dir", str(output)]):
            raise RuntimeError(f"{name}: exit code {code}")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
        lines = [line for line in lines if "reward" in line]
        numbers = {key: [line[key] for line in lines] for key in ("reward", "grad_norm")}
        report(name, numbers | {"seconds": [line["step_time"] for line in lines]})
