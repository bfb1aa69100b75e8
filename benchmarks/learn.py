"""What a demo learns here and in TRL's GRPOTrainer: held-out score by seconds and by steps.

    python benchmarks/learn.py --seeds 0 1 2 --json FILE --plot FILE.svg
    python benchmarks/learn.py --prompts 32 --num_minibatches 4 --steps 25 --every 1 --json FILE
    python benchmarks/learn.py --read FILE --plot FILE.svg

Both train the demo's checkpoint on its rows with its flags (data/demo_cls/demo.yaml), in float32 on
the CPU. The peer, TRL, gets every setting that matters, and its rewards are the script's score().
Each trainer runs in processes of its own, in turns. Seconds are those of steps, without loading,
evaluation and files. The held-out score is the script's evaluate(); for the peer it is computed on
a model of ours with the peer's weights.

Each run asserts that the peer gets our token ids and pixels and returns our texts, stops at our
stop tokens and never samples what is never sampled here, has our learning rate at each step and our
score before the first. Its first 8 updates are repeated here on its completions, and must give its
losses, KLs, entropies, gradient norms and weights. What differs: random numbers, the order of
prompts, and that the peer's log-probs include the tokens that are never sampled.

With --num_minibatches N a step is a rollout and its N updates here; the peer has
steps_per_generation N, and its N steps are taken together. Two things differ more, and the
repetition does as the peer does: it deals the completions of a rollout singly to its updates, so
that groups are torn apart, here groups stay whole; and with the demos' loss, dapo, it divides each
update by the rollout's mean number of tokens an update, here it is the update's own.
docs/performance.md says how to install the peer.
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
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.curves import KINDS, plot, show
from benchmarks.step import in_own_process, stand_in_for_torchvision

# script, what is measured on held-out rows, and when that is called good
TASKS = {"cls": ("train_cls", "eval/accuracy", 0.9), "det": ("train_det", "eval/iou", 0.7)}
NAMES = (  # recorded of each step, with the mean of each reward term
    *("reward", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "loss", "learning_rate"),
    *("completions/mean_length", "completions/clipped_ratio"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean"),
)
COMPARED = 8  # of the peer's updates are made here too


def flags(settings: dict) -> list[str]:
    """The flags that the script gets besides the demo's own."""
    line = f"--seed {settings['seed']} --eval_steps {settings['every']} --bf16 false "
    line += f"--max_steps {settings['steps']} " if settings["steps"] else ""
    line += f"--eval_samples {settings['held_out']} " if settings["held_out"] else ""
    line += f"--prompts_per_step {settings['prompts']} " if settings["prompts"] else ""
    if settings["num_minibatches"] > 1:
        line += f"--num_minibatches {settings['num_minibatches']} "
    return [*line.split(), "--output_dir", str(Path(settings["folder"]) / f"run-{os.getpid()}")]


def kept(line: dict) -> dict:
    """The metrics of a step that are recorded; both trainers have the same names."""
    terms = [name for name in line if re.fullmatch(r"rewards/\w+/mean", name)]
    return {name: line[name] for name in (*NAMES, *terms)}


def together(updates: list[dict]) -> dict:
    """A step's metrics from those of its updates: the mean over the updates that have it, and the
    last learning rate. Those about the rollout stand in the first."""
    names = kept(updates[0])
    means = {
        name: statistics.fmean(each[name] for each in updates if name in each) for name in names
    }
    return means | {"learning_rate": updates[-1]["learning_rate"]}


# ---- ours ---------------------------------------------------------------------------------------


def ours(settings: dict) -> dict:
    """Trains by the script's own main()."""
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
        "held_out": held_out,
    }


# ---- the peer -----------------------------------------------------------------------------------


def peer(settings: dict) -> dict:
    """TRL's GRPOTrainer with the demo's flags."""
    import torch
    import trl.trainer.grpo_trainer as internals
    from datasets import Dataset
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.twin import Twin
    from data.images import open_image
    from grpo.engine.adamw import BETA1, BETA2, EPS

    twin = Twin(settings["script"], flags(settings))
    config, own = twin.config, twin.processor
    # What the peer has no flag for, or would count otherwise.
    assert config.num_iterations == 1 and config.overlong_buffer == 0 and config.beta > 0
    assert config.kl_estimator == "k3" and config.optim == "adamw_torch"
    assert not (config.dynamic_sampling or config.use_peft or config.freeze_vision)
    parts, samples = config.num_minibatches, config.prompts_per_step * config.num_generations
    assert samples % parts == 0
    scored = functools.cache(twin.score)
    seconds, updates, held_out = [], [], []  # seconds and metrics of each update

    def reward(term: str):
        def of_completions(completions, completion_ids, row, **_):
            texts = [completion[0]["content"] for completion in completions]
            twin.latest.update(texts=texts, ids=completion_ids, rows=row)
            return [scored(text, number)[term] for text, number in zip(texts, row, strict=True)]

        of_completions.__name__ = term  # the peer's name for it
        return of_completions

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            held_out.append({"step": 0, **twin.measure(model)})

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, model, **_):
            seconds.append(time.perf_counter() - self.started)
            update, step = state.global_step, math.ceil(state.global_step / parts)
            place, every = (update - 1) % parts, settings["every"]
            if place == 0:  # it has sampled
                twin.check_texts()
            if update == 1:
                twin.check_inputs()
            self.made_here = {}
            if update <= COMPARED:
                if place == 0:
                    twin.take_rollout()
                numbers = trainer._buffered_inputs[place]["number"].tolist()
                self.made_here = twin.repeat(step, place, numbers)
            due = step == config.max_steps or (every and step % every == 0)
            due = due and place == parts - 1
            if update == COMPARED or (due and update < COMPARED):
                twin.check_weights(model)
            if due:
                held_out.append({"step": step, **twin.measure(model)})

        def on_log(self, args, state, control, logs, **_):
            if "grad_norm" in logs:
                updates.append(dict(logs))
                for name, value in self.made_here.items():
                    pair = value, logs[name]
                    assert math.isclose(*pair, rel_tol=1e-3, abs_tol=1e-6), f"{name} is {pair}"

    processor = AutoProcessor.from_pretrained(twin.folder, padding_side="left")
    bounds = {"shortest_edge": own.min_pixels, "longest_edge": own.max_pixels}
    processor.image_processor.size = bounds
    same = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed")
    same += ("beta", "loss_type", "scale_rewards", "epsilon", "epsilon_high", "num_iterations")
    same += ("temperature", "top_p", "top_k", "num_generations", "max_completion_length")
    same += ("gradient_checkpointing", "mask_truncated_completions")
    arguments = GRPOConfig(
        **{name: getattr(config, name) for name in same},
        output_dir=config.output_dir,
        use_cpu=True,
        bf16=False,
        max_steps=parts * config.max_steps,
        per_device_train_batch_size=samples // parts,
        steps_per_generation=parts,
        gradient_accumulation_steps=1,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps, rounded up
        use_bias_correction_kl=False,  # on by default, and another gradient than the paper's
        reward_weights=list(twin.task.reward_weights.values()),
        optim="adamw_torch_fused",
        generation_kwargs={"suppress_tokens": own.suppressed_ids},
        model_init_kwargs={"dtype": torch.float32},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adam = (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon)
    assert adam == (BETA1, BETA2, EPS)
    columns = {
        "prompt": [[{"role": "user", "content": row.problem}] for row in twin.rows],
        "image": [open_image(row.images[0]) for row in twin.rows],
        "row": list(range(len(twin.rows))),
    }
    trainer = GRPOTrainer(
        model=str(twin.folder),
        reward_funcs=[reward(term) for term in twin.task.reward_weights],
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
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
        twin.latest["fed"] = inputs
        return generate(**inputs)

    trainer.model.generate = noted
    shuffled = internals.shuffle_sequence_dict

    def numbered(batch):  # before it is dealt to updates: which completion is which
        return shuffled(batch | {"number": torch.arange(samples)})

    internals.shuffle_sequence_dict = numbered
    trainer.train()
    firsts = range(0, len(updates), parts)
    return {
        "seconds": [sum(seconds[first : first + parts]) for first in firsts],
        "steps": [together(updates[first : first + parts]) for first in firsts],
        "held_out": held_out,
    }


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
    """Trains with each seed, both trainers in turns; writes the file after each run."""
    script, score, target = TASKS[options.task]
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    report = {"task": options.task, "score": score, "target": target, "versions": versions}
    report |= {"cores": os.cpu_count(), "runs": []}
    report |= {name: getattr(options, name) for name in ("prompts", "num_minibatches")}
    with tempfile.TemporaryDirectory() as folder:
        names = ("steps", "every", "held_out", "prompts", "num_minibatches")
        settings = {name: getattr(options, name) for name in names}
        settings |= {"script": script, "score": score, "folder": folder, "seed": options.seeds[0]}
        candidates = {"ours": options.threads, "peer": options.peer_threads or options.threads}
        threads = {kind: fastest(kind, settings, candidates[kind]) for kind in options.only}
        for seed, kind in itertools.product(options.seeds, options.only):
            facts = {"kind": kind, "seed": seed, "threads": threads[kind]}
            facts |= {"load": os.getloadavg()[0]}  # what else the machine did
            result = in_own_process(__file__, settings | facts, threads[kind])
            report["runs"].append(facts | recorded(result))
            check_same(report["runs"][-1], report["runs"][0], score)
            last = report["runs"][-1]["held_out"][-1]
            spent = f"{last['seconds']:.1f} s, {score} {last[score]:.3f}"
            print(f"{KINDS[kind]:5}seed {seed}, threads {threads[kind]}: {spent}", flush=True)
            if options.json:
                options.json.write_text(compact(report))
    return report


def recorded(result: dict) -> dict:
    """A run as the file has it: a list for each metric, and each evaluation with its seconds."""
    clock = [0.0, *itertools.accumulate(result["seconds"])]
    held_out = [
        {"step": line["step"], "seconds": clock[line["step"]]}
        | {name: line[name] for name in line if re.fullmatch("eval/[^/]+", name)}
        for line in result["held_out"]
    ]
    names = result["steps"][0]
    columns = {name: [line[name] for line in result["steps"]] for name in names}
    return {"held_out": held_out, "columns": {"step_time": result["seconds"], **columns}}


def check_same(run: dict, first: dict, score: str) -> None:
    """Both scored the same before the first step (but for ties that other threads round otherwise),
    and had the same learning rate in each."""
    before = [each["held_out"][0][score] for each in (run, first)]
    assert math.isclose(*before, abs_tol=0.01), f"not the same checkpoint: {before}"
    rates = zip(*(each["columns"]["learning_rate"] for each in (run, first)), strict=True)
    assert all(math.isclose(*pair, abs_tol=1e-12) for pair in rates), "not the same schedule"


def compact(report: dict) -> str:
    """JSON with each list of numbers on one line, to six digits."""
    text = json.dumps(report, indent=1)
    text = re.sub(r"-?\d+\.\d{5,}(e-?\d+)?", lambda found: f"{float(found[0]):.6g}", text)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="cls")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="by default as many as the demo has")
    parser.add_argument("--every", type=int, default=10, help="steps from evaluation to evaluation")
    parser.add_argument("--prompts", type=int, help="of a step, by default as the demo has")
    parser.add_argument("--num_minibatches", type=int, default=1, help="updates of a step")
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
