"""Where a chat template leaves the answer, and the layout of answers that follows from it."""

import json
import os
import shutil

import pytest

import train_cls
import train_det
from data.flowers import rows
from data.wording import Wording
from models.processor import Processor
from rewards.format import format_reward
from rewards.parse import find_answer, ideal_completion
from tests.runs import CHECKPOINT, SHORT, read_lines, train

DETECTION = CHECKPOINT.parent.parent / "demo_det" / "checkpoint"
# As Qwen3.5's: contents are trimmed, and a small model does not think unless it is told to. A large
# one does: then `if enable_thinking is defined and enable_thinking is false` closes the thought.
SWITCHED = """{%- for message in messages %}
{%- set content %}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}{%- endif %}
{%- endfor %}
{%- endif %}
{%- endset %}
{{- '<|im_start|>' + message.role + '\\n' + content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if SWITCH %}{{- '<think>\\n' }}{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
SMALL = SWITCHED.replace("SWITCH", "enable_thinking is defined and enable_thinking is true")
LARGE = SWITCHED.replace("SWITCH", "not (enable_thinking is defined and enable_thinking is false)")
CLOSED = "<think>\n\n</think>\n\n"


def with_template(source, folder, template: str):
    """A copy of a checkpoint with this chat template; its weights are linked."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path, folder / path.name)
        elif path.name != "chat_template.json":
            shutil.copy(path, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The demos' models by script's name with a template as small Qwen3.5's has it; `large`."""
    folder = tmp_path_factory.mktemp("thinking")
    return {
        "cls": with_template(CHECKPOINT, folder / "cls", SMALL),
        "det": with_template(DETECTION, folder / "det", SMALL),
        "large": with_template(CHECKPOINT, folder / "large", LARGE),
    }


SCRIPTS = {"cls": train_cls, "det": train_det}
DATA = {"cls": "demo:flowers", "det": "demo:scenes"}


def flags(checkpoint, name="cls", *more: str, data=None) -> list[str]:
    named = ["--dataset_name", str(data or DATA[name])]
    return ["--model_name_or_path", str(checkpoint), *named, *SHORT, *more]


def plan(capsys, tmp_path, *argv: str, script=train_cls) -> dict[str, list[str]]:
    """The lines of the plan that --dry_run prints, by their first word."""
    output = ["--output_dir", str(tmp_path / "none")]
    assert script.main([*argv, "--dry_run", *output]) == 0
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        lines.setdefault(line[:10].strip(), []).append(line[10:])
    return lines


# ---- the processor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, told, begun, thought",
    [
        ("cls", None, CLOSED, "closed"),
        ("cls", False, CLOSED, "closed"),
        ("cls", True, "<think>\n", "opened"),
        ("large", None, "<think>\n", "opened"),
        ("large", False, CLOSED, "closed"),
        ("large", True, "<think>\n", "opened"),
    ],
)
def test_where_the_prompt_leaves_the_answer(checkpoints, name, told, begun, thought):
    processor = Processor(checkpoints[name], enable_thinking=told)
    assert processor.chat_text("  Which one?\n", 1) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>  Which one?<|im_end|>\n"
        f"<|im_start|>assistant\n{begun}"
    )
    assert (processor.thought, processor.begun) == (thought, begun)
    ids = processor.tokenizer("<answer>rose</answer>")["input_ids"]
    before = begun if thought == "opened" else ""  # a closed thought is the prompt's
    assert processor.completion_text(ids) == f"{before}<answer>rose</answer>"
    plain = Processor(CHECKPOINT).count_tokens("Which?", [(56, 56)])
    assert processor.count_tokens("Which?", [(56, 56)]) > plain


@pytest.mark.parametrize("told", [True, False])
def test_a_template_without_the_switch_refuses_it(tmp_path, told):
    """Also one that only speaks of it."""
    plain = Processor(CHECKPOINT)
    comment = "{# enable_thinking is not known here #}" + plain.tokenizer.chat_template
    for folder in (CHECKPOINT, with_template(CHECKPOINT, tmp_path / "comment", comment)):
        plain = Processor(folder)
        found = plain.thought, plain.opened, plain.begun, plain.can_switch
        assert found == ("open", "", "", False)
        with pytest.raises(ValueError, match=r"--enable_thinking: .* no such switch; leave the"):
            Processor(folder, enable_thinking=told)


@pytest.mark.parametrize(
    "end, thought, opened",
    [
        ("<think>", "opened", "<think>"),
        ("<think></think>", "closed", ""),
        ("</think>\n", "closed", ""),
        ("<think>\nIt is so.\n</think>\n", "closed", ""),
        ("Answer: ", "open", ""),
    ],
)
def test_other_ends_of_a_template(tmp_path, end, thought, opened):
    template = Processor(CHECKPOINT).tokenizer.chat_template
    written = template.replace("assistant\n", f"assistant\n{end}")
    processor = Processor(with_template(CHECKPOINT, tmp_path / "other", written))
    assert (processor.thought, processor.opened) == (thought, opened)


def test_only_the_templates_own_tags_count(checkpoints):
    """What a problem says does not move the answer's place."""
    problem = "Think in <think> </think>.\n<|im_start|>assistant\n<think>"
    for told, end in ((True, "<think>\n"), (False, CLOSED)):
        processor = Processor(checkpoints["cls"], enable_thinking=told)
        assert processor.chat_text(problem, 0).endswith(f"assistant\n{end}")
        assert processor.begun == end


# ---- flags, prompts and the plan ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, more, said",
    [
        ("plain", ["--answer_format", "none"], "--answer_format 'none' is none of think, answer"),
        ("plain", ["--enable_thinking", "false"], "no such switch"),
        ("cls", ["--enable_thinking"], "pass --enable_thinking false or --answer_format think"),
        ("large", [], "pass --enable_thinking false or --answer_format think"),
        ("always", [], "so no completion is an answer alone; pass --answer_format think"),
    ],
)
def test_contradictions_are_refused(checkpoints, tmp_path, name, more, said):
    folder = checkpoints.get(name, CHECKPOINT)
    if name == "always":
        template = SMALL.replace("enable_thinking is defined and enable_thinking is true", "true")
        folder = with_template(CHECKPOINT, tmp_path / "always", template)
    more = more if "--answer_format" in more else ["--answer_format", "answer", *more]
    with pytest.raises(ValueError) as error:
        train_cls.main([*flags(folder), *more, "--dry_run", "--output_dir", str(tmp_path / "run")])
    assert said in str(error.value)
    assert ("--enable_thinking false" in str(error.value)) == ("--enable_thinking false" in said)


@pytest.mark.slow
def test_the_plan_says_how_answers_are_laid_out(checkpoints, tmp_path, capsys):
    """The demo's own prompts ask for <think>, and stay as they are."""
    ends = f"the prompt has closed the thought (it ends in {CLOSED!r})"
    asks = "the first row's problem asks for <think>, which is not paid for; --answer_format "
    asks += "think pays for it"
    lines = plan(capsys, tmp_path, *flags(CHECKPOINT))
    assert lines["answers"] == ["<think>, then <answer>; the prompt leaves the answer open"]
    lines = plan(capsys, tmp_path, *flags(CHECKPOINT, "cls", "--answer_format", "answer"))
    assert lines["answers"] == ["<answer> alone; the prompt leaves the answer open", asks]
    for name in SCRIPTS:
        lines = plan(capsys, tmp_path, *flags(checkpoints[name], name), script=SCRIPTS[name])
        assert lines["answers"] == [f"<answer> alone; {ends}", asks]
    lines = plan(capsys, tmp_path, *flags(checkpoints["cls"], "cls", "--enable_thinking"))
    opened = "the prompt has opened the thought (it ends in '<think>\\n')"
    assert lines["answers"] == [f"<think>, then <answer>; {opened}"]
    lines = plan(capsys, tmp_path, *flags(checkpoints["cls"], "cls", "--answer_format", "think"))
    assert lines["answers"][0] == f"<think>, then <answer>; {ends}"
    assert "a thought of its own" in lines["answers"][1] and len(lines["answers"]) == 2


@pytest.fixture
def photos(tmp_path):
    """Four drawings in folders of two classes, and as a COCO file."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "flower"}]}
    for number, row in enumerate(rows("train", 4)):
        name = f"{number}.png"
        folder = tmp_path / "photos" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco").mkdir(exist_ok=True)
        row["image"].save(folder / name)
        row["image"].save(tmp_path / "coco" / name)
        width, height = row["image"].size
        size = {"width": width, "height": height}
        content["images"].append({"id": number, "file_name": name, **size})
        box = {"bbox": [1, 2, 20, 30], "area": 600, "iscrowd": 0}
        content["annotations"].append(
            {"id": number + 1, "image_id": number, "category_id": 1, **box}
        )
    (tmp_path / "coco" / "train.json").write_text(json.dumps(content))
    return {"cls": tmp_path / "photos", "det": tmp_path / "coco" / "train.json"}


def test_our_own_prompts_ask_for_what_is_paid(checkpoints, photos, tmp_path, capsys):
    for name, data in photos.items():
        own = flags(checkpoints[name], name, data=data)
        for more, thinks in (([], False), (["--enable_thinking"], True)):
            lines = plan(capsys, tmp_path, *own, *more, script=SCRIPTS[name])
            (prompt,) = lines["prompt"]
            assert ("<think>" in prompt) == ("First think" in prompt) == thinks
            assert "between <answer> and </answer>" in prompt and "{" not in prompt.split(":")[0]
            assert len(lines["answers"]) == 1, "it asks for what is paid for"
    own = flags(checkpoints["cls"], "cls", data=photos["cls"])
    template = "Think in <think> </think>: which of {classes}?"
    lines = plan(capsys, tmp_path, *own, "--prompt_template", template)
    assert lines["prompt"][0].startswith("Think in <think> </think>: which of")
    assert "asks for <think>" in lines["answers"][1]


def test_wording():
    ask = Wording(answer_format="answer")
    assert ask.class_problem(["a", "b"]) == (
        "What does this image show? Choose one of: a, b. Give the answer alone, between <answer> "
        "and </answer>."
    )
    assert ask.boxes_problem("cat") == (
        "Find every object of the category 'cat' in this image. Give the corners x1, y1, x2, y2 of "
        "each one's box in thousandths of the image, from 0 to 1000, and your confidence from 0 to "
        "1. Give the list alone, between <answer> and </answer>:\n"
        "<answer>[{'Position': [x1, y1, x2, y2], 'Confidence': 0.9}, ...]</answer>\n"
        "If there is none, answer <answer>No Objects</answer>."
    )
    asked = Wording().class_problem(["a"])
    assert asked.startswith("What does this image show? Choose one of: a. First think, between <th")
    assert asked.endswith("Then give the answer alone, between <answer> and </answer>.")
    layout = "\n<think>...</think><answer>[{'Position': [x1, y1, x2, y2], 'Confidence': 0.9}, "
    assert layout in Wording().boxes_problem("cat")


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("case", ["true", "false", "answer", "another"])
def test_a_short_run_of_each_script(checkpoints, tmp_path, name, case):
    """The demo's models have learned to think first, whatever the prompt's end."""
    model, more = checkpoints[name], ["--enable_thinking", case]
    if case == "answer":
        model, more = SCRIPTS[name].DEMO.parent / "checkpoint", ["--answer_format", "answer"]
    if case == "another":
        more = ["--answer_format", "think"]
    output = tmp_path / "run"
    steps = train(output, *flags(model, name, *more), script=SCRIPTS[name])
    wanted = "think" if case in ("true", "another") else "answer"
    completions = read_lines(output / "completions.jsonl")
    for line in completions:
        text, rewards, reason = line["completion"], line["rewards"], line["reasons"].get("format")
        assert text.startswith("<think>\n") == (case == "true")
        assert rewards["format"] == format_reward(text, wanted)
        layout = "<think>...</think><answer>...</answer>"
        unpaid = f"not {layout}" if wanted == "think" else "not <answer>...</answer> alone"
        assert reason == (None if rewards["format"] else unpaid)
        assert line["answer"] == find_answer(text)[0]
    assert steps[-1]["sampling/logp_difference_max"] < 1e-4
    if (name, case) == ("cls", "another"):  # a list of boxes is longer than SHORT allows
        assert any(line["rewards"]["format"] for line in completions)


@pytest.mark.slow
def test_the_diagnosis_knows_that_the_prompt_has_closed_the_thought(checkpoints, tmp_path, capsys):
    more = ["--diagnose_after", "2"]
    train(tmp_path / "run", *flags(checkpoints["cls"], "cls", *more))
    said = "the prompt has closed the thought, and 16 answers open another since step 1 "
    text = capsys.readouterr().out
    assert "format has been 0, its minimum" in text and f"diagnosis: {said}" in text
    assert said in (tmp_path / "run" / "diagnosis.txt").read_text()
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[2]["diagnosis/another_thought"] == 1


@pytest.mark.slow
def test_a_resumed_run_has_the_same_layout(checkpoints, tmp_path):
    run, wanted = tmp_path / "run", flags(checkpoints["cls"], "cls", "--answer_format", "answer")
    train(run, *wanted, "--save_steps", "1")
    again = ["--resume_from_checkpoint", "auto", "--max_steps", "3"]
    for other, said in (
        (["--answer_format", "think"], "--answer_format: 'answer' then, 'think' now"),
        (["--enable_thinking", "false"], "--enable_thinking: None then, False now"),
    ):
        with pytest.raises(ValueError, match=said):
            train(run, *again, *other)
    assert len(train(run, *again)) == 4


def test_ideal_completions():
    for solution in ("rose", " <answer>rose</answer>\n"):
        for wanted in ("think", "answer"):
            text = ideal_completion(solution, wanted)
            assert format_reward(text, wanted) == 1 and find_answer(text) == ("rose", "")
            assert format_reward(text, {"think": "answer", "answer": "think"}[wanted]) == 0
