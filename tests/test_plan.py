"""The plan's estimate of memory, against what autograd and the optimizer hold."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_cls
from benchmarks.memory import facts, peak, published
from demo.published import save_model
from grpo.engine.head import chunk_tokens
from grpo.flags.config import TrainingConfig
from grpo.pack import make_packs
from grpo.plan.advice import USABLE, advise, changes
from grpo.plan.memory import Estimate, estimate_memory, peak_gb
from grpo.plan.passes import Held, Skeleton, kinds
from grpo.plan.plan import waiting
from grpo.plan.sizes import Facts
from grpo.rollout import Group
from models.families import FAMILIES, parse_config
from models.load import check_checkpoint
from models.lora import LoRA
from models.packed_attention import flash_varlen
from models.qwen_vl import with_image_features
from tests.tiny import family_config, tiny_config, tiny_model, tiny_prompt

ROOT = Path(__file__).resolve().parent.parent


def saved_for_backward(model, pack) -> int:
    """Bytes of the distinct storages that autograd saves, parameters aside; hidden states too."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, alive = {}, []

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)  # so that no address is used twice
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        pack_hook(hidden_states(model, pack))
    return sum(sizes.values())


def held_after_forward(model, pack) -> int:
    """Bytes that are held after a forward pass, besides parameters and pixels; what is
    checkpointed, too."""
    pixels = [prompt.pixel_values for prompt in pack.prompts]
    with Held([*model.parameters(), *pixels], torch.device("cpu")) as held:
        hidden = hidden_states(model, pack)
        left = held.now
    del hidden
    return left


def hidden_states(model, pack):
    inputs = pack.input_ids, pack.position_ids, model.bounds(pack.segments), pack.prompts
    return model.hidden_states(*inputs, read=pack.predicts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["all", "no vision", "LoRA"])
def test_what_a_pass_keeps_is_predicted_within_a_fiftieth(family, trained, checkpointing):
    """The layers are asked on the meta device; here a whole model runs on a CPU. Autograd's saved
    tensors do not tell what checkpointing keeps."""
    config = family_config(family)
    model = tiny_model(config, torch.float32)
    model.visual.requires_grad_(trained == "all")
    if trained == "LoRA":
        model.adapt(LoRA(4, 8))
        model.initialize()
    model.model.gradient_checkpointing = model.visual.gradient_checkpointing = checkpointing
    prompts = [tiny_prompt(config, [(16, 24)], text=1, seed=i) for i in range(2)]
    settings = TrainingConfig(
        model_name_or_path="m",
        dataset_name="d",
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=40,
        gradient_checkpointing=checkpointing,
        freeze_vision=trained == "no vision",
        use_peft=trained == "LoRA",
        lora_r=4,
    )
    if trained != "all":
        prompts = with_image_features(model, prompts)
    groups = [Group(p, [[1] * 40] * 4, [torch.zeros(40)] * 4, [False] * 4) for p in prompts]
    (pack,) = make_packs(groups, settings.tokens_per_pack)
    images = int((prompts[0].input_ids == config.image_token_id).sum())
    about = Facts(config, len(prompts[0]), images, False, 1, "cpu", "sdpa")
    estimate = Estimate(settings, about)
    assert sum(map(sum, estimate.pack)) == len(pack)
    kept, _ = estimate.peaks()[0]
    assert kept == pytest.approx(held_after_forward(model, pack), rel=0.02)
    if trained == "all" and not checkpointing:
        assert kept == pytest.approx(saved_for_backward(model, pack), rel=0.02)


def test_fixed_parts_are_the_sizes(tmp_path):
    config = tiny_config()
    model = tiny_model(config, torch.float32)
    save_model(model, tmp_path)
    read, total, vision = check_checkpoint(tmp_path)
    assert total == sum(p.numel() for p in model.parameters())
    assert vision == sum(p.numel() for p in model.visual.parameters())
    settings = TrainingConfig(model_name_or_path="m", dataset_name="d", freeze_vision=True)
    on_gpu = Facts(read, 100, 100, True, 1, "cuda", "flash_attention_2")
    phases = estimate_memory(settings, on_gpu)
    for parts in phases.values():
        assert parts["libraries"] == 0
        assert parts["weights"] * 1e9 == pytest.approx(2 * total)
        assert parts["reference"] * 1e9 == pytest.approx(2 * (total - vision))
        assert parts["float32 masters"] * 1e9 == pytest.approx(4 * (total - vision))
        assert parts["AdamW moments"] * 1e9 == pytest.approx(8 * (total - vision))
    assert "saving" not in phases  # the CPU's memory
    settings.beta, on_cpu = 0.0, Facts(read, 100, 100, False, 1, "cpu", "sdpa")
    phases = estimate_memory(settings, on_cpu)
    assert "reference" not in phases and not phases["training"]["reference"]
    assert phases["saving"]["file on its way"] * 1e9 == pytest.approx(16 * (total - vision))
    settings.save_steps = 0
    phases = estimate_memory(settings, on_cpu)
    assert phases["saving"]["file on its way"] * 1e9 == pytest.approx(8 * total)


SIZES = {"Qwen2-VL 2B": (2_208_985_600, 1), "Qwen2-VL 7B": (8_291_375_616, 8)}
SIZES |= {"Qwen2.5-VL 7B": (8_292_166_656, 8), "Qwen3-VL 8B": (8_767_123_696, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_published_models_fit_the_machines_that_are_asked_for(name):
    """2B on one card of 80 GB, 7B and 8B on eight, with the flags' defaults; 7B not on one."""
    total, world = SIZES[name]
    config = parse_config(published(name), name)
    model = Skeleton(config)
    parts = [*model.layers, *model.blocks]
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert model.counts.whole == total
    assert model.counts.in_layers == sum(sizes) and model.counts.largest_layer == max(sizes)
    assert peak(config, world) < 70, "leave room for CUDA, NCCL and fragments"
    if name == "Qwen2-VL 7B":
        assert peak(config, 1) > 120
        whole = peak(config, 8)
        assert whole < peak(config, 8, shard_size=4) < peak(config, 4, shard_size=4) + 1
        assert peak(config, 8, reshard_after_forward=False) > whole + 10
        assert peak(config, 8, cpu_offload=True) < whole - 10


def test_layers_of_one_kind_are_asked_once():
    """Alike are those with alike parameters: here two decoder layers of four have an adapter."""
    model = Skeleton(family_config("qwen3_vl"))
    assert list(kinds(model.layers).values()) == [4] and list(kinds(model.blocks).values()) == [4]
    targets = tuple(f"model.layers.{i}.self_attn.q_proj" for i in (1, 2))
    model = Skeleton(family_config("qwen3_vl"), LoRA(4, 8, targets))
    assert sorted(kinds(model.layers).values()) == [2, 2]


def advice(name: str, gb: float, world: int = 1, **flags) -> tuple[list[str], str]:
    """The lines, and what the last one advises."""
    config = parse_config(published(name), name)
    settings = TrainingConfig(model_name_or_path="m", dataset_name="d", **flags)

    def largest(settings, world):
        return peak_gb(settings, facts(config, world))

    lines = advise(settings, world, largest, gb)
    return lines, lines[-1].strip()


@pytest.mark.slow
def test_the_plan_says_which_flags_make_a_model_fit():
    lines, last = advice("Qwen2.5-VL 7B", 24)
    assert lines[0].startswith("too much  175.3 GB, and 22.5 are usable of 24.")
    assert last == "it fits with --tokens_per_pack 8192 --use_peft: 20.9 GB"
    assert sum("--freeze_vision" in line for line in lines) == 1
    small = advice("Qwen2-VL 2B", 24)[1]
    assert small == "it fits with --tokens_per_pack 8192 --optim adamw_8bit: 21.5 GB"
    last = advice("Qwen2.5-VL 7B", 16)[1]
    assert last == "it fits with --use_peft --load_in_4bit: 14.9 GB"
    last = advice("Qwen2.5-VL 7B", 24, optim="adamw_8bit", cpu_offload=True)[1]
    assert "--use_peft (without --optim, --cpu_offload): 20.9 GB" in last
    assert advice("Qwen2.5-VL 7B", 24, use_peft=True, tokens_per_pack=4096)[0] == [
        "fits      19.2 of the 22.5 GB that are usable of 24"
    ]
    assert advice("Qwen2-VL 2B", 48)[1] == "it fits with --freeze_vision: 35.5 GB"
    assert advice("Qwen2.5-VL 72B", 24)[1].startswith("no flag makes it fit")
    lines, _ = advice("Qwen2.5-VL 7B", 10, use_peft=True, tokens_per_pack=2048)
    assert not any("--beta" in line or "--freeze" in line for line in lines), "no effect there"
    lines, last = advice("Qwen2.5-VL 7B", 24, world=2)
    assert any("--cpu_offload" in line for line in lines) and last.startswith("it fits with")


@pytest.mark.slow
def test_what_is_advised_is_what_the_estimate_says():
    """Each line's number is that of the plan with the line's flag."""
    lines, _ = advice("Qwen3-VL 4B", 24)
    found = dict(re.findall(r"^  (--\w+(?: [\d.]+)?) +([\d.]+) GB", "\n".join(lines), re.MULTILINE))
    config = parse_config(published("Qwen3-VL 4B"), "x")
    for flag, gb in found.items():
        name, _, value = flag.removeprefix("--").partition(" ")
        change = {name: float(value) if "." in value else int(value)} if value else {name: True}
        assert peak(config, 1, **change) == pytest.approx(float(gb), abs=0.06)
    assert len(found) > 5


def test_no_more_parts_than_prompts_are_advised():
    """--prompts_per_step 4 would be refused beside --num_minibatches 8."""
    for parts, advised in ((4, True), (8, False)):
        found = changes(TrainingConfig(num_minibatches=parts), 1)
        assert any("prompts_per_step" in change.flags for change in found) == advised


def test_the_plan_says_where_ranks_wait_for_others_in_each_update():
    for prompts, parts, world, waits in (
        (8, 4, 2, False),
        (8, 4, 3, True),
        (8, 8, 1, False),
        (2, 1, 4, False),
    ):
        config = TrainingConfig(prompts_per_step=prompts, num_minibatches=parts)
        assert bool(waiting(config, world)) == waits


def test_a_part_is_trained_in_a_smaller_pack_and_all_are_scored():
    config = parse_config(published("Qwen2-VL 2B"), "x")
    facts = Facts(config, 100, 64, True, 2, "cuda", "flash_attention_2")
    settings = TrainingConfig(prompts_per_step=8, num_generations=2, max_completion_length=50)
    whole = Estimate(settings, facts)
    cut = Estimate(replace(settings, num_minibatches=3), facts)
    group = (100, 50, 50)  # 4 prompts a rank, 2 of them at most in a part
    assert whole.pack == (group,) * 4 and cut.pack == (group,) * 2
    assert cut.reference() == whole.reference()
    assert cut.peaks()[0][0] < whole.peaks()[0][0], "activations"


@pytest.mark.slow
def test_a_gpu_is_planned_for_without_one(tmp_path, capsys):
    argv = ["--dry_run", "--gpu_memory", "24", "--output_dir", str(tmp_path / "run")]
    assert train_cls.main(argv) == 0
    out = capsys.readouterr().out
    assert train_cls.main([*argv, "--cpu_offload"]) == 0, "no GPU here, but one is planned for"
    assert "bfloat16, flash_attention_2, 1 x cuda" in out and "libraries" not in out
    assert "GB that are usable of 24" in out
    with pytest.raises(ValueError, match="--gpu_memory 24 needs --dry_run: it plans"):
        train_cls.main(argv[1:])


@pytest.mark.slow
def test_cuda_graphs_are_taken_where_they_fit(tmp_path, capsys):
    """By default; what they keep is in every phase of the plan."""

    def said(*flags):
        flags += ("--max_completion_length", "4096", "--output_dir", str(tmp_path / "run"))
        train_cls.main(["--dry_run", *flags])
        out = capsys.readouterr().out
        peak = float(re.search(r"about ([\d.]+) GB a rank", out)[1])
        return peak, "with CUDA graphs" in out, "without CUDA graphs" in out

    assert said()[1:] == (False, False), "there is no GPU"
    needed, *chosen = said("--gpu_memory", "24")
    assert chosen == [True, False]
    without, *chosen = said("--gpu_memory", "24", "--cuda_graphs", "false")
    assert chosen == [False, True] and without < needed
    between = (without + needed) / 2 / USABLE
    assert said("--gpu_memory", f"{between:.4f}") == (without, False, True)
    assert said("--gpu_memory", f"{between:.4f}", "--cuda_graphs", "true") == (needed, True, False)
    with pytest.raises(ValueError, match="--cuda_graphs: there is no CUDA device"):
        said("--cuda_graphs", "true")


@pytest.mark.slow
def test_a_card_of_24_gb_holds_what_is_asked_for():
    """22.5 GB are usable: 2B and 3B with all weights, 7B and 8B with LoRA, under 15 in 4 bits; and
    7B with all weights on eight cards of 80 GB, 32 prompts a step."""

    def gb(name, world=1, **flags):
        return peak(parse_config(published(name), name), world, **flags)

    small, light = {"tokens_per_pack": 4096}, {"optim": "adamw_8bit"}
    assert gb("Qwen2-VL 2B", **small, **light) < 22.5
    assert gb("Qwen3-VL 2B", **small, **light) < 22.5
    assert gb("Qwen2.5-VL 3B", **small, **light, cpu_offload=True) < 22.5
    assert gb("Qwen2.5-VL 7B", use_peft=True, **small) < 22.5
    assert gb("Qwen3-VL 8B", use_peft=True, prompts_per_step=4, **small) < 22.5
    for name in ("Qwen2.5-VL 7B", "Qwen3-VL 8B"):
        assert gb(name, use_peft=True, load_in_4bit=True, **small) < 15
    assert gb("Qwen2.5-VL 7B", 8, prompts_per_step=32) < 75


@pytest.mark.parametrize(
    "flags, without",
    [
        ({"optim": "adamw_anyprecision"}, (18 - 8) * 2.209),  # bytes a weight, 1e9 weights
        ({"optim": "adamw_8bit"}, (18 - 6.03) * 2.209),
        ({"cpu_offload": True}, 12 * 2.209 + 2 * 2.209),  # masters, moments and the reference
        ({"use_peft": True, "load_in_4bit": True}, None),
    ],
)
def test_what_flags_save_is_what_they_take_away(flags, without):
    """Of Qwen2-VL 2B's optimizer phase, or with adapters of its reference pass."""
    config = parse_config(published("Qwen2-VL 2B"), "x")

    def phases(**flags):
        settings = TrainingConfig(model_name_or_path="m", dataset_name="d", **flags)
        memory = estimate_memory(settings, facts(config, 1))
        return {name: sum(parts.values()) for name, parts in memory.items()}

    if without is None:
        matrices = 28 * (1536 * (1536 + 2 * 256 + 1536) + 3 * 1536 * 8960)
        saved = phases(use_peft=True)["reference"] - phases(**flags)["reference"]
        unpacked = 1536 * 8960 * 2
        assert saved == pytest.approx((matrices * (2 - 0.5159) - unpacked) / 1e9, rel=1e-3)
        return
    saved = phases()["optimizer"] - phases(**flags)["optimizer"]
    if "cpu_offload" in flags:
        without += 4 * 2.209  # float32 gradients
    else:
        without -= 36 * 2**23 / 1e9  # rows that are worked on at once
    assert saved == pytest.approx(without, rel=1e-3)


def test_the_plan_counts_what_a_loss_holds():
    """A buffer of a chunk's logits for the entropy; slopes of a pack for whole completions. With a
    large vocabulary the head's part is where a training pass holds most."""
    config = tiny_config(vocab=60_000)
    small = {"tokens_per_pack": 600, "num_generations": 4, "prompts_per_step": 2}
    settings = TrainingConfig(model_name_or_path="m", dataset_name="d", **small)
    on_cpu = Facts(config, 20, 8, False, 1, "cpu", "sdpa")

    def held(**changes) -> float:
        memory = estimate_memory(replace(settings, **changes), on_cpu)
        return sum(memory["training"].values()) * 1e9

    read, chunk = 580, chunk_tokens(60_000, "cpu")
    buffer, slopes = chunk * 60_000 * 4, read * config.hidden_size * 4
    whole = {"importance_sampling_level": "sequence"}
    assert held(entropy_coef=0.01) - held() == pytest.approx(buffer, rel=1e-6)
    assert held(**whole) - held() == pytest.approx(slopes, rel=1e-6)
    both = held(**whole, entropy_coef=0.01) - held()
    assert both == pytest.approx(buffer + 2 * slopes, rel=1e-6)


def test_an_installed_flash_attn_is_not_asked_on_the_meta_device(monkeypatch):
    """It has kernels for a GPU alone, and a plan must not need one."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=None))
    flash_varlen.cache_clear()
    try:
        model = Skeleton(tiny_config())
        assert model.decode(model.layers, ((5, 3, 2),), gradient=True).left > 0
    finally:
        flash_varlen.cache_clear()
