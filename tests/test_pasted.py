"""Command lines and settings as people paste them, and values that no message may print in full."""

import os

import pytest

from data.errors import UserError, reason, shown
from grpo.flags.config import TrainingConfig
from grpo.flags.parser import parse_config
from grpo.run.clock import Clock
from grpo.run.exits import LINES, LONGEST_LINE, bounded
from tests.test_cli import NEEDED, parse

PUBLISHED = {
    "Visual-RFT": (
        "--deepspeed local_scripts/zero3.json --per_device_train_batch_size 1 --bf16 "
        "--gradient_accumulation_steps 2 --attn_implementation flash_attention_2 "
        "--save_only_model true --num_generations 8 --report_to wandb",
        {
            "--deepspeed": "torchrun",
            "--per_device_train_batch_size": "--prompts_per_step",
            "--gradient_accumulation_steps": "--tokens_per_pack",
            "--save_only_model": "final/",
        },
    ),
    "ms-swift": (
        "--rlhf_type grpo --model Qwen/x --reward_funcs a format --train_type full "
        "--target_modules all-linear --dataset me/set --temperature 1.0 --local_rank=0",
        {
            "--rlhf_type": "leave it out",
            "--model": "--model_name_or_path",
            "--reward_funcs": "score()",
            "--train_type": "--use_peft",
            "--target_modules": "--lora_target_modules",
            "--dataset": "--dataset_name",
            "--local_rank": "torchrun",
        },
    ),
    "EasyR1": (
        "config=examples/config.yaml data.train_files=a/b@train trainer.max_steps=5 x.y=3 "
        "worker.actor.global_batch_size=128 worker.actor.micro_batch_size_per_device_for_update=4 "
        "algorithm.disable_kl=true",
        {
            "config=examples/config.yaml": "--config",
            "data.train_files=a/b@train": "--dataset_name",
            "trainer.max_steps=5": "write --max_steps 5",
            "x.y=3": "--name value",
            "worker.actor.global_batch_size=128": "use --num_minibatches, the rollout's prompts",
            "worker.actor.micro_batch_size_per_device_for_update=4": "use --tokens_per_pack",
            "algorithm.disable_kl=true": "use --beta 0",
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_unknown_word_of_a_command_is_named_with_what_to_do(name):
    command, hints = PUBLISHED[name]
    with pytest.raises(UserError) as caught:
        parse(*command.split())
    first, *lines = str(caught.value).split("\n")
    assert first == f"{len(hints)} words are no flags:"
    for line, (word, hint) in zip(lines, hints.items(), strict=True):
        assert line.startswith(f"  unknown flag {word}: ") and hint in line


@pytest.mark.parametrize(
    "words, flag, value",
    [
        ("--max-steps 5", "max_steps", 5),
        ("--max-steps=5", "max_steps", 5),
        ("--no_bf16", "bf16", False),
        ("--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("--lora_target_modules all-linear --use_peft", "lora_target_modules", None),
        ("--lora_target_modules q_proj, v_proj --use_peft", "lora_target_modules", "q v"),
        ("--lora_target_modules=q_proj,v_proj --use_peft", "lora_target_modules", "q v"),
        ("--reward_weights 1,-0.5", "reward_weights", [1.0, -0.5]),
        ("--reward_weights 1 -0.5", "reward_weights", [1.0, -0.5]),
        ("--report_to tensorboard,wandb", "report_to", ["tensorboard", "wandb"]),
        ("--resume_from_checkpoint True --output_dir o", "resume_from_checkpoint", "auto"),
        ("--resume_from_checkpoint false", "resume_from_checkpoint", None),
        ("--scale_rewards False", "scale_rewards", "none"),
        ("--entropy_coef=-0.5", "entropy_coef", -0.5),
        ("--entropy_coef -0.5", "entropy_coef", -0.5),
        ("--entropy_coef -1e-3", "entropy_coef", -1e-3),
        ("--reward_weights 1e3 -1e-3", "reward_weights", [1e3, -1e-3]),
    ],
)
def test_a_spelling_that_means_the_same_is_read(words, flag, value):
    value = ["q_proj", "v_proj"] if value == "q v" else value
    assert getattr(parse(*NEEDED, *words.split())[0], flag) == value


def test_a_prompt_is_no_flag_whatever_it_holds():
    text = "- name, it\n--now, a=b"
    config, _ = parse(*NEEDED, "--prompt_template", text)
    assert config.prompt_template == text
    assert parse(*NEEDED, f"--prompt_template=--{text}")[0].prompt_template == f"--{text}"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seed 3 stray", "unknown flag stray"),
        ("--no_seed", "unknown flag --no_seed"),
        ("--no_bf16 stray", "unknown flag stray"),
        ("-m x", "unknown flag -m"),
        ("--optim adamw_torch_fused", "none of .*; use adamw_torch"),
        ("--attn_implementation eager", "none of .*; use sdpa"),
        ("--num_generations 1000000000", "at most 4096"),
        ("--max_completion_length 1000000000000", "at most 1048576"),
        ("--prompts_per_step 1000000000", "at most 65536"),
        ("--prompts_per_step 60000 --num_generations 4000", r"6\.1e\+10 tokens a step"),
        ("--max_pixels 1000000000000", "at most 1073741824"),
        ("--num_train_epochs 1e308", "num_train_epochs is 1e.308; it must be at most 1e.12"),
        (f"--seed {10**30}", "seed is 1e.30; it must be at most"),
        ("--timeout 1e300", "--timeout"),
    ],
)
def test_what_is_refused_names_the_word_or_the_bound(words, message):
    with pytest.raises(UserError, match=message):
        parse(*NEEDED, *words.split())


LONG = "x" * 10_000
PATHS = ["model_name_or_path", "dataset_name", "output_dir", "adapter_name_or_path"]


@pytest.mark.parametrize("name", [*PATHS, "config", "resume_from_checkpoint"])
@pytest.mark.parametrize("value, why", [(LONG, "too long"), ("a\0b", "null byte")])
def test_what_can_be_no_path_is_refused_by_its_flag(name, value, why):
    others = NEEDED if name not in PATHS[:2] else []
    with pytest.raises(UserError) as caught:
        parse(*others, "--use_peft", f"--{name}", value)
    text = str(caught.value)
    assert text.startswith(f"--{name} ") and why in text and len(text) < 300


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, message",
    [
        (f"seed: {LONG}", "seed is 'x+...x+', not int"),
        (f"{LONG[:900]}: 1", "unknown key 'x+...x+': --help"),
        (f"beta: [{LONG}]", "beta is"),
        (f"loss_type: {LONG}", "--loss_type 'x+...x+' is none of"),
        (BOMB + "seed: *i", "unknown key a: "),
        (BOMB.replace("a: ", "reward_weights: ").replace("i: ", "seed: "), "unknown key"),
        ("seed: " + "[" * 5000, "not a readable YAML"),
        ("seed: &s [*s]", r"seed is \[\[\[\[...\]\]\]\], not int"),
        ("seed: 2001-99-99", "not a readable YAML file: month must be"),
        ("seed: 1\nbeta: 0\nseed: 2", "seed is set in line 1 and again in line 3; keep one"),
        ("betta: 1\nsed: 2", "unknown key betta: .*\n  unknown key sed: did you mean seed"),
        ("[1, 2]: 3", "not a readable YAML"),
    ],
)
def test_settings_of_any_content_are_refused_in_a_short_message(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        parse(*NEEDED, "--config", str(tmp_path / "a.yaml"))
    assert len(str(caught.value)) < 1500


def test_what_other_trainers_write_is_read_in_yaml_too(tmp_path):
    (tmp_path / "a.yaml").write_text("scale_rewards: false\nlora_target_modules: all-linear\n")
    config, _ = parse(*NEEDED, "--use_peft", "--config", str(tmp_path / "a.yaml"))
    assert config.scale_rewards == "none" and config.lora_target_modules is None


def test_settings_that_are_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path, "a fo"),
    ):
        with pytest.raises(UserError, match=f"not a regular file but {what}"):
            parse_config(TrainingConfig, ["--config", str(path)])


def test_messages_are_cut_where_they_quote_a_file_of_any_size():
    lines = bounded("\n".join(["y" * 10**6, *["z"] * 1000])).split("\n")
    assert len(lines[0]) < LONGEST_LINE + 10 and lines[-1] == f"({1001 - LINES} lines more)"
    assert bounded("a\nb") == "a\nb"
    assert len(shown([[LONG] * 100] * 100)) < 5000


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("\n"), RuntimeError("\n\n")])
def test_an_error_without_a_text_is_named_by_its_class(error):
    from types import SimpleNamespace

    assert reason(error) == type(error).__name__
    clock = SimpleNamespace(tokens=0, name="rollout", ranks=SimpleNamespace(phase="rollout"))
    said = Clock.out_of_memory(clock, error, None)
    assert (said is not None) == isinstance(error, MemoryError)
    assert said is None or "(MemoryError)" in str(said)
