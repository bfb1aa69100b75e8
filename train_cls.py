"""GRPO for image classification: `torchrun train_cls.py`.

Read from top to bottom: the flags, what is paid for, the checks before a weight is loaded, the
held-out evaluation, and the loop itself. Without a model and a data set it trains the embedded
demo. `--help` lists every flag; docs/metrics.md defines every number that is logged.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.check import Fault, check_images, check_rows, refuse, refuse_other_task
from data.images import open_image
from data.stream import PromptStream
from data.virft import fingerprint, load, splits
from grpo import dist
from grpo.checkpoint import (
    find_checkpoint,
    read_state,
    resume,
    save_checkpoint,
    save_final,
    set_aside_later,
)
from grpo.cli import (
    DIVERGED,
    INTERRUPTED,
    USER_ERROR,
    StopSignal,
    TrainingConfig,
    flag,
    parse_config,
    run,
)
from grpo.diagnose import FIND_FAILURES as PARSE_FAILURES
from grpo.diagnose import Watch, step_metrics
from grpo.log import (
    Phases,
    Progress,
    RunFolder,
    check_output,
    comparison,
    held_out_metrics,
    rollout_metrics,
)
from grpo.logps import pack_chunks, pack_logps
from grpo.loss import (
    find_fault,
    group_advantages,
    length_penalty,
    per_token_kl,
    policy_loss,
    reward_fault,
    token_weights,
    weighted_reward,
)
from grpo.plan import describe, total_steps
from grpo.preflight import REFERENCE, check_first_ratio, check_gradients, check_reference
from grpo.rollout import filler, make_packs, sample_groups
from models.attention import choose_implementation
from models.generate import Sampling, with_image_features
from models.load import check_checkpoint, empty_model, find_folder
from models.processor import Processor
from rewards.cls import accuracy_reward, read_aliases, read_class
from rewards.det import solution_kind
from rewards.format import format_reward
from rewards.parse import find_answer, perfect

DEMO = Path(__file__).resolve().parent / "data" / "demo_cls" / "demo.yaml"
NAME = "cls"
ADVICE = "if these are synonyms, pass --aliases"
SPLITS_ADVICE = "give both splits the same kind of solution"
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


def score(completion: str, example, config: Config, task: dict) -> dict[str, float]:
    """Every reward of one completion, each in 0 to 1; --reward_weights follows this order."""
    return {
        "accuracy": accuracy_reward(completion, example.solution, task, config.answer_match),
        "format": format_reward(completion),
    }


def explain(completion: str, example, config: Config, task: dict) -> dict[str, str]:
    """Why a reward is not in full, for those that are not."""
    return {
        "accuracy": find_answer(completion)[1] or "wrong class",
        "format": "not <think>...</think><answer>...</answer>",
    }


def truth(example) -> str:
    """The right answer, as a person would say it."""
    return read_class(example.solution)


def hints(records: list[list[dict]], train, config: Config, task: dict) -> list[str]:
    """What else the completions say about a flat reward."""
    names = {record["truth"] for row in records for record in row}
    listed = sum(
        sum(name in (r["answer"] or "") for name in names) > 1 for row in records for r in row
    )
    return [f"{listed} answers of the last step name several classes"] if listed else []


def judge(group, example, processor, config, task, reward_weights) -> list[dict]:
    """One record per completion of a group: its text, its rewards, and their weighted sum."""
    records = []
    for ids, truncated in zip(group.completion_ids, group.truncated, strict=True):
        text = processor.decode(ids)
        try:
            rewards = score(text, example, config, task)
            total = weighted_reward(rewards, reward_weights)
            why = explain(text, example, config, task)
            reasons = {name: why[name] for name, value in rewards.items() if value < 1}
        except Exception as error:  # whatever an edited reward does wrong: the run ends with it
            records.append(reward_fault(error, example.index, text))
            continue
        total += length_penalty(len(ids), config.max_completion_length, config.overlong_buffer)
        records.append(
            {
                "row": example.index,
                "truth": truth(example),
                "answer": find_answer(text)[0],
                "completion": text,
                "rewards": rewards,
                "reasons": reasons,
                "reward": total,
                "tokens": len(ids),
                "truncated": truncated,
            }
        )
    return records


# ---- before a weight is loaded ------------------------------------------------------------------


def prepare(config: Config, examples, split: str, argv: list[str]) -> dict:
    """What score() needs to know beside the example: the synonyms that are paid for.

    Raises ValueError where a solution is no class name, and where the data set is train_det.py's.
    """
    kinds = [solution_kind(example.solution) for example in examples]
    where = (config.dataset_name, split)
    own = Config.__dataclass_fields__.keys() - TrainingConfig.__dataclass_fields__.keys()
    scripts = ("train_cls.py", "train_det.py")
    refuse_other_task(kinds, {"class"}, own, *scripts, examples, argv, *where)
    return read_aliases(config.aliases) if config.aliases else {}


def checked(config: Config, split: str, processor: Processor, argv: list[str]):
    """The rows of a split, their prompt lengths in tokens, and what `prepare` found.

    Every row and every image is looked at, and the true solution must earn every reward in full.
    Raises ValueError that lists the first bad rows: what was found and what to do.
    """
    examples = load(config.dataset_name, split)
    sizes, faults = check_images(examples, f"{split} images")
    refuse(faults + check_rows(examples), config.dataset_name, split)
    task = prepare(config, examples, split, argv)
    lengths = []
    for example, size in zip(examples, sizes, strict=True):
        own = perfect(example.solution)
        try:
            earned = score(own, example, config, task)
            poor = [
                f"{name} {value:.3f}" for name, value in earned.items() if not value >= 1 - 1e-9
            ]
            found = poor and f"its own solution earns {', '.join(poor)} of 1: {example.solution!r}"
            lengths.append(processor.count_tokens(example.problem, size))
        except ValueError as error:
            found = str(error)
        except Exception as error:  # an edited reward
            raise ValueError(find_fault([reward_fault(error, example.index, own)])) from error
        if found:
            faults.append(Fault(example.index, example.where, found, "correct the row"))
        elif config.max_prompt_length and lengths[-1] > config.max_prompt_length:
            found = f"a prompt of {lengths[-1]} tokens, images included"
            todo = f"raise --max_prompt_length ({config.max_prompt_length}) or lower --max_pixels"
            faults.append(Fault(example.index, example.where, found, todo))
    refuse(faults, config.dataset_name, split)
    return examples, lengths, task


def encode(examples: list, processor: Processor) -> list:
    """Rows as prompts for the model."""
    return [
        processor.encode(row.problem, [open_image(image) for image in row.images], row.keys)
        for row in examples
    ]


# ---- held-out evaluation ------------------------------------------------------------------------


def answers(model, examples, processor, judging, sampling, ranks) -> list[dict]:
    """A record for the greedy answer to every row, on every rank."""
    records, mine = [], ranks.mine(list(examples))
    for start in range(0, len(mine), EVAL_BATCH):
        batch = mine[start : start + EVAL_BATCH]
        prompts = encode(batch, processor)
        groups = sample_groups(model, prompts, 1, sampling, 0, 0, range(len(batch)))
        for example, group in zip(batch, groups, strict=True):
            records += judge(group, example, processor, *judging)
    return ranks.gather(records)


def evaluate(records: list[dict], examples, config: Config, task: dict) -> tuple[dict, dict]:
    """Means over held-out rows as eval/<name>, and the files to keep: name -> content."""
    return held_out_metrics(records), {}


# ---- the run ------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    config, config_file = parse_config(Config, argv, DEMO)
    output_dir = Path(config.output_dir or time.strftime(f"runs/{NAME}-%Y%m%d-%H%M%S"))
    ranks = dist.start(config.timeout)
    dist.check_sharding(ranks, config.shard_size, config.reshard_after_forward, config.cpu_offload)
    progress = Progress(ranks.is_main)
    if config_file:
        progress.say(f"settings  {config_file}")

    # The main rank checks everything first; the others then find the images checked.
    if ranks.is_main:
        check_output(output_dir, config.resume_from_checkpoint is not None, config.report_to)
    else:
        output_dir = Path(ranks.wait_for("checks"))
    folder = find_folder(config.model_name_or_path)
    processor = Processor(folder, config.min_pixels, config.max_pixels)
    model_facts = check_checkpoint(folder)
    train, prompt_lengths, task = checked(config, config.dataset_train_split, processor, argv)
    test = []
    if config.dataset_test_split or "test" in splits(config.dataset_name):
        test, more, other = checked(config, config.dataset_test_split or "test", processor, argv)
        if other != task:
            raise ValueError(
                f"the splits differ: {task} to train on, {other} held out; {SPLITS_ADVICE}"
            )
        prompt_lengths += more
        test = [test[row] for row in range(min(len(test), config.eval_samples or len(test)))]
    ranks.done("checks", str(output_dir))
    terms = list(score(perfect(train[0].solution), train[0], config, task))
    numbers = config.reward_weights or [1.0] * len(terms)
    if len(numbers) != len(terms):
        raise ValueError(f"--reward_weights takes {len(terms)} numbers: {', '.join(terms)}")
    reward_weights = dict(zip(terms, numbers, strict=True))
    if config.eval_steps and not test:
        raise ValueError(f"--eval_steps: {config.dataset_name} has no held-out split")

    bf16 = ranks.device.type == "cuda" if config.bf16 is None else config.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    kernel = choose_implementation(config.attn_implementation, ranks.device, dtype)
    steps = total_steps(config, len(train))
    place = (ranks.world, str(ranks.device), str(dtype).removeprefix("torch."), kernel)
    progress.say(describe(config, *model_facts, prompt_lengths, len(train), len(test), *place))
    if task:
        progress.say(f"task      {str(task)[:200]}")
    progress.say(f"run       {output_dir}")
    if config.dry_run:
        return 0

    # Policy and reference: plain models on one rank, sharded over several; and a whole copy of the
    # policy to sample from, which is the policy itself on one rank.
    ranks.wait_for_all("checks")
    mesh = dist.make_mesh(ranks, config.shard_size)
    sharding = (mesh, config.reshard_after_forward, config.cpu_offload)
    phase = Phases(ranks, 0, config.tokens_per_pack)
    with phase("loading"):
        policy = empty_model(folder, kernel)
        policy.model.gradient_checkpointing = config.gradient_checkpointing
        policy.visual.gradient_checkpointing = config.gradient_checkpointing
        policy.visual.requires_grad_(not config.freeze_vision)
        policy = dist.place(policy, ranks, dtype, *sharding)
        dist.load_weights(policy, folder)
        sampler = dist.whole_model(policy, empty_model(folder, kernel), ranks, dtype)
        reference = None
        if config.beta > 0:  # a frozen vision tower's features come with the prompts
            reference = empty_model(folder, kernel, not config.freeze_vision).requires_grad_(False)
            reference = dist.place(reference, ranks, dtype, *sharding)
            dist.load_weights(reference, folder)
        optimizer = dist.Optimizer(policy, config.weight_decay)

    # The place in the data and the counters: those of a new run, or as a checkpoint left them.
    facts = {
        "the data set": fingerprint(train),
        "the held-out rows": fingerprint(test),
        "what is paid for": repr(task),
        "the precision": str(dtype),
    }
    if reference is not None:
        facts[REFERENCE] = dist.checksum(reference, ranks)
    state = {"step": 0, "num_tokens": 0, "stream": {}, "watch": None, "before": {}, "after": {}}
    state |= {"skipped": 0, "bad_steps": 0}  # in all, and in a row
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
        if checkpoint is None:
            progress.say(f"starting  {output_dir} has no checkpoint to resume from yet")
    if checkpoint:
        state = read_state(checkpoint, asdict(config), steps, facts)
        resume(checkpoint, optimizer, state["updates"])
        progress.say(f"resumed   {checkpoint}, step {state['step']}")
    dist.gather_weights(policy, sampler)
    state |= {"config": asdict(config), "steps": steps, "facts": facts}
    stream = PromptStream(len(train), config.seed, **state["stream"])
    watch = Watch(config.diagnose_after, state["watch"], ADVICE)
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
    judging = (config, task, reward_weights)

    log = None
    if ranks.is_main:
        begun = 0 if checkpoint else -1  # without a checkpoint even step 0 is done again
        resumed_step = state["step"] + begun if config.resume_from_checkpoint else None
        name = config.run_name or output_dir.name
        log = RunFolder(output_dir, config, resumed_step, config.report_to, name)
        for path in set_aside_later(output_dir, resumed_step) if checkpoint else []:
            progress.say(f"set aside {path}")
    stop_signal = StopSignal()
    first = next((row for row in train if row.images), train[0])
    answer = processor.tokenizer(perfect(first.solution), add_special_tokens=False)["input_ids"]
    (prompt,) = encode([first], processor)
    if config.freeze_vision:
        (prompt,) = with_image_features(sampler, [prompt])
    with phase("gradient check", len(prompt.input_ids) + len(answer)):
        check_gradients(policy, optimizer, prompt, answer, scoring, ranks)
    if test and state["step"] == 0:
        with phase("evaluation"):
            records = answers(sampler, test, processor, judging, greedy, ranks)
        if fault := find_fault(records):
            raise ValueError(fault)
        state["before"], files = evaluate(records, test, config, task)
        if log:
            log.write({"step": 0, **state["before"]}, [], None, True)
            log.write_answers(0, records, files)
    progress.start(steps, state["step"])
    ending = None  # exit code and why the run ends early

    for step in range(state["step"] + 1, steps + 1):
        started, phase = time.perf_counter(), Phases(ranks, step, config.tokens_per_pack)

        # 1. Sample G completions of each prompt, and 2. reward them: a record per completion, a row
        # of records per prompt. With --dynamic_sampling prompts whose group teaches nothing are
        # replaced by the next ones, for a few rounds; what was found is kept.
        groups, places, records, spent, new_tokens = [], [], [], 0, 0
        for _ in range(config.max_sampling_rounds if config.dynamic_sampling else 1):
            rows = stream.next(config.prompts_per_step - len(records))
            dealt = ranks.mine(list(enumerate(rows, start=spent)))
            examples = [train[row] for _, row in dealt]
            with phase("rollout"):
                prompts = encode(examples, processor)
                if config.freeze_vision:
                    prompts = with_image_features(sampler, prompts)
                drawn = sample_groups(
                    sampler,
                    prompts,
                    config.num_generations,
                    sampling,
                    config.seed,
                    step,
                    [place for place, _ in dealt],
                )
            with phase("reward"):
                pairs = zip(drawn, examples, strict=True)
                judged = ranks.gather([judge(*pair, processor, *judging) for pair in pairs])
            spent += len(rows)
            if fault := find_fault(record for row in judged for record in row):
                break
            new_tokens += sum(record["tokens"] for row in judged for record in row)
            for index, row in enumerate(judged):
                if config.dynamic_sampling and len({record["reward"] for record in row}) == 1:
                    continue
                if index % ranks.world == ranks.rank:  # as `mine` dealt them
                    groups.append(drawn[index // ranks.world])
                    places.append(len(records))
                records.append(row)
            if len(records) == config.prompts_per_step:
                break
        if not records:
            records, groups = judged, drawn
            places = ranks.mine(list(range(len(judged))))

        if fault:  # this step is given up
            ending = (USER_ERROR, fault)
        elif ranks.any(stop_signal.asked):
            ending = (INTERRUPTED, "interrupted")
        if ending:
            break

        # 3. Advantage: each completion against its own group; weights count the whole step.
        rewards = torch.tensor([[r["reward"] for r in row] for row in records], dtype=torch.float64)
        lengths = torch.tensor([[r["tokens"] for r in row] for row in records])
        if config.mask_truncated_completions:
            lengths *= torch.tensor([[not r["truncated"] for r in row] for row in records])
        advantages = group_advantages(rewards, config.scale_rewards)
        weights = token_weights(lengths, config.loss_type, config.max_completion_length)

        # 4. Log-probs to compare with: the reference's, and the old policy's where it will move.
        # Without a KL term a group whose advantages are all 0 has no gradient: it is left out.
        if config.beta == 0:
            alive = [i for i, place in enumerate(places) if advantages[place].any()]
            groups, places = [groups[i] for i in alive], [places[i] for i in alive]
        # Every rank scores as many packs as the one that has most: they gather layers together.
        packs = make_packs(groups, config.tokens_per_pack)
        rank_tokens = ranks.gather([sum(len(pack.input_ids) for pack in packs)])
        packs += [filler()] * (ranks.most(len(packs)) - len(packs))
        largest = max((len(pack.input_ids) for pack in packs), default=0)
        ref_logps = old_logps = [None] * len(packs)
        with phase("reference", largest), torch.no_grad():
            if reference is not None:
                ref_logps = [pack_logps(reference, pack, *scoring)[0] for pack in packs]
            if config.num_iterations > 1:
                old_logps = [pack_logps(policy, pack, *scoring)[0] for pack in packs]
            dist.release(reference)
            dist.release(policy)

        # 5. Loss and step: a plain sum over tokens, over chunks of the head, packs and ranks.
        names = ("loss", "tokens", "kl", "entropy", "clip_low", "clip_high")
        sums, drift, token_kl = dict.fromkeys(names, 0.0), [0.0], []
        rate = dist.learning_rate(
            step - 1, steps, config.learning_rate, config.lr_scheduler_type, config.warmup_ratio
        )
        for iteration in range(config.num_iterations):
            for pack, ref, old in zip(packs, ref_logps, old_logps, strict=True):
                with phase("training", largest):
                    sampled = pack.sampling_logps(groups).to(ranks.device)
                    pack_advantages = pack.per_token(advantages[places]).to(sampled)
                    pack_weights = pack.per_token(weights[places]).to(sampled)
                    for part, logps, entropy in pack_chunks(policy, pack, *scoring):
                        loss, stats = policy_loss(
                            logps,
                            None if old is None else old[part],
                            pack_advantages[part],
                            pack_weights[part],
                            config.epsilon,
                            config.epsilon_high,
                            None if ref is None else ref[part],
                            config.beta,
                            config.kl_estimator,
                        )
                        loss.backward()
                        stats |= {"tokens": len(logps), "entropy": entropy.sum()}
                        stats |= {"loss": loss.detach()}
                        for name, value in stats.items():
                            sums[name] += value
                        if iteration == 0:  # still the policy that sampled
                            drift.append((logps.detach() - sampled[part]).abs().max())
                            if ref is not None:
                                estimate = logps.detach(), ref[part], config.kl_estimator
                                largest_kl, token = per_token_kl(*estimate).max(0)
                                token_kl.append((largest_kl, pack, part.start + token))
            with phase("optimizer"):
                drifted = ranks.most(float(max(drift)))
                if iteration == 0 and state["step"] == 0:
                    check_first_ratio(drifted, dtype, config.temperature)
                grad_norm = math.nan
                if ranks.any(not math.isfinite(sums["loss"])):
                    optimizer.discard()
                else:
                    grad_norm = optimizer.step(rate, config.max_grad_norm)
            if not math.isfinite(grad_norm):  # on every rank alike: the step is skipped
                break
        with phase("gather"):
            dist.gather_weights(policy, sampler)

        # A step without an update is told with what it was made of; so is a token far from the
        # reference.
        state["bad_steps"] = 0 if math.isfinite(grad_norm) else state["bad_steps"] + 1
        if state["bad_steps"]:
            state["skipped"] += 1
            done = f"cut short after {iteration} of its updates" if iteration else "skipped"
            text = f"step {step} was {done}: its loss or gradient is not finite"
            if log:
                problems = [train[row[0]["row"]].problem for row in records]
                text += f" (see {log.write_bad_step(step, records, problems)})"
            progress.say(text)
        if state["bad_steps"] == config.max_bad_steps:
            advice = "lower --learning_rate, or start from an earlier checkpoint"
            ending = (
                DIVERGED,
                f"stopped: {config.max_bad_steps} steps in a row were skipped: {advice}",
            )
            state["bad_steps"] = 0
        far = None
        if token_kl:
            value, pack, token = max(token_kl, key=lambda found: float(found[0]))
            group, member = pack.completion_at(int(token))
            text = processor.decode(pack.targets[token, None])
            far = (float(value), places[group], member, text)
        far = [found for found in ranks.gather([far]) if found is not None]
        kl_max, place, member, text = max(far, default=(0.0, 0, 0, ""))
        if config.kl_alarm is not None and kl_max > config.kl_alarm:
            completion = records[place][member]["completion"]
            progress.say(f"KL alarm: {kl_max:.3g} nats at the token {text!r} of {completion!r}")

        # 6. Report: metrics, completions, evaluation, checkpoint.
        sums = ranks.sum({name: float(total) for name, total in sums.items()})
        scored = sums.pop("tokens")
        means = {name: total / max(scored, 1) for name, total in sums.items()}
        state |= {"step": step, "num_tokens": state["num_tokens"] + new_tokens}
        state |= {"stream": stream.state()}
        metrics = {"step": step, "epoch": stream.epoch + stream.position / len(train)}
        metrics |= {"num_tokens": state["num_tokens"], **rollout_metrics(records)}
        metrics |= {"loss": sums["loss"] / config.num_iterations}
        metrics |= {"kl": means["kl"], "kl_max": kl_max} if reference is not None else {}
        if scored:
            metrics |= {
                "entropy": means["entropy"],
                "clip_ratio/low_mean": means["clip_low"],
                "clip_ratio/high_mean": means["clip_high"],
            }
        metrics |= {
            "sampling/logp_difference_max": drifted,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_steps": state["skipped"],
        }
        if ranks.world > 1:  # 1 is even; the number of ranks is one rank with all the work
            metrics |= {
                "ranks/load_imbalance": max(rank_tokens) * ranks.world / max(sum(rank_tokens), 1)
            }
        if config.dynamic_sampling:
            metrics |= {"sampling/prompts": spent, "sampling/prompts_kept": len(records)}
        extremes = (sum(min(w, 0) for w in numbers), sum(max(w, 0) for w in numbers))
        metrics |= step_metrics(records, *extremes, PARSE_FAILURES)
        found = watch.update(step, records, *extremes)
        evidence = hints(records, train, config, task) if found else []
        findings = watch.explain(found, records, evidence)
        metrics |= dict.fromkeys(findings, 1)
        state["watch"] = watch.state()
        held_out, answered, files = {}, [], {}
        due = config.eval_steps and step % config.eval_steps == 0
        if test and not ending and (due or step == steps):
            with phase("evaluation"):
                answered = answers(sampler, test, processor, judging, greedy, ranks)
                if fault := find_fault(answered):
                    ending, answered = (USER_ERROR, fault), []
                else:
                    held_out, files = evaluate(answered, test, config, task)
        if ranks.any(stop_signal.asked) and step < steps:
            ending = ending or (INTERRUPTED, "interrupted")
        metrics |= {**held_out, "step_time": time.perf_counter() - started, **phase.metrics}
        as_line = step % config.logging_steps == 0 or step == steps
        progress.step(metrics, f"rewards/{terms[0]}/mean", as_line)
        for text in findings.values():
            progress.say(f"\ndiagnosis: {text}\n")
        if log:
            log.write(metrics, records, advantages, as_line)
            log.write_answers(step, answered, files)
            log.write_findings(step, findings)
        state |= {"after": held_out, "held_out": held_out.get(f"eval/{terms[0]}")}
        if config.save_steps and step % config.save_steps == 0:
            with phase("saving"):
                check_reference(reference, facts, ranks)
                save(log, output_dir, folder, policy, optimizer, state, ranks, config)
        if ending:
            break

    progress.stop()
    check_reference(reference, facts, ranks)
    if ending:
        code, why = ending
        progress.say(why)
        if state["step"]:
            with phase("saving"):
                save(log, output_dir, folder, policy, optimizer, state, ranks, config)
        progress.say(
            f"ended after step {state['step']} of {steps}; continue with "
            f"--output_dir {output_dir} --resume_from_checkpoint auto"
        )
    else:
        code = 0
        if test and not state["after"]:  # a fault in a reward had ended it
            records = answers(sampler, test, processor, judging, greedy, ranks)
            if fault := find_fault(records):
                raise ValueError(fault)
            state["after"], files = evaluate(records, test, config, task)
            if log:
                log.write_answers(steps, records, files)
        with phase("saving"):
            save_final(output_dir, folder, policy, optimizer, ranks, dtype)
        if test:
            progress.say(comparison(state["before"], state["after"]))
        progress.say(f"trained   {output_dir / 'final'}")
    if log:
        log.close()
    ranks.wait()
    ranks.stop()
    return code


def save(log, output_dir, folder, policy, optimizer, state, ranks, config) -> None:
    """A checkpoint, once the metrics that lead up to it are on the disk."""
    if log:
        log.sync()
    limit = config.save_total_limit
    save_checkpoint(output_dir, folder, policy, optimizer, state, ranks, limit)


if __name__ == "__main__":
    run(main)
