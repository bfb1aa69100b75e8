"""GRPO for image classification: `torchrun train_cls.py`.

Read from top to bottom: the flags, what is paid for, the checks before a weight is loaded, the
held-out evaluation, and the loop itself. Without a model and a data set it trains the embedded
demo. `--help` lists every flag; docs/metrics.md defines every number that is logged.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.check import Fault, check_images, check_rows, refuse
from data.images import open_image
from data.stream import PromptStream
from data.virft import load, splits
from grpo import dist
from grpo.checkpoint import find_checkpoint, read_state, resume, save_checkpoint, save_final
from grpo.cli import INTERRUPTED, StopSignal, TrainingConfig, flag, parse_config, run
from grpo.log import Phases, Progress, RunFolder, comparison, rollout_metrics
from grpo.logps import pack_logps
from grpo.loss import group_advantages, policy_loss, token_weights, weighted_reward
from grpo.plan import describe, total_steps
from grpo.rollout import make_packs, sample_groups
from models.attention import choose_implementation
from models.generate import Sampling
from models.load import check_checkpoint, find_folder, load_model
from models.processor import Processor
from rewards.cls import accuracy_reward, read_aliases, read_class
from rewards.format import format_reward

DEMO = Path(__file__).resolve().parent / "data" / "demo_cls" / "demo.yaml"
EVAL_BATCH = 32  # prompts


@dataclass
class Config(TrainingConfig):
    """Trains a Qwen2-VL model by GRPO to name what an image shows."""

    answer_match: str = flag(
        "exact", "how an answer is compared with the class", choices=("exact", "visual_rft")
    )
    aliases: str | None = flag(
        None, 'JSON file of synonyms that are paid for: {"garden phlox": ["Phlox paniculata"]}'
    )


# ---- what is paid for ---------------------------------------------------------------------------

TERMS = ("accuracy", "format")  # the order of --reward_weights


def score(completion: str, example, config: Config, aliases: dict) -> dict[str, float]:
    """Every reward of one completion, each in 0 to 1."""
    return {
        "accuracy": accuracy_reward(completion, example.solution, aliases, config.answer_match),
        "format": format_reward(completion),
    }


def judge(group, example, processor, config, aliases, reward_weights) -> list[dict]:
    """One record per completion of a group: its text, its rewards and their weighted sum."""
    records = []
    for ids, truncated in zip(group.completion_ids, group.truncated, strict=True):
        text = processor.decode(ids)
        rewards = score(text, example, config, aliases)
        records.append(
            {
                "row": example.index,
                "solution": example.solution,
                "completion": text,
                "rewards": rewards,
                "reward": weighted_reward(rewards, reward_weights, text),
                "tokens": len(ids),
                "truncated": truncated,
            }
        )
    return records


# ---- before a weight is loaded ------------------------------------------------------------------


def checked(config: Config, split: str, processor: Processor):
    """The rows of a split and their prompt lengths in tokens, every row and image looked at.

    Raises ValueError that lists the first bad rows: what was found and what to do.
    """
    examples = load(config.dataset_name, split)
    sizes, faults = check_images(examples, f"{split} images")
    faults += check_rows(examples)
    bad, lengths = {fault.row for fault in faults}, []
    for example, size in zip(examples, sizes, strict=True):
        if example.index in bad:
            continue
        try:
            read_class(example.solution)
        except ValueError as error:
            faults.append(Fault(example.index, example.where, str(error), "correct the solution"))
        lengths.append(processor.count_tokens(example.problem, size))
        if config.max_prompt_length and lengths[-1] > config.max_prompt_length:
            found = f"a prompt of {lengths[-1]} tokens, images included"
            todo = f"raise --max_prompt_length ({config.max_prompt_length}) or lower --max_pixels"
            faults.append(Fault(example.index, example.where, found, todo))
    refuse(faults, config.dataset_name, split)
    return examples, lengths


def encode(examples: list, processor: Processor) -> list:
    """Rows as prompts for the model."""
    return [
        processor.encode(row.problem, [open_image(image) for image in row.images], row.keys)
        for row in examples
    ]


# ---- held-out evaluation ------------------------------------------------------------------------


def evaluate(model, examples, processor, judging, sampling, ranks):
    """Greedy answers to every row: means as eval/<name>, and one record per row."""
    records, mine = [], ranks.mine(list(examples))
    for start in range(0, len(mine), EVAL_BATCH):
        batch = mine[start : start + EVAL_BATCH]
        prompts = encode(batch, processor)
        groups = sample_groups(model, prompts, 1, sampling, 0, 0, range(len(batch)))
        for example, group in zip(batch, groups, strict=True):
            records += judge(group, example, processor, *judging)
    records = ranks.gather(records)
    columns = {f"eval/{name}": [r["rewards"][name] for r in records] for name in TERMS}
    columns["eval/mean_length"] = [r["tokens"] for r in records]
    columns["eval/clipped_ratio"] = [r["truncated"] for r in records]
    return {name: sum(column) / len(column) for name, column in columns.items()}, records


# ---- the run ------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    config, config_file = parse_config(Config, argv, DEMO)
    reward_weights = config.reward_weights or [1.0] * len(TERMS)
    if len(reward_weights) != len(TERMS):
        raise ValueError(f"--reward_weights takes {len(TERMS)} numbers: {', '.join(TERMS)}")
    aliases = read_aliases(config.aliases) if config.aliases else {}
    output_dir = Path(config.output_dir or time.strftime("runs/cls-%Y%m%d-%H%M%S"))
    ranks = dist.start()
    progress = Progress(ranks.is_main)
    if config_file:
        progress.say(f"settings  {config_file}")

    # The main rank checks data and model first; the others then find the images checked.
    if not ranks.is_main:
        ranks.wait()
    folder = find_folder(config.model_name_or_path)
    processor = Processor(folder, config.min_pixels, config.max_pixels)
    model_config, parameters = check_checkpoint(folder)
    train, prompt_lengths = checked(config, config.dataset_train_split, processor)
    has_test = config.dataset_test_split or "test" in splits(config.dataset_name)
    test = []
    if has_test:
        test, more = checked(config, config.dataset_test_split or "test", processor)
        test, prompt_lengths = list(test)[: config.eval_samples], prompt_lengths + more
    if ranks.is_main:
        ranks.wait()

    bf16 = ranks.device.type == "cuda" if config.bf16 is None else config.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    kernel = choose_implementation(config.attn_implementation, ranks.device, dtype)
    steps = total_steps(config, len(train))
    place = (ranks.world, str(ranks.device), str(dtype).removeprefix("torch."), kernel)
    progress.say(
        describe(config, model_config, parameters, prompt_lengths, len(train), len(test), *place)
    )
    progress.say(f"run       {output_dir}")
    if config.dry_run:
        return 0

    # Policy, reference and data; or the policy and the place in the data as a checkpoint left them.
    policy = load_model(folder, dtype, ranks.device, kernel)
    policy.model.gradient_checkpointing = config.gradient_checkpointing
    policy.visual.gradient_checkpointing = config.gradient_checkpointing
    reference = None
    if config.beta > 0:
        reference = load_model(folder, dtype, ranks.device, kernel).requires_grad_(False)
    optimizer = dist.Optimizer(policy, config.weight_decay)
    state = {"step": 0, "num_tokens": 0, "stream": {"epoch": 0, "position": 0}, "before": {}}
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
        state = read_state(checkpoint, asdict(config))
        resume(checkpoint, optimizer)
        progress.say(f"resumed   {checkpoint}, step {state['step']}")
        if state["step"] >= steps:
            raise ValueError(f"the run is at its end, step {steps}: raise --max_steps to go on")
    state["config"] = asdict(config)
    stream = PromptStream(len(train), config.seed, **state["stream"])
    sampling = Sampling(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_ids=tuple(processor.stop_ids),
        suppressed_ids=tuple(processor.suppressed_ids),
    )
    greedy = replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
    suppressed = torch.tensor(sampling.suppressed_ids, dtype=torch.int64, device=ranks.device)
    scoring = (config.temperature, suppressed)
    judging = (config, aliases, reward_weights)
    inputs = (processor, judging, greedy, ranks)

    log = None
    if ranks.is_main:
        resumed_step = state["step"] if config.resume_from_checkpoint else None
        name = config.run_name or output_dir.name
        log = RunFolder(output_dir, config, resumed_step, config.report_to, name)
    stop_signal = StopSignal()
    if test and state["step"] == 0:
        state["before"], answers = evaluate(policy, test, *inputs)
        if log:
            log.write({"step": 0, **state["before"]}, [], None, True)
            log.write_answers(0, answers)
    progress.start(steps, state["step"])
    stopping = False

    for step in range(state["step"] + 1, steps + 1):
        started, phase = time.perf_counter(), Phases(ranks.device)

        # 1. Sample: G completions of each of this rank's prompts.
        dealt = ranks.mine(list(enumerate(stream.next(config.prompts_per_step))))
        places, examples = [place for place, _ in dealt], [train[row] for _, row in dealt]
        with phase("rollout"):
            prompts = encode(examples, processor)
            groups = sample_groups(
                policy, prompts, config.num_generations, sampling, config.seed, step, places
            )

        # 2. Reward: a record per completion, a row of records per prompt.
        with phase("reward"):
            pairs = zip(groups, examples, strict=True)
            records = ranks.gather([judge(*pair, processor, *judging) for pair in pairs])

        # 3. Advantage: each completion against its own group; weights count the whole step.
        rewards = torch.tensor([[r["reward"] for r in row] for row in records], dtype=torch.float64)
        lengths = torch.tensor([[r["tokens"] for r in row] for row in records])
        advantages = group_advantages(rewards, config.scale_rewards)
        weights = token_weights(lengths, config.loss_type, config.max_completion_length)

        # 4. Log-probs to compare with: the reference's, and the old policy's where it will move.
        packs = make_packs(groups, config.tokens_per_pack)
        ref_logps = old_logps = [None] * len(packs)
        with phase("reference"), torch.no_grad():
            if reference is not None:
                ref_logps = [pack_logps(reference, pack, *scoring)[0] for pack in packs]
            if config.num_iterations > 1:
                old_logps = [pack_logps(policy, pack, *scoring)[0] for pack in packs]

        # 5. Loss and step: a plain sum over tokens, over packs, over ranks.
        sums, drift = dict.fromkeys(("kl", "entropy", "clip_low", "clip_high"), 0.0), [0.0]
        rate = dist.learning_rate(
            step - 1, steps, config.learning_rate, config.lr_scheduler_type, config.warmup_ratio
        )
        for iteration in range(config.num_iterations):
            for pack, ref, old in zip(packs, ref_logps, old_logps, strict=True):
                with phase("training"):
                    logps, entropy = pack_logps(policy, pack, *scoring)
                    loss, stats = policy_loss(
                        logps,
                        old,
                        pack.per_token(advantages[places]).to(logps),
                        pack.per_token(weights[places]).to(logps),
                        config.epsilon,
                        config.epsilon_high,
                        ref,
                        config.beta,
                        config.kl_estimator,
                    )
                    loss.backward()
                for name, value in {**stats, "entropy": entropy.sum()}.items():
                    sums[name] += float(value)
                if iteration == 0:  # still the policy that sampled
                    drawn = pack.sampling_logps(groups).to(logps)
                    drift.append(float((logps.detach() - drawn).abs().max()))
            with phase("optimizer"):
                grad_norm = optimizer.step(ranks, rate, config.max_grad_norm)

        # 6. Report: metrics, completions, evaluation, checkpoint.
        count = int(lengths.sum()) * config.num_iterations
        means = {name: total / count for name, total in ranks.sum(sums).items()}
        metrics = {"step": step, "epoch": step * config.prompts_per_step / len(train)}
        metrics |= rollout_metrics(records, state["num_tokens"])
        metrics |= {"kl": means["kl"]} if reference is not None else {}
        metrics |= {
            "entropy": means["entropy"],
            "clip_ratio/low_mean": means["clip_low"],
            "clip_ratio/high_mean": means["clip_high"],
            "sampling/logp_difference_max": max(ranks.gather([max(drift)])),
            "grad_norm": grad_norm,
            "learning_rate": rate,
        }
        evaluating = step == steps or (config.eval_steps and step % config.eval_steps == 0)
        held_out, answers = {}, []
        if test and evaluating:
            with phase("evaluation"):
                held_out, answers = evaluate(policy, test, *inputs)
        metrics |= {**held_out, "step_time": time.perf_counter() - started, **phase.metrics}
        state |= {"step": step, "num_tokens": metrics["num_tokens"], "stream": stream.state()}
        stopping = ranks.any(stop_signal.asked)
        as_line = step % config.logging_steps == 0 or step == steps
        progress.step(metrics, "rewards/accuracy/mean", as_line)
        if log:
            log.write(metrics, records, advantages, as_line)
            log.write_answers(step, answers)
            if stopping or (config.save_steps and step % config.save_steps == 0):
                limit = config.save_total_limit
                save_checkpoint(output_dir, folder, policy, optimizer, state, limit)
        ranks.wait()
        if stopping:
            break

    progress.stop()
    if log:
        log.close()
    if stopping and step < steps:
        progress.say(
            f"interrupted after step {step} of {steps}; continue with "
            f"--output_dir {output_dir} --resume_from_checkpoint auto"
        )
        ranks.stop()
        return INTERRUPTED
    if log:
        save_final(output_dir, folder, policy, optimizer)
    if test:
        progress.say(comparison(state["before"], held_out))
    progress.say(f"trained   {output_dir / 'final'}")
    ranks.stop()
    return 0


if __name__ == "__main__":
    run(main)
