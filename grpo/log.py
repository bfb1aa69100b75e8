"""The run folder's files, the phase clock and the trackers.

metrics.jsonl has one object per step, completions.jsonl one per completion; a resumed run drops
the lines after its checkpoint, so that no step stands twice. docs/metrics.md defines every name.
"""

import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import re
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from grpo.checkpoint import checkpoints
from grpo.dist import Ranks


def check_output(path: Path, resuming: bool, report_to: str) -> None:
    """Raises ValueError where --output_dir cannot take this run: found before anything is loaded.

    It cannot where it is not writable, where it holds a run that is not resumed, or where the
    package that --report_to names is missing.
    """
    if not resuming:
        _check_free(path)
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:  # os.access would say yes to root on a read-only disk
        tempfile.TemporaryFile(dir=parent).close()
        _locked(path)
    except OSError as error:
        raise ValueError(f"--output_dir {path}: {parent} cannot be written: {error}") from error
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(f"--report_to {report_to}: pip install {report_to}")


def _check_free(path: Path) -> None:
    if (path / "metrics.jsonl").exists() or checkpoints(path):
        raise ValueError(
            f"--output_dir {path} already holds a run: continue it with "
            f"--resume_from_checkpoint auto, or name another folder"
        )


def _locked(path: Path):
    """A file that this process alone holds while it lives, or None before the folder is there.

    Raises ValueError where another process holds it, OSError where it cannot be opened.
    """
    if not path.is_dir():
        return None
    file = (path / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"--output_dir {path}: another run is writing there ({file.read().strip()}); wait for "
            f"its end, or name another folder"
        ) from error
    except OSError as error:  # a file system without locks
        text = f"{path}: {error.strerror}: a second run in this folder would not be noticed"
        print(text, file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class RunFolder:
    """--output_dir, checked by `check_output`. Only the main rank makes one.

    resumed_step: the step after which a run goes on; later lines of its files are dropped.
    Raises ValueError where a file cannot be written.
    """

    def __init__(self, path: Path, config, resumed_step: int | None, report_to: str, name: str):
        self.path = path
        metrics = path / "metrics.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)
            if resumed_step is None:  # another may have run since `check_output`
                _check_free(path)
            self._write_config(config)  # first: what has metrics can be resumed
            for file in (metrics, path / "completions.jsonl"):
                if resumed_step is not None and file.exists():
                    _drop_after(file, resumed_step)
            if resumed_step is not None and (path / "diagnosis.txt").exists():
                _drop_findings_after(path / "diagnosis.txt", resumed_step)
            self._metrics = metrics.open("a")
            self._completions = (path / "completions.jsonl").open("a")
        except OSError as error:
            raise ValueError(f"--output_dir {path}: {error.strerror}") from error
        self._tracker = _tracker(report_to, path, name, dataclasses.asdict(config), resumed_step)

    def _write_config(self, config) -> None:
        import yaml

        once = ("resume_from_checkpoint", "dry_run")
        values = dataclasses.asdict(config).items()
        values = {k: v for k, v in values if v is not None and k not in once}
        partial = self.path / ".config.yaml"
        with partial.open("w") as file:
            yaml.safe_dump(values, file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / "config.yaml")

    def write(
        self,
        metrics: dict,
        records: list[list[dict]],
        advantages: Tensor | None,
        report: bool,
    ) -> None:
        """One step: its metrics (to the tracker too if `report`) and its completions.

        records, advantages: (B, G), a record per completion; no record where nothing was sampled.
        """
        completions = []
        for prompt, row in enumerate(records):
            for sample, record in enumerate(row):
                place = {"step": metrics["step"], "prompt": prompt, "sample": sample}
                completions.append(
                    place | record | {"advantage": float(advantages[prompt, sample])}
                )
        with self._told():
            self._completions.write(_json_lines(completions))
            self._completions.flush()
            self._metrics.write(_json_lines([metrics]))
            self._metrics.flush()
        if report:
            self._tracker(metrics)

    def write_answers(self, step: int, records: list[dict], files: dict) -> None:
        """The held-out answers of one evaluation, to eval-<step>.jsonl; nothing where none was.

        files: further contents for JSON, to <name>-<step>.json each.
        """
        with self._told():
            if records:
                (self.path / f"eval-{step}.jsonl").write_text(_json_lines(records))
            for name, content in files.items():
                (self.path / f"{name}-{step}.json").write_text(json.dumps(content) + "\n")

    def write_findings(self, step: int, findings: dict[str, str]) -> None:
        """Appends what the diagnosis said to diagnosis.txt; nothing where it was silent."""
        if findings:
            with self._told(), (self.path / "diagnosis.txt").open("a") as file:
                for text in findings.values():
                    file.write(f"step {step}: {text}\n\n")

    def write_bad_step(self, step: int, records: list[list[dict]], problems: list[str]) -> Path:
        """The prompts and completions of a step that was skipped, to bad-step-<step>.jsonl."""
        path = self.path / f"bad-step-{step}.jsonl"
        lines = [
            {"problem": problem, **record}
            for problem, row in zip(problems, records, strict=True)
            for record in row
        ]
        with self._told():
            path.write_text(_json_lines(lines))
        return path

    def sync(self) -> None:
        """Has the disk hold what was written, before a checkpoint says that it was."""
        with self._told():
            for file in (self._metrics, self._completions):
                os.fsync(file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """ValueError names the folder where the disk takes no more."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"--output_dir {self.path}: {error.strerror} while writing. What was saved is "
                f"kept: free space, then go on with --output_dir {self.path} "
                f"--resume_from_checkpoint auto"
            ) from error

    def close(self) -> None:
        self._metrics.close()
        self._completions.close()
        self._lock.close()
        self._tracker(None)


def _json_lines(records: list[dict]) -> str:
    """A line per record; numbers that are not finite become null, which JSON has."""
    return "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(file: Path, step: int) -> None:
    """Keeps the whole lines of steps up to `step`; a line cut by a kill goes with the rest."""
    partial = file.with_suffix(".partial")
    with file.open("rb") as lines, partial.open("wb") as kept:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):  # not a line of ours
                break
            kept.write(line)
    os.replace(partial, file)


def _drop_findings_after(file: Path, step: int) -> None:
    """Keeps the findings of steps up to `step`, as `RunFolder.write_findings` wrote them."""
    findings = re.split(r"^(?=step \d+: )", file.read_text(), flags=re.MULTILINE)
    kept = [text for text in findings if text and int(re.findall(r"\d+", text)[0]) <= step]
    file.write_text("".join(kept))


def _tracker(report_to: str, path: Path, name: str, config: dict, resumed_step: int | None):
    """f(metrics) that sends them on; f(None) ends it. A resumed run goes on in what it began."""
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        again = None if resumed_step is None else resumed_step + 1  # what came later is hidden
        writer = SummaryWriter(str(path / "tensorboard" / name), purge_step=again)

        def tensorboard(metrics: dict | None) -> None:
            if metrics is None:
                return writer.close()
            for key, value in metrics.items():
                if key != "step" and value is not None:
                    writer.add_scalar(key, value, metrics["step"])

        return tensorboard
    if report_to == "wandb":
        import wandb

        file = path / "wandb_id"
        known = file.read_text() if resumed_step is not None and file.exists() else None
        run = wandb.init(name=name, dir=str(path), config=config, id=known, resume="allow")
        file.write_text(run.id)

        def weights_and_biases(metrics: dict | None) -> None:
            if metrics is None:
                run.finish()
            else:
                run.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

        return weights_and_biases
    return lambda metrics: None


# What to lower where memory runs out.
SHARE = (
    "the model's share of a rank: more ranks, --freeze_vision, --beta 0 (no reference), a smaller "
    "model, or with several GPUs --cpu_offload"
)
LOWER = {
    "loading": SHARE,
    "rollout": "--prompts_per_step, --num_generations, --max_completion_length or --max_pixels",
    "evaluation": "--max_completion_length or --max_pixels",
    "optimizer": SHARE,
    "gather": SHARE,
    "saving": SHARE,
}
LOWER_PACKS = "--tokens_per_pack ({}) or --max_pixels; or set --gradient_checkpointing true"


class Phases:
    """Seconds and peak memory of each named phase of one step, or (step 0) of what goes before
    the first; tells ranks what goes on.

    On CUDA the peak is of the memory that torch allocated during the phase; on a CPU it is the
    process's largest resident size so far, which never falls.
    """

    def __init__(self, ranks: Ranks, step: int, tokens_per_pack: int):
        self.ranks, self.step, self.tokens_per_pack = ranks, step, tokens_per_pack
        self.metrics: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, tokens: int | None = None) -> Iterator[None]:
        """tokens: of what the phase works on at once. Raises ValueError, out of memory."""
        device = self.ranks.device
        cuda = device.type == "cuda"
        self.ranks.enter(f"{name} of step {self.step}" if self.step else name)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            yield
            if cuda:
                torch.cuda.synchronize(device)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            at = f" at {tokens} tokens in a pack" if tokens else ""
            raise ValueError(
                f"out of memory in {self.ranks.doing}{at}: lower "
                f"{LOWER.get(name, LOWER_PACKS.format(self.tokens_per_pack))}. "
                f"Checkpoints are kept. ({str(error).splitlines()[0]:.200})"
            ) from error
        seconds = self.metrics.get(f"time/{name}_s", 0.0) + time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else resident_gb()
        self.metrics[f"time/{name}_s"] = seconds
        self.metrics[f"memory/{name}_gb"] = max(peak, self.metrics.get(f"memory/{name}_gb", 0.0))


def _out_of_memory(error: Exception) -> bool:
    """torch has a class for it on CUDA only."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def resident_gb() -> float:
    """The process's largest resident size so far, in GB (1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rollout_metrics(records: list[list[dict]]) -> dict[str, float]:
    """What one step's completions say, under TRL's names.

    records: a row of G per prompt, over all ranks, each with "reward", "rewards", "tokens" and
    "truncated".
    """

    def table(value) -> Tensor:
        return torch.tensor([[value(r) for r in row] for row in records], dtype=torch.float64)

    rewards = table(lambda r: r["reward"])
    lengths = table(lambda r: r["tokens"])
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": table(lambda r: r["truncated"]).mean().item(),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).double().mean().item(),
    }
    for name in records[0][0]["rewards"]:
        values = table(lambda r, name=name: r["rewards"][name])
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std().item()
    return metrics


def held_out_metrics(records: list[dict]) -> dict[str, float]:
    """Means over one record per held-out row, under eval/<term>, and of lengths and truncation."""
    columns = {name: [r["rewards"][name] for r in records] for name in records[0]["rewards"]}
    columns["mean_length"] = [r["tokens"] for r in records]
    columns["clipped_ratio"] = [r["truncated"] for r in records]
    return {f"eval/{name}": sum(column) / len(column) for name, column in columns.items()}


class Progress:
    """The terminal: a bar on stderr, lines on stdout; silent on every rank but the main one."""

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def start(self, steps: int, done: int) -> None:
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not self.is_main)

    def step(self, metrics: dict, headline: str, as_line: bool) -> None:
        """Moves the bar on; `headline` is the metric shown beside the reward."""
        short = headline.split("/")[1]
        shown = {"reward": metrics["reward"], short: metrics[headline]}
        self.bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items()}, refresh=False)
        self.bar.update()
        if as_line:
            cells = {**shown, "kl": metrics.get("kl"), "entropy": metrics.get("entropy")}
            cells["length"] = metrics["completions/mean_length"]
            text = "  ".join(f"{k} {v:.3f}" for k, v in cells.items() if v is not None)
            self.say(f"step {metrics['step']:>5}  {text}  {metrics['step_time']:.2f} s")
        held_out = {k[5:]: v for k, v in metrics.items() if k.startswith("eval/")}
        if held_out:
            text = "  ".join(f"{k} {v:.3f}" for k, v in held_out.items())
            self.say(f"step {metrics['step']:>5}  held out: {text}")

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()


def comparison(before: dict[str, float], after: dict[str, float]) -> str:
    """The closing table of held-out results, before -> after."""
    lines = [f"{'held out':<16}{'before':>10}{'after':>10}"]
    for name, value in after.items():
        old = f"{before[name]:.3f}" if name in before else "-"
        lines.append(f"{name[5:]:<16}{old:>10}{value:>10.3f}")
    return "\n".join(lines)
