"""Does a change keep the numbers? `python -m benchmarks.same_numbers REVISION [--cases NAME ...]`

Trains the demos with the same flags from another revision of this repository and from this working
tree, and compares what comes out: completions.jsonl and final/model.safetensors byte for byte,
metrics.jsonl without times, memory and new metrics (lines of one step merged), and the names of the
files.
Prints one line for each case with the SHA-256 of all three; exits with 1 if any case differs.

One thread per process, so that the sums are the same whatever else the machine does. The runs of
REVISION are kept under --out and used again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SHORT = "--max_steps 3 --prompts_per_step 2 --num_generations 4 --eval_samples 6"
SHORT += " --max_completion_length 40"
ALL_ON = "--num_iterations 2 --dynamic_sampling true --freeze_vision true"

# name: (ranks, script, flags)
CASES = {
    "plain": (1, "train_cls.py", SHORT),
    "detection": (1, "train_det.py", SHORT + " --max_completion_length 96"),
    "two updates, small packs": (
        1,
        "train_cls.py",
        SHORT + " --num_iterations 2 --tokens_per_pack 120 --learning_rate 5e-3 --warmup_ratio 0",
    ),
    "dynamic": (
        1,
        "train_cls.py",
        SHORT + " --dynamic_sampling true --max_sampling_rounds 6 --seed 3",
    ),
    "no reference": (1, "train_cls.py", SHORT + " --beta 0 --prompts_per_step 4 --seed 1"),
    "frozen": (1, "train_cls.py", SHORT + " --freeze_vision true --num_iterations 2"),
    "masked, buffer": (
        1,
        "train_cls.py",
        SHORT + " --mask_truncated_completions true --max_completion_length 28 --overlong_buffer 8"
        " --num_generations 8 --loss_type grpo --kl_estimator k2 --scale_rewards batch",
    ),
    "bf16, temperature": (
        1,
        "train_cls.py",
        SHORT + " --bf16 true --temperature 1.3 --top_k 20 --eval_steps 1",
    ),
    "weights": (
        1,
        "train_cls.py",
        SHORT + " --reward_weights 1 0.25 --gradient_checkpointing true --loss_type dr_grpo"
        " --scale_rewards none --kl_estimator k1",
    ),
    "GSPO, entropy": (
        1,
        "train_cls.py",
        SHORT + " --num_iterations 2 --importance_sampling_level sequence --loss_type grpo"
        " --epsilon 3e-4 --entropy_coef 0.01 --tokens_per_pack 120 --learning_rate 1e-3",
    ),
    "SAPO, top entropy": (
        2,
        "train_cls.py",
        SHORT + " --num_iterations 2 --loss_type sapo --top_entropy_quantile 0.3 --beta 0"
        " --multi_objective_aggregation normalize_then_sum --learning_rate 1e-3",
    ),
    "two ranks, dynamic": (
        2,
        "train_cls.py",
        SHORT + " --dynamic_sampling true --num_iterations 2 --tokens_per_pack 120 --eval_steps 1"
        " --save_steps 1",
    ),
    "two copies, frozen": (
        2,
        "train_cls.py",
        SHORT + " --shard_size 1 --freeze_vision true --num_iterations 2",
    ),
    "one prompt for two": (2, "train_cls.py", SHORT + " --prompts_per_step 1"),
    "two ranks, beta 0": (2, "train_cls.py", SHORT + " --beta 0 --prompts_per_step 4 --seed 1"),
}
CASES |= {
    f"20 steps, {script[6:9]}, {ranks} rank{'s' * (ranks > 1)}{', all on' * bool(flags)}": (
        ranks,
        script,
        f"--max_steps 20 {flags}",
    )
    for script in ("train_cls.py", "train_det.py")
    for ranks in (1, 2)
    for flags in ("", ALL_ON)
}


def train(house: Path, folder: Path, ranks: int, script: str, flags: str) -> None:
    """Trains with the sources in `house` into `folder`, unless that run exists already."""
    if (folder / "final").exists():
        return
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(house)}
    command = [*start, script, *flags.split(), "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def metrics(folder: Path, names: set[str] | None = None) -> dict[int, dict]:
    """Step -> its metrics, without times and memory. names: those to keep, by default all."""
    steps: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        kept = {k: v for k, v in numbers.items() if not k.startswith(("time/", "memory/"))}
        kept.pop("step_time", None)
        kept = {k: v for k, v in kept.items() if names is None or k in names}
        steps.setdefault(numbers["step"], {}).update(kept)
    return steps


def digests(folder: Path, names: set[str]) -> dict[str, str]:
    """SHA-256 of each thing that must stay the same; the names of the files are one of them.

    names: of the metrics that are compared.
    """
    contents = {
        "completions": (folder / "completions.jsonl").read_bytes(),
        "weights": (folder / "final" / "model.safetensors").read_bytes(),
        "metrics": json.dumps(metrics(folder, names), sort_keys=True).encode(),
    }
    found = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in contents.items()}
    return found | {"files": " ".join(sorted(path.name for path in folder.iterdir()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("/tmp/same_numbers"))
    arguments = parser.parse_args()

    ask = ["git", "-C", str(HERE), "rev-parse", "--short=12"]
    commit = subprocess.check_output([*ask, arguments.revision + "^{commit}"], text=True).strip()
    old = arguments.out / commit / "checkout"
    if not old.exists():
        clone = ["git", "clone", "--quiet", "--no-checkout", str(HERE), str(old)]
        subprocess.run(clone, check=True)
        subprocess.run(["git", "-C", str(old), "checkout", "--quiet", commit], check=True)
    differ = False
    for name in arguments.cases:
        slug = name.replace(",", "").replace(" ", "_")
        before, after = arguments.out / commit / slug, arguments.out / "this" / slug
        subprocess.run(["rm", "-rf", str(after)], check=True)
        train(old, before, *CASES[name])
        train(HERE, after, *CASES[name])
        names = {name for numbers in metrics(before).values() for name in numbers}
        more = {name for numbers in metrics(after).values() for name in numbers} - names
        was, now = digests(before, names), digests(after, names)
        same = was == now
        differ |= not same
        shown = " ".join(f"{what} {now[what]}" for what in ("completions", "weights", "metrics"))
        print(f"{'same  ' if same else 'DIFFER'} {name:28} {shown}", flush=True)
        if more:
            print(f"       new metrics, not compared: {', '.join(sorted(more))}")
        for what in was:
            if was[what] != now[what]:
                print(f"       {what}: {was[what]} -> {now[what]}")
        if was["metrics"] != now["metrics"]:
            old_steps, new_steps = metrics(before, names), metrics(after, names)
            for step in sorted(old_steps.keys() | new_steps.keys()):
                a, b = old_steps.get(step, {}), new_steps.get(step, {})
                changed = {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys()}
                changed = {k: pair for k, pair in changed.items() if pair[0] != pair[1]}
                if changed:
                    print(f"       first at step {step}: {dict(sorted(changed.items())[:4])}")
                    break
    sys.exit(differ)


if __name__ == "__main__":
    main()
