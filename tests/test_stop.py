"""Stop strings: found in tokens as in the decoded text, on every shape of a decode step."""

import random
from types import SimpleNamespace

import pytest
import torch

import models.decoding.generate as generation
from data.errors import UserError
from data.rows import Row
from grpo.flags.config import TrainingConfig
from grpo.plan.plan import endings
from grpo.rollout import Draw, sample_groups
from grpo.run.checks import check_rows
from models.decoding.draw import Sampling
from models.decoding.generate import generate
from models.decoding.rectangle import SHAPES, HalvedRectangle, SmallestRectangle
from models.decoding.stop import (
    END,
    Ends,
    automaton,
    byte_characters,
    check_stop,
    read_stop,
    token_bytes,
)
from models.load import load_model
from models.processor import Processor
from models.prompt import Prompt, mrope_position_ids
from rewards.cls import accuracy_reward
from rewards.format import format_reward
from tests.runs import CHECKPOINT, SHARED, Checked
from tests.test_models import GRIDS
from tests.tiny import cut_short, stop_strings, tiny_config, tiny_model, tiny_prompt

QWEN2 = SHARED / "qwen2_tokenizer"


@pytest.fixture(scope="module")
def demo():
    return Processor(CHECKPOINT)


@pytest.fixture(scope="module")
def qwen2():
    if not QWEN2.is_dir():
        pytest.skip("needs ../shared")
    from transformers import AutoTokenizer

    class Genuine:  # hashable, as a Processor is
        tokenizer = AutoTokenizer.from_pretrained(QWEN2)
        config = SimpleNamespace(vocab_size=151936)
        stop_ids = (151643, 151645)

    return Genuine()


def length_in_text(tokenizer, ids: list[int], texts, stop_ids) -> int | None:
    """Tokens until a completion ends, token by token in the decoded text; None if it does not."""
    for count, token in enumerate(ids, start=1):
        text = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if token in stop_ids or any(one in text for one in texts):
            return count
    return None


def looked_at(ends: Ends, tokens: torch.Tensor, look: int) -> list[int | None]:
    """Each row's tokens until its end, found `look` tokens at a time."""
    parts = [ends(tokens[:, i : i + look]) for i in range(0, tokens.shape[1], look)]
    ended = torch.cat(parts, dim=1)
    return [row.index(True) + 1 if any(row) else None for row in ended.tolist()]


TEXTS = [
    ["</answer>"],
    ["</answer>", "</think>\n\n", "。"],
    ["aab"],
    ["abab", "ba", "abac"],  # a part of another, and one that holds another
    ["ab", "abcd", "bc"],  # the beginning of another
    ["日本", "é!", "🌼"],  # characters of two, three and four bytes
    [" ", "\n"],
    ["1"],
    ["<|vision_start|>"],  # in ordinary tokens
]


@pytest.mark.parametrize(
    "which, texts",
    [*(("demo", texts) for texts in TEXTS), *(("qwen2", TEXTS[i]) for i in (1, 8))],
    ids=repr,
)
def test_the_end_is_where_the_decoded_text_has_it(request, which, texts):
    """Random tokens, many of them pieces of the strings, cut in every way: in characters, in the
    tokenizer's own way, with a neighbour. Looked for 1, 5 and 16 tokens at a time."""
    processor = request.getfixturevalue(which)
    tokenizer, chance = processor.tokenizer, random.Random(0)
    count, specials = len(tokenizer), len(tokenizer.added_tokens_decoder)
    byte_ids = tokenizer.convert_tokens_to_ids(byte_characters())
    bank = [byte_ids[byte] for text in texts for byte in text.encode()]
    for text in texts:
        for near in (text, text + ">", text + "\n", "a" + text, text[:-1], text[1:] + text):
            bank += tokenizer(near, add_special_tokens=False)["input_ids"]
    rows = []
    for _ in range(40):
        row = []
        while len(row) < 37:
            kind = chance.random()
            text = chance.choice(texts)
            cut = chance.randrange(len(text) + 1)
            if kind < 0.03:
                for part in (text[:cut], text[cut:] + chance.choice(["", ">", "\n"])):
                    row += tokenizer(part, add_special_tokens=False)["input_ids"]
            elif kind < 0.06:
                row += [byte_ids[byte] for byte in text.encode()]
            elif kind < 0.3:
                row.append(chance.choice(bank))
            elif kind < 0.32:
                row.append(chance.choice(list(processor.stop_ids)))
            elif kind < 0.33:
                row.append(count - 1 - chance.randrange(specials))  # special tokens
            else:
                row.append(chance.randrange(count))
        rows.append(row[:37])
    expected = [length_in_text(tokenizer, row, texts, processor.stop_ids) for row in rows]
    stop = read_stop(processor, tuple(texts))
    by_ids = [length_in_text(tokenizer, row, [], processor.stop_ids) for row in rows]
    assert len({*expected}) > 3 and expected != by_ids, "a blunt test"
    for look in (1, 5, 16):
        ends = Ends(processor.stop_ids, stop, len(rows), torch.device("cpu"))
        assert looked_at(ends, torch.tensor(rows), look) == expected
    sampling = Sampling(37, stop_ids=tuple(processor.stop_ids), stop=stop)
    for row, length in zip(rows, expected, strict=True):
        assert sampling.ended(row[:length]) == (length is not None)
        if length and length > 1:
            assert not sampling.ended(row[: length - 1])


def test_the_bytes_of_tokens_are_those_of_the_decoded_text(qwen2):
    """Of Qwen2's, ten at a time, cut characters among them."""
    pieces = token_bytes(qwen2.tokenizer, 151936)
    assert len(pieces) == 151936 and not any(pieces[len(qwen2.tokenizer) :])
    ids = list(range(len(qwen2.tokenizer)))
    random.Random(0).shuffle(ids)
    for start in range(0, 15000, 10):
        part = ids[start : start + 10]
        text = qwen2.tokenizer.decode(part, clean_up_tokenization_spaces=False)
        assert b"".join(pieces[i] for i in part).decode(errors="replace") == text


def test_added_tokens_and_other_tokenizers():
    """An added token stands for its own UTF-8 if one of its characters stands for no byte."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(byte_characters())}
    own = Tokenizer(BPE(vocabulary, []))
    own.decoder = decoders.ByteLevel()
    added = ["<think>", "an end", "日", "\n", "é", "\xad"]
    own.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    pieces = token_bytes(tokenizer, 270)
    assert pieces[:256] == [bytes([byte]) for byte in range(256)]
    for i in range(256, 256 + len(added)):
        text = tokenizer.decode([i, 65], clean_up_tokenization_spaces=False)
        assert (pieces[i] + b"A").decode(errors="replace") == text
    own.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="--stop needs a byte-level BPE tokenizer"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=own), 256)


def test_the_automaton_against_all_short_texts():
    """Every text of up to eight bytes out of a, b: it ends where a string first stands."""
    chance = random.Random(1)
    for _ in range(30):
        strings = [
            bytes(chance.choice(b"ab") for _ in range(chance.randrange(1, 5))) for _ in range(3)
        ]
        steps = automaton(strings).tolist()
        for number in range(2**8):
            text, state = bytes(b"ab"[number >> i & 1] for i in range(8)), 1
            for size in range(1, 9):
                state = steps[state][text[size - 1]]
                assert (state == END) == any(s in text[:size] for s in strings)


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strings", [(b"abbab",), (b"abababab", b"bbbbbbb")])
@pytest.mark.parametrize("shapes", [SmallestRectangle(), HalvedRectangle(2, 8), HalvedRectangle()])
def test_completions_are_those_without_stop_strings_cut_short(monkeypatch, shapes, strings):
    """And their log-probs; at limits that end at a look, behind it, and before the first."""
    monkeypatch.setitem(SHAPES, "cpu", shapes)
    model = tiny_model(tiny_config())
    prompts = [tiny_prompt(model.config, grids, seed=i) for i, grids in enumerate(GRIDS.values())]
    uniforms = torch.rand(24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stop_ids, whole = (3, 40), Sampling(32)
    ids, logps = generate(model, prompts, 8, whole, uniforms)
    stop = stop_strings(strings, stop_ids)
    expected = [cut_short(one, stop, stop_ids) for one in ids]
    assert len({*map(len, expected)}) > 4, "a blunt test"
    for limit in (1, 15, 32):
        sampling = Sampling(limit, stop_ids=stop_ids, stop=stop)
        found, found_logps = generate(model, prompts, 8, sampling, uniforms[:, :limit])
        assert found == [one[:limit] for one in expected]
        for one, own in zip(logps, found_logps, strict=True):
            torch.testing.assert_close(own, one[: len(own)], atol=1e-6, rtol=1e-6)
        for completion, long in zip(found, expected, strict=True):
            whole = len(long) <= limit and (len(long) < 32 or sampling.ended(long))
            assert sampling.ended(completion) == whole


def test_what_stands_in_the_prompt_does_not_count(demo, monkeypatch):
    """Nor what begins there and ends in the completion. One string ends it, so it is whole; without
    strings the limit does."""

    def ids_of(text):
        return demo.tokenizer(text, add_special_tokens=False)["input_ids"]

    answer = ids_of("wer>x</answer>y and so on")
    ids = torch.tensor(ids_of("</answer></ans"))
    pixels, grids = demo.encode_images([])
    prompt = Prompt(ids, *mrope_position_ids(ids, grids, demo.config), pixels, grids, ())
    model = load_model(CHECKPOINT, torch.float32, "cpu")
    row = SimpleNamespace(prompt=lambda processor: prompt)
    for texts, length in ((["</answer>"], len(ids_of("wer>x</answer>"))), (None, len(answer))):
        script = iter(answer)

        def scripted(logits, sampling, uniform, script=script):  # whatever the model says
            return torch.full((len(logits),), next(script)), torch.zeros(len(logits))

        monkeypatch.setattr(generation, "sample", scripted)
        config = TrainingConfig(max_completion_length=len(answer), stop=texts)
        sampling = Sampling.of(config, demo).times(1)
        (group,) = sample_groups(model, [Draw(0, row)], demo, sampling, 0, 0)
        assert group.completion_ids == [answer[:length]]
        assert group.truncated == [texts is None]


def test_two_samplings_with_the_same_strings_are_one_key(demo):
    """Of a captured decode step; the strings' table is made once."""
    one, two, other = (
        Sampling.of(TrainingConfig(stop=stop), demo) for stop in (["a"], ["a"], ["b"])
    )
    assert one == two and hash(one) == hash(two) and one.stop is two.stop
    assert one != other and Sampling.of(TrainingConfig(), demo).stop is None
    assert one.greedy().stop is one.stop and one.times(3).stop is one.stop


# ---- what a user is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, message",
    [
        ([""], "--stop is an empty text, which would end every completion at once"),
        (["x" * 10_000], "--stop: 10,000 bytes of UTF-8 in all; at most 250"),
        (["é" * 126], "--stop: 252 bytes"),
        (["\udcff"], "is no UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_looked_for(texts, message):
    with pytest.raises(UserError, match=message):
        check_stop(texts)
    config = TrainingConfig(model_name_or_path="m", dataset_name="d", stop=texts)
    with pytest.raises(UserError, match=message):
        config.check()


def test_the_longest_texts_fit_in_the_table(demo):
    """And are found at their end, not before."""
    text = "ab" * 62 + "c" * 126
    stop = read_stop(demo, (text,))
    ids = demo.tokenizer("ab" + text, add_special_tokens=False)["input_ids"]
    ends = Ends(demo.stop_ids, stop, 1, torch.device("cpu"))
    assert looked_at(ends, torch.tensor([ids]), 16) == [len(ids)]


@pytest.mark.parametrize(
    "stop, lines",
    [
        (None, []),
        (["</answer>", "</answer>"], ["also ends at '</answer>', which stays in it"]),
        ([" ", "</s>"], ["ends at ' ' or '</s>', which stays"]),
        (["<|im_end|>"], ["ends at", "'<|im_end|>' is an end token, so --stop need not name it"]),
        (["x<|vision_start|>"], ["ends at", "holds <|vision_start|>, a special token that no"]),
        (
            ["a\\n"],
            ["ends at", r"""write $'\n' in bash, "\n" in a YAML file"""],
        ),
    ],
)
def test_the_plan_says_where_completions_end(demo, stop, lines):
    found = endings(TrainingConfig(stop=stop), demo)
    assert len(found) == len(lines)
    for line, part in zip(found, lines, strict=True):
        assert part in line


class OneRow(Checked):
    sizes = ((),)  # no images


@pytest.mark.parametrize(
    "stop, paid, message",
    [
        ("</answer>", "think", ""),
        ("x</answer>", "answer", ""),
        (
            "</think>",
            "think",
            "row 0 .*--stop '</think>' would cut its own solution, '<th",
        ),
        ("</think>", "answer", ""),
        ("blue", "answer", "--stop 'blue' would cut .*give --stop another text"),
    ],
)
def test_a_string_that_cuts_a_right_answer_is_refused(demo, stop, paid, message):
    row = Row(0, (), "What?", "<answer>blue flax</answer>")
    rows = OneRow([row])
    rows.faults = []
    task = SimpleNamespace(solution=lambda row: row.solution, answer_format=paid)
    data = SimpleNamespace(splits=[rows], processor=demo, stop=(stop,))

    def score(completion, row, task):
        return {"accuracy": accuracy_reward(completion, row.solution, {}, "exact")}

    if message:
        with pytest.raises(UserError, match=message):
            check_rows(data, task, score, None)
    else:
        assert len(check_rows(data, task, score, None)) == 1


@pytest.mark.parametrize(
    "paid, text",
    [("think", "<think>a</think>\n<answer>b</answer>"), ("answer", "<answer>b</answer>\n")],
)
def test_the_format_reward_of_a_completion_that_ends_at_its_answer(demo, paid, text):
    """That of the same text with an end token behind it; text that goes on is paid for only
    without a string to end at."""
    ids = demo.tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in ([], demo.stop_ids[:1]):
        assert format_reward(demo.completion_text([*ids, *end]), paid) == 1
    assert format_reward(demo.completion_text([*ids, *ids]), paid) == 0
