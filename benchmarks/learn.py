"""What a demo learns here and in TRL's GRPOTrainer, side by side: held-out score by seconds and steps.

    python benchmarks/learn.py --seeds 0 1 2 --json FILE --plot FILE.svg
    python benchmarks/learn.py --read FILE --plot FILE.svg

Both train the demo's checkpoint on its rows with its flags (data/demo_cls/demo.yaml), in float32 on
the CPU: the peer is given every number that could matter, and rewards are the script's own score().
Each trainer runs in a process of its own, in turns. Seconds are the steps' alone, without loading,
evaluation and files. The held-out score is the script's own evaluate(), for the peer on a model of
ours that is given the peer's weights.

Asserted in each run: the peer is fed our token ids and pixels, its texts are ours, its stop tokens
and the tokens that it never draws are ours, its learning rate is ours at each step, and before the
first step both score the same. What differs: random numbers, the order of prompts, and that the
peer's log-probs include the tokens that are never drawn. `pip install -e ".[bench]"`.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import in_own_process, stand_in_for_torchvision
from benchmarks.svg import Curve, Panel, draw

# script, what is measured on held-out rows, and when that is called good
TASKS = {"cls": ("train_cls", "eval/accuracy", 0.9), "det": ("train_det", "eval/iou", 0.7)}
KINDS = {"ours": "here", "peer": "TRL"}
NAMES = (  # of each step; with the mean of each reward term
    *("reward", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "loss", "learning_rate"),
    *("completions/mean_length", "completions/clipped_ratio"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean"),
)


def flags(settings: dict) -> list[str]:
    """What the script is told besides the demo's own flags."""
    line = f"--seed {settings['seed']} --max_steps {settings['steps']} --bf16 false "
    line += f"--eval_steps {settings['every']} --report_steps 0 "  # no report beside the training
    line += f"--eval_samples {settings['held_out']} " if settings["held_out"] else ""
    return [*line.split(), "--output_dir", str(Path(settings["folder"]) / f"run-{os.getpid()}")]


def kept(line: dict) -> dict:
    """What is recorded of a step's line of metrics; both trainers use the same names."""
    terms = [name for name in line if re.fullmatch(r"rewards/\w+/mean", name)]
    return {name: line[name] for name in (*NAMES, *terms)}


# ---- ours ---------------------------------------------------------------------------------------


def ours(settings: dict) -> dict:
    """The script's own main(), as it is."""
    script, argv = importlib.import_module(settings["script"]), flags(settings)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = script.main(argv)
    assert code == 0, said.getvalue()
    lines = [json.loads(line) for line in (Path(argv[-1]) / "metrics.jsonl").open()]
    steps = [line for line in lines if "step_time" in line]
    held_out = [line for line in lines if settings["score"] in line]
    return {
        "seconds": [line["step_time"] for line in steps],
        "steps": [kept(line) for line in steps],
        "held_out": [{k: line[k] for k in line if re.match("step$|eval/", k)} for line in held_out],
    }


# ---- the peer -----------------------------------------------------------------------------------


class HeldOut:
    """The peer's model measured by the script's own evaluate(), for which this stands in as the
    run. The weights go into a model of ours."""

    step = 0

    def __init__(self, script, config, ranks, folder: Path, rows, processor, task, weights):
        import torch

        from models.attention import choose_implementation
        from models.generate import Sampling
        from models.load import load_model

        self.script, self.config, self.ranks, self.found = script, config, ranks, {}
        kernel = choose_implementation(config.attn_implementation, ranks.device, torch.float32)
        self.model = load_model(folder, torch.float32, ranks.device, kernel)
        self.model.suppressed_ids = torch.tensor(processor.suppressed_ids)
        self.model.frozen_vision = False
        sampling = Sampling.of(config, processor.stop_ids)
        self.rest = (rows, sampling, processor, task, weights)

    def phase(self, name: str) -> None:
        pass

    def report_evaluation(self, records, drawn, more=None, files=None) -> None:
        from grpo.run.metrics import held_out_metrics

        self.found = held_out_metrics(records) | (more or {})

    def measure(self, peer) -> dict:
        """eval/<term> and so on for transformers' model `peer`."""
        from models.families import parameter_name

        own = dict(self.model.named_parameters())
        for key, tensor in peer.state_dict().items():
            if (name := parameter_name(key)) in own:
                own.pop(name).data.copy_(tensor)
        assert not own, f"the peer lacks {', '.join(own)}"
        self.script.evaluate(self, self.model, *self.rest)
        return self.found


def peer(settings: dict) -> dict:
    """TRL's GRPOTrainer with the demo's flags."""
    import torch
    from datasets import Dataset
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from data.check import load_splits
    from data.images import open_image
    from grpo.ranks import start
    from grpo.run.checks import named_weights
    from grpo.run.flags import parse_config
    from models.load import find_folder
    from models.processor import Processor
    from rewards.parse import ideal_completion

    # What the script's train() does before it loads a weight.
    script, argv = importlib.import_module(settings["script"]), flags(settings)
    config, _ = parse_config(script.Config, argv, script.DEMO)
    ranks, folder = start(config.timeout), find_folder(config.model_name_or_path)
    own = Processor(folder, config.min_pixels, config.max_pixels)
    rows, held_out = load_splits(config, own, ranks.progress)
    task = script.read_task(config, (rows, held_out), own, argv)
    weights = script.score(ideal_completion(task.solution(rows[0])), rows[0], task)
    weights = named_weights(weights, config)
    held_out = held_out.first(config.eval_samples)
    measure = HeldOut(script, config, ranks, folder, held_out, own, task, weights).measure
    # What the peer has no flag for, or would count otherwise.
    assert config.num_iterations == 1 and config.overlong_buffer == 0 and config.beta > 0
    assert not (config.dynamic_sampling or config.use_peft or config.freeze_vision)
    assert config.kl_estimator == "k3" and config.optim == "adamw_torch"

    @functools.cache
    def scored(text: str, number: int) -> dict[str, float]:
        return script.score(text, rows[number], task)

    fed, latest = {}, {}  # what the model was given, and what rewards were, in the latest step

    def reward(term: str):
        def of_completions(completions, completion_ids, row, **_):
            texts = [completion[0]["content"] for completion in completions]
            latest.update(texts=texts, ids=completion_ids, rows=row)
            return [scored(text, number)[term] for text, number in zip(texts, row, strict=True)]

        of_completions.__name__ = term
        return of_completions

    def check_inputs() -> None:
        prompts = [rows[number].prompt(own) for number in latest["rows"]]
        for ids, mask, prompt in zip(fed["input_ids"], fed["attention_mask"], prompts, strict=True):
            assert ids[mask.bool()].tolist() == prompt.input_ids.tolist(), "other token ids"
        for name in ("pixel_values", "image_grid_thw"):
            expected = torch.cat([getattr(prompt, name) for prompt in prompts])
            torch.testing.assert_close(fed[name], expected, atol=1e-5, rtol=0)

    seconds, steps, scores = [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            scores.append({"step": 0, **measure(model)})

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, _, state, control, model, **__):
            seconds.append(time.perf_counter() - self.started)
            assert latest["texts"] == [own.completion_text(ids) for ids in latest["ids"]]
            assert not {*own.suppressed_ids} & {*itertools.chain(*latest["ids"])}
            if (step := state.global_step) == 1:
                check_inputs()
            if step == config.max_steps or (settings["every"] and step % settings["every"] == 0):
                scores.append({"step": step, **measure(model)})

        def on_log(self, args, state, control, logs, **_):
            if "grad_norm" in logs:
                steps.append(kept(logs))

    processor = AutoProcessor.from_pretrained(folder)
    bounds = {"shortest_edge": own.min_pixels, "longest_edge": own.max_pixels}
    processor.image_processor.size = bounds
    same = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps")
    same += ("beta", "loss_type", "scale_rewards", "epsilon", "epsilon_high", "num_iterations")
    same += ("temperature", "top_p", "top_k", "num_generations", "max_completion_length", "seed")
    same += ("gradient_checkpointing", "mask_truncated_completions")
    arguments = GRPOConfig(
        **{name: getattr(config, name) for name in same},
        output_dir=argv[-1],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=config.prompts_per_step * config.num_generations,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps, rounded up
        use_bias_correction_kl=False,  # on by default, and another gradient: reverse KL
        reward_weights=list(weights.values()),
        optim="adamw_torch_fused",
        generation_kwargs={"suppress_tokens": own.suppressed_ids},
        model_init_kwargs={"dtype": torch.float32},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (
        0.9,
        0.999,
        1e-8,
    )
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=[reward(term) for term in weights],
        args=arguments,
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": row.problem}] for row in rows],
                "image": [open_image(row.images[0]) for row in rows],
                "row": list(range(len(rows))),
            }
        ),
        processing_class=processor,
        callbacks=[Clock()],
    )
    drawn = trainer.generation_config
    assert sorted(trainer.eos_token_ids) == sorted(drawn.eos_token_id) == own.stop_ids
    assert drawn.do_sample and not drawn.min_p and drawn.repetition_penalty == 1
    for model in (trainer.model, trainer.ref_model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    generate = trainer.model.generate

    def noted(**inputs):
        fed.update(inputs)
        return generate(**inputs)

    trainer.model.generate = noted
    trainer.train()
    return {"seconds": seconds, "steps": steps, "held_out": scores}


# ---- the comparison -----------------------------------------------------------------------------


def fastest(kind: str, settings: dict, candidates: list[int]) -> int:
    """The number of threads with which this trainer's step is fastest, by four short steps."""
    trial = settings | {"kind": kind, "steps": 5, "every": 0, "held_out": 4}
    times = {
        threads: statistics.median(in_own_process(__file__, trial, threads)["seconds"][1:])
        for threads in (candidates if len(candidates) > 1 else [])
    }
    return min(times, key=times.get, default=candidates[0])


def train_all(options: argparse.Namespace) -> dict:
    """Trains with each seed, both trainers in turns; what is recorded so far is on the disk."""
    from importlib.metadata import version

    script, score, _ = TASKS[options.task]
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    report = {"task": options.task, "score": score, "versions": versions, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: getattr(options, name) for name in ("task", "steps", "every", "held_out")}
        settings |= {"script": script, "score": score, "folder": folder, "seed": options.seeds[0]}
        candidates = {"ours": options.threads, "peer": options.peer_threads or options.threads}
        threads = {kind: fastest(kind, settings, candidates[kind]) for kind in options.only}
        for seed in options.seeds:
            for kind in options.only:
                load = os.getloadavg()[0]
                asked = settings | {"kind": kind, "seed": seed}
                result = in_own_process(__file__, asked, threads[kind])
                facts = {"kind": kind, "seed": seed, "threads": threads[kind], "load": load}
                report["runs"].append(facts | recorded(result))
                last = report["runs"][-1]["held_out"][-1]
                spent = f"{last['seconds']:.1f} s, {score} {last[score]:.3f}"
                print(f"{KINDS[kind]:5} seed {seed}, {threads[kind]} threads: {spent}", flush=True)
                if options.json:
                    options.json.write_text(compact(report))
    check_same_start(report["runs"], score)
    return report


def recorded(result: dict) -> dict:
    """A run as it is written down: columns, and the seconds at which each evaluation stands."""
    clock = [0.0, *itertools.accumulate(result["seconds"])]
    held_out = [{**line, "seconds": clock[line["step"]]} for line in result["held_out"]]
    names = result["steps"][0]
    columns = {name: [line[name] for line in result["steps"]] for name in names}
    return {"held_out": held_out, "columns": {"step_time": result["seconds"], **columns}}


def check_same_start(runs: list[dict], score: str) -> None:
    """Both scored the same before the first step, and had the same learning rate at each."""
    for run in runs:
        assert run["held_out"][0] == runs[0]["held_out"][0], "not the same checkpoint"
        pairs = zip(*(r["columns"]["learning_rate"] for r in (run, runs[0])), strict=True)
        assert all(math.isclose(a, b, abs_tol=1e-12) for a, b in pairs), "not the same schedule"


def compact(report: dict) -> str:
    """JSON with each list of numbers on one line, to six digits."""
    text = json.dumps(report, indent=1)
    text = re.sub(r"-?\d+\.\d{5,}(e-?\d+)?", lambda found: f"{float(found[0]):.6g}", text)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def reached(run: dict, score: str, target: float, by: str = "seconds") -> float | None:
    """Seconds (or steps) at which a run's score first was `target`, on a line between two
    evaluations; None if it never was."""
    before = None
    for point in run["held_out"]:
        if point[score] >= target:
            if before is None:
                return point[by]
            share = (target - before[score]) / (point[score] - before[score])
            return before[by] + share * (point[by] - before[by])
        before = point
    return None


def of(report: dict, kind: str) -> list[dict]:
    return [run for run in report["runs"] if run["kind"] == kind]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def show(report: dict) -> None:
    """Prints how soon the target was reached, the score by step, and the curves by tenths."""
    score, (_, _, target) = report["score"], TASKS[report["task"]]
    kinds = [kind for kind in KINDS if of(report, kind)]
    for by in ("seconds", "step"):
        medians = {}
        for kind in kinds:
            found = [reached(run, score, target, by) for run in of(report, kind)]
            told = ", ".join("never" if x is None else f"{x:.1f}" for x in found)
            medians[kind] = statistics.median(math.inf if x is None else x for x in found)
            print(f"{KINDS[kind]:5} {score} {target} after {told} {by}, median {medians[kind]:.1f}")
        if len(kinds) == 2 and math.isfinite(sum(medians.values())):
            print(f"TRL's {by} over ours: {medians['peer'] / medians['ours']:.2f}")
    for kind in kinds:
        times = [t for run in of(report, kind) for t in run["columns"]["step_time"][1:]]
        print(f"{KINDS[kind]:5} {statistics.median(times):.3f} s a step, median")
    print(f"\n{score} by step, mean (least to most) over seeds")
    for i, point in enumerate(report["runs"][0]["held_out"]):
        row = [spread([run["held_out"][i][score] for run in of(report, kind)]) for kind in kinds]
        print(
            f"{point['step']:5}  "
            + "  ".join(f"{KINDS[k]} {t}" for k, t in zip(kinds, row, strict=True))
        )
    steps = len(report["runs"][0]["columns"]["step_time"])
    edges = sorted({round(i * steps / 10) for i in range(11)})
    print("\nmean over seeds, by tenth of the steps: " + " / ".join(KINDS[kind] for kind in kinds))
    for name in report["runs"][0]["columns"]:
        cells = []
        for part in itertools.starmap(slice, itertools.pairwise(edges)):
            values = [[v for r in of(report, k) for v in r["columns"][name][part]] for k in kinds]
            cells.append("/".join(f"{statistics.mean(v):.3g}" for v in values))
        print(f"{name:28}" + "  ".join(f"{cell:>13}" for cell in cells))


def plot(report: dict, file: Path) -> None:
    """Score by seconds and by steps: a thin line for each seed, a thick one for the median."""
    score, colors = report["score"], {"ours": "#0072b2", "peer": "#d55e00"}
    panels = []
    for by, title in (("seconds", "seconds, training alone"), ("step", "steps")):
        curves = []
        for kind in (kind for kind in KINDS if of(report, kind)):
            runs = [run["held_out"] for run in of(report, kind)]
            lines = [[(p[by], p[score]) for p in run] for run in runs]
            middle = [
                tuple(statistics.median(p[axis] for p in points) for axis in (0, 1))
                for points in zip(*lines, strict=True)
            ]
            curves += [Curve(line, colors[kind], 1) for line in lines]
            curves.append(Curve(middle, colors[kind], 3, KINDS[kind]))
        panels.append(Panel(title, f"held-out {score.removeprefix('eval/')}", curves))
    file.write_text(draw(panels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="cls")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps from evaluation to evaluation")
    parser.add_argument("--held_out", type=int, help="first N held-out rows only")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="of several the fastest is taken"
    )
    parser.add_argument("--peer_threads", type=int, nargs="+", help="by default as --threads")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--json", type=Path, help="written after each run")
    parser.add_argument("--read", type=Path, help="a file that --json wrote: nothing is trained")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        settings = json.loads(options.worker)
        stand_in_for_torchvision()
        print("\n" + json.dumps((ours if settings["kind"] == "ours" else peer)(settings)))
        return

    report = json.loads(options.read.read_text()) if options.read else train_all(options)
    show(report)
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
