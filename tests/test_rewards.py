"""Accept and reject tables for find_answer, the format reward and the classification reward."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from rewards.cls import (
    LONGEST_NAME,
    accuracy_reward,
    normalize,
    read_aliases,
    read_class,
    unknown_classes,
)
from rewards.format import format_reward
from rewards.parse import find_answer

MEGABYTE = 2**20
HUGE = {
    "answer": "<answer>" * (MEGABYTE // 8),
    "close": "</answer>" * (MEGABYTE // 9),
    "think": "<think>" * (MEGABYTE // 7),
    "end of think": "</think>" * (MEGABYTE // 8),
    "half tags": "<answer" * (MEGABYTE // 7),
    "brackets": "<" * MEGABYTE,
    "white space": "<answer>" + " \n" * (MEGABYTE // 2) + "</answer>",
    "dashes": "<answer>" + "-" * MEGABYTE + "</answer>",
    "quotes": "<answer>" + "\"'" * (MEGABYTE // 2) + "</answer>",
    # Combining marks in an order that takes unicodedata.normalize minutes to sort.
    "marks": "<answer>a" + "\u0301\u0316" * (MEGABYTE // 2) + "</answer>",
    "ligatures": "<answer>" + "\ufdfa" * MEGABYTE + "</answer>",
}


def said(answer: str) -> str:
    return f"<think>Petals in clusters.</think>\n<answer>{answer}</answer>"


# ---------------------------------------------------------------------------------- find_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>x</think><answer>rose</answer>", "rose"),
        ("<answer>rose</answer>", "rose"),
        ("<think>x</think>\n\n<answer>\n  garden\nphlox\n</answer>\n", "garden\nphlox"),
        ("<think>x</think>So: <answer>rose</answer>, I think", "rose"),
        ("<think><answer>tulip</answer></think><answer>rose</answer>", "rose"),
        ("<answer>tulip</answer></think><answer>rose</answer>", "rose"),
        ("</think></think><answer>rose</answer>", "rose"),
        ("<answer>a</answer></think><answer>b</answer></think><answer>rose</answer>", "rose"),
        ("<answer>rose <think></answer>", "rose <think>"),
        ("<answer>a < b > c</answer>", "a < b > c"),
        ("<answer><b>rose</b></answer>", "<b>rose</b>"),
        ("<answer>ro\0se</answer>", "ro\0se"),
        ("<answer>\ud800</answer>", "\ud800"),
        ("<answer>\u00a0\u3000rose\u2003</answer>", "rose"),
        ("<ANSWER>tulip</ANSWER><answer>rose</answer>", "rose"),
    ],
)
def test_finds_the_answer(completion, answer):
    assert find_answer(completion) == (answer, "")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "no answer tag"),
        ("rose", "no answer tag"),
        ("<think>never closed <answer>rose</answer>", "thought not closed"),
        (" \n<think>\n<think>rose", "thought not closed"),
        ("<think>x</think>rose", "no answer tag"),
        ("<think><answer>rose</answer></think>", "no answer tag"),
        ("<answer>rose</answer></think>", "no answer tag"),
        ("<answer>rose</answer></think> that was it", "no answer tag"),
        ("<answer>tulip</think>rose</answer>", "no answer tag"),
        ("rose</answer>", "no answer tag"),
        ("<Answer>rose</Answer>", "no answer tag"),
        ("<ANSWER>rose</ANSWER>", "no answer tag"),
        ("< answer>rose</ answer>", "no answer tag"),
        ("<answer >rose</answer >", "no answer tag"),
        ("<answ\u200ber>rose</answer>", "no answer tag"),
        ("<an\0swer>rose</answer>", "no answer tag"),
        ("\uff1canswer\uff1erose\uff1c/answer\uff1e", "no answer tag"),
        ("<answer>rose", "answer not closed"),
        ("<answer>rose</ANSWER>", "answer not closed"),
        ("<answer>rose</answer", "answer not closed"),
        ("</answer>rose<answer>", "answer not closed"),
        ("<answer>", "answer not closed"),
        ("<answer></answer>", "empty answer"),
        ("<answer> \n\t\u00a0\u3000</answer>", "empty answer"),
        ("<answer>rose</answer><answer>rose</answer>", "several answers"),
        ("<answer>rose</answer><answer></answer>", "several answers"),
        ("<answer><answer>rose</answer></answer>", "several answers"),
        ("<answer><answer>rose</answer>", "several answers"),
        ("<answer>rose</answer></answer>", "several answers"),
        ("<answer>rose<answer>", "several answers"),
        ("rose</answer></answer>", "several answers"),
    ],
)
def test_says_why_no_answer_is_found(completion, reason):
    assert find_answer(completion) == (None, reason)


# -------------------------------------------------------------------------------- format_reward


@pytest.mark.parametrize(
    "completion",
    [
        "<think>x</think><answer>y</answer>",
        "<think>x</think>\n<answer>y</answer>",
        "  \n<think>\nx\n\ny\n</think> \t\n <answer>\ny\n</answer>\n\n",
        "<think>a < b</think><answer><b>y</b></answer>",
        "<think>x</think><answer>\ud800\0\u200f</answer>",
        "<think>in <ANSWER> case</think><answer>y</answer>",
    ],
)
def test_format_accepts(completion):
    assert format_reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "y",
        "<think>x</think>",
        "<answer>y</answer>",
        "<think></think><answer>y</answer>",
        "<think> \n</think><answer>y</answer>",
        "<think>x</think><answer></answer>",
        "<think>x</think><answer>\u3000</answer>",
        "so <think>x</think><answer>y</answer>",
        "<think>x</think>so<answer>y</answer>",
        "<think>x</think><answer>y</answer>.",
        "\0<think>x</think><answer>y</answer>",
        "<think>x</think>\u200b<answer>y</answer>",
        "<think>x</think><answer>y</answer>\u200f",
        "<answer>y</answer><think>x</think>",
        "<think>x<answer>y</answer></think>",
        "<think>x<answer>y</think></answer>",
        "<think>x<answer>y</think>z</answer>",
        "<answer><think>x</think>y</answer>",
        "</think>x<think><answer>y</answer>",
        "<think>x</think></answer>y<answer>",
        "</answer><think>x</think><answer>y",
        "<think>x</answer></think><answer>y",
        "<think><answer>z</answer>x</think><answer>y</answer>",
        "<think><answer></think><answer>y</answer>",
        "<think></answer></think><answer>y</answer>",
        "<think><think>x</think></think><answer>y</answer>",
        "<think><think>x</think><answer>y</answer>",
        "<think>x</think></think><answer>y</answer>",
        "<think>x</think><answer>y<think></answer>",
        "<think>x</think><answer>y</think></answer>",
        "<think>x</think><answer><answer>y</answer></answer>",
        "<think>x</think><answer>y</answer><answer>y</answer>",
        "<think>x</think><answer>y</answer></answer>",
        "<think>a</think><think>b</think><answer>y</answer>",
        "<think>x</think><answer>y</answer><think>x</think><answer>y</answer>",
        "<think>x<answer>y</answer>",
        "<think>x</think><answer>y",
        "x</think><answer>y</answer>",
        "<think>x</think>y</answer>",
        "<THINK>x</THINK><ANSWER>y</ANSWER>",
        "<think>x</think><Answer>y</Answer>",
        "<think >x</think ><answer>y</answer>",
    ],
)
def test_format_rejects(completion):
    assert format_reward(completion) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>y</answer>",
        "  \n\t<answer>\ny\n</answer>\n\n",
        "\u3000<answer>y</answer>",
        "<answer>a < b <b>y</b></answer>",
        "<answer>\ud800\0\u200f</answer>",
        "<answer>I think: y</answer>",
        "<answer>in <THINK> case</answer>",
    ],
)
def test_the_answer_alone_is_accepted(completion):
    assert format_reward(completion, "answer") == 1.0
    assert format_reward(completion) == format_reward(completion, "think") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "y",
        "<answer>",
        "</answer>",
        "<answer>y",
        "y</answer>",
        "</answer>y<answer>",
        "<answer></answer>",
        "<answer> \n</answer>",
        "<answer>\u3000</answer>",
        "so <answer>y</answer>",
        "<answer>y</answer>.",
        "\0<answer>y</answer>",
        "\u200b<answer>y</answer>",
        "<answer>y</answer>\u200f",
        "<answer>y</answer><answer>y</answer>",
        "<answer><answer>y</answer></answer>",
        "<answer>y</answer></answer>",
        "<answer><answer>y</answer>",
        "<answer>y</answer>z</answer>",
        "<answer>y<answer>z</answer>",
        "<ANSWER>y</ANSWER>",
        "<Answer>y</Answer>",
        "<answer >y</answer >",
        "<think>x</think><answer>y</answer>",
        "<think></think><answer>y</answer>",
        "<think>\n\n</think>\n\n<answer>y</answer>",
        "<think><answer>y</answer>",
        "</think><answer>y</answer>",
        "x</think><answer>y</answer>",
        "<answer>y</answer><think>",
        "<answer>y</answer></think>",
        "<answer>y<think></answer>",
        "<answer>y</think></answer>",
        "<answer><think>x</think>y</answer>",
        "<think><answer>y</answer></think>",
        "<answer>y</answer><think>x</think>",
    ],
)
def test_all_else_is_no_answer_alone(completion):
    assert format_reward(completion, "answer") == 0.0


# ------------------------------------------------------------------------------------ normalize


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Garden_Phlox", "garden phlox"),
        ("garden-phlox", "garden phlox"),
        ("garden phlox.", "garden phlox"),
        (" garden \t\n _ - phlox ", "garden phlox"),
        ("_garden_phlox_", "garden phlox"),
        ("garden\u00a0phlox", "garden phlox"),
        ("garden\u2011phlox", "garden phlox"),
        ("garden\u2014phlox", "garden phlox"),
        ("garden\u2212phlox", "garden phlox"),
        ("garden\uff3fphlox", "garden phlox"),
        ("\uff32\uff4f\uff53\uff45", "rose"),
        ("Stra\u00dfe", "strasse"),
        ("e\u0301toile", "\u00e9toile"),
        ("\u00df\u0301", "s\u015b"),  # casefold leaves a mark that NFKC has yet to compose
        ('"rose"', "rose"),
        ("'\"`rose`\"'", "rose"),
        ("\u201crose\u201d", "rose"),
        ("\u2018rose\u2019", "rose"),
        ("\u201erose\u201c", "rose"),
        ("\u201a\u201brose\u201f", "rose"),
        ('"rose."', "rose"),
        ('"rose".', "rose"),
        ("' \" rose ! \" ? '", "rose"),
        ("\"-rose-.'", "rose"),
        ("rose.,;:!?", "rose"),
        ("rose\u3002", "rose"),
        ("rose\uff61", "rose"),
        ("rose\uff01", "rose"),
        ("rose\u2026", "rose"),
        (".rose", ".rose"),
        ("colt's foot", "colt's foot"),
        ("C-130", "c 130"),
        ("No. 7, red", "no. 7, red"),
        ("(rose)", "(rose)"),
        ("rose\u200b", "rose\u200b"),
        ("ro\0se", "ro\0se"),
        ("\u200frose", "\u200frose"),
        ("\ud800", "\ud800"),
        ("", ""),
        ("...", ""),
        ("\"'`", ""),
        ("- _", ""),
        ("\u3002", ""),
        ("'. '", ""),
        ("x" * LONGEST_NAME, "x" * LONGEST_NAME),
        ("x" * (LONGEST_NAME + 1), ""),
    ],
)
def test_normalize(text, name):
    assert normalize(text) == name


def test_every_dash_and_space_of_unicode_is_a_gap():
    gaps = [
        char
        for char in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(char) == "Pd" or char.isspace()
    ]
    assert len(gaps) > 40
    assert [gap for gap in gaps if normalize(f"a{gap}b") != "a b"] == []


@pytest.mark.parametrize("char", ["\u00df\u0301", "\u00df\u0323", "\u0130\u0323", "\u0345"])
def test_normalize_is_stable_where_casefold_undoes_nfkc(char):
    name = normalize(f'"{char}a{char}"')
    assert name == normalize(name)
    assert name == unicodedata.normalize("NFKC", name).casefold()


# ------------------------------------------------------------------------------ accuracy_reward


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("garden phlox", "garden phlox"),
        ("Garden_Phlox", "garden phlox"),
        ("garden-phlox", "garden phlox"),
        ("garden phlox.", "garden phlox"),
        ("\n GARDEN   PHLOX\n", "garden phlox"),
        ('"Garden Phlox."', "garden phlox"),
        ("garden phlox", "Garden_Phlox."),
        ("737-800", "737-800"),
        ("737 800", "737-800"),
        ("Acura TL Sedan 2012", "Acura TL Sedan 2012"),
        ("a", "A"),
    ],
)
def test_accuracy_accepts(answer, label):
    assert accuracy_reward(said(answer), f"<answer>{label}</answer>") == 1.0
    assert accuracy_reward(said(answer), label) == 1.0


FLOWERS = ["garden phlox", "rose", "tulip", "primrose", "moon orchid", "colt's foot"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Phlox paniculata", "garden phlox"),
        ("", "garden phlox"),
        (" \n", "garden phlox"),
        ("...", "garden phlox"),
        ("_", "garden phlox"),
        ('""', "garden phlox"),
        ("a", "garden phlox"),
        ("phlox", "garden phlox"),
        ("gardenphlox", "garden phlox"),
        ("garden phlo", "garden phlox"),
        ("rose, tulip, garden phlox", "garden phlox"),
        ("garden phlox or rose", "garden phlox"),
        ("garden phlox, garden phlox", "garden phlox"),
        ("garden phlox\nrose", "garden phlox"),
        (" ".join(FLOWERS), "garden phlox"),
        ("\n".join(FLOWERS), "rose"),
        ("primrose", "rose"),
        ("rose", "primrose"),
        ("737-80", "737-800"),
        ("737-8000", "737-800"),
        ("737800", "737-800"),
        ("BMW M3 Coupe 2012", "Acura TL Sedan 2012"),
        ("Acura TL Sedan 201", "Acura TL Sedan 2012"),
        ("it is a rose", "rose"),
        ("not rose", "rose"),
        ("<b>rose</b>", "rose"),
        ("ro\u200bse", "rose"),
        ("rose\u200b", "rose"),
        ("rose\0", "rose"),
        ("\u202eesor", "rose"),
        ("\u200frose", "rose"),
        ("rose\ud800", "rose"),
        ("r\u043ese", "rose"),  # a Cyrillic o
        ("garden phlox</answer><answer>rose", "garden phlox"),
        ("garden phlox</answer>, or <answer>rose", "rose"),
        ("rose" + "-" * MEGABYTE, "rose"),
        ("rose" + "." * MEGABYTE, "rose"),
    ],
)
def test_accuracy_rejects(answer, label):
    assert accuracy_reward(said(answer), f"<answer>{label}</answer>") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "rose",
        "<think>rose</think>",
        "<think><answer>rose</answer></think>",
        "<answer>rose</answer></think>tulip",
        "<answer>rose</answer><think>x</think><answer>tulip</answer>",
        "<answer>rose",
        "rose</answer>",
        "</answer>rose<answer>",
        "<ANSWER>rose</ANSWER>",
        "<answer><answer>rose</answer></answer>",
        "<answer>rose</answer><answer>rose</answer>",
    ],
)
@pytest.mark.parametrize("match", ["exact", "visual_rft"])
def test_accuracy_pays_nothing_without_one_answer(completion, match):
    assert accuracy_reward(completion, "<answer>rose</answer>", match=match) == 0.0


def test_accuracy_does_not_ask_for_the_format():
    assert accuracy_reward("<answer>rose</answer>", "rose") == 1.0
    assert accuracy_reward("<answer>tulip</answer></think>\n<answer>rose</answer>", "rose") == 1.0


def test_aliases_count_for_their_class_only():
    aliases = {"Garden_Phlox": ["Phlox paniculata", "summer phlox"], "rose": ["Rosa"], "tulip": []}
    for answer in ("phlox_paniculata", "Summer Phlox.", "garden phlox"):
        assert accuracy_reward(said(answer), "<answer>garden phlox</answer>", aliases) == 1.0
    for answer in ("phlox", "Rosa", "rose", "", ".", "Phlox paniculata, summer phlox"):
        assert accuracy_reward(said(answer), "<answer>garden phlox</answer>", aliases) == 0.0
    assert accuracy_reward(said("Rosa"), "<answer>tulip</answer>", aliases) == 0.0
    assert accuracy_reward(said("Rosa"), "<answer>Rose</answer>", aliases) == 1.0
    assert accuracy_reward(said("Phlox paniculata"), "<answer>garden phlox</answer>", {}) == 0.0


@pytest.mark.parametrize("match", ["exact", "visual_rft"])
def test_an_alias_of_nothing_pays_nothing(match):
    # read_aliases refuses such a file, but the aliases need not come from a file.
    for answer in (".", "_", "x"):
        aliases = {"rose": ["", "_", " "]}
        assert accuracy_reward(said(answer), "rose", aliases, match=match) == 0.0


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [
        ("garden phlox", "garden phlox", 1.0),
        ("Garden_Phlox", "garden phlox", 1.0),
        ("GARDENPHLOX", "garden_phlox", 1.0),
        ("phlox", "garden phlox", 1.0),
        ("a", "garden phlox", 1.0),
        ("rose, tulip, garden phlox", "garden phlox", 1.0),
        ("primrose", "rose", 1.0),
        ("737-80", "737-800", 1.0),
        ("garden-phlox", "garden phlox", 0.0),
        ("tulip", "garden phlox", 0.0),
        ("BMW M3 Coupe 2012", "Acura TL Sedan 2012", 0.0),
        ("", "garden phlox", 0.0),
        (" \n", "garden phlox", 0.0),
        ("_ _", "garden phlox", 0.0),
    ],
)
def test_the_published_rule(answer, label, reward):
    assert accuracy_reward(said(answer), f"<answer>{label}</answer>", match="visual_rft") == reward


def test_the_published_rule_with_aliases():
    aliases = {"garden phlox": ["Phlox paniculata"]}
    for answer, reward in (("Paniculata", 1.0), ("the Phlox_paniculata", 1.0), ("tulip", 0.0)):
        assert accuracy_reward(said(answer), "garden phlox", aliases, match="visual_rft") == reward


@pytest.mark.parametrize("match", ["", "Exact", "substring", None])
def test_another_match_is_refused(match):
    with pytest.raises(ValueError, match="must be one of exact, visual_rft; found"):
        accuracy_reward(said("rose"), "rose", match=match)
    with pytest.raises(ValueError, match="must be one of"):
        accuracy_reward("", "rose", match=match)


def test_a_refused_solution_raises_whatever_the_completion():
    for completion in ("", said("rose")):
        with pytest.raises(ValueError, match="empty"):
            accuracy_reward(completion, "<answer></answer>")


# ----------------------------------------------------------------------------- all the rewards


@pytest.mark.parametrize("name", HUGE)
def test_a_megabyte_earns_nothing_and_comes_back(name):
    for text in (HUGE[name], f"<think>x</think>{HUGE[name]}", f"{HUGE[name]}<answer>rose</answer>"):
        find_answer(text)
        assert accuracy_reward(text, "tulip", {"tulip": ["lily"]}) == 0.0
        assert accuracy_reward(text, "tulip", match="visual_rft") == 0.0
        format_reward(text, "answer")
    assert format_reward(HUGE[name]) == 0.0
    alone = HUGE[name].startswith("<answer>") and find_answer(HUGE[name])[0] is not None
    assert format_reward(HUGE[name], "answer") == alone
    normalize(HUGE[name])


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<ANSWER>",
        "<",
        ">",
        "/",
        "rose",
        "Rose.",
        "r",
    ]
    + ["tulip", " ", "\n", "_", "-", '"', "`", ".", "\0", "\ud800", "\u200b", "\u202e", "\u0345"]
)
TEXT = st.one_of(
    st.lists(PIECES, max_size=16).map("".join),
    st.lists(PIECES, max_size=6).map(lambda pieces: said("".join(pieces))),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.sampled_from(["exact", "visual_rft"]))
def test_no_text_raises_or_leaves_zero_to_one(text, match):
    answer, reason = find_answer(text)
    assert (answer is None) == (reason != "")
    assert answer is None or (answer and answer == answer.strip() and answer in text)
    layouts = [format_reward(text, wanted) for wanted in ("think", "answer")]
    assert layouts in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    if any(layouts):
        assert answer is not None
    reward = accuracy_reward(text, "<answer>rose</answer>", {"Rose": ["Rosa"]}, match)
    assert isinstance(reward, float)
    assert reward in (0.0, 1.0)
    if reward:
        assert answer is not None
    if reward and match == "exact":
        assert normalize(answer) in ("rose", "rosa")


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_normalize_changes_nothing_twice(text):
    name = normalize(text)
    assert normalize(name) == name == name.strip()
    assert normalize(f' "{text}." ') == name


# ----------------------------------------------------------------------------------- read_class


@pytest.mark.parametrize(
    ("solution", "label"),
    [
        ("<answer>garden phlox</answer>", "garden phlox"),
        (" \n<answer> Garden_Phlox\n</answer>\n", "Garden_Phlox"),
        ("garden phlox", "garden phlox"),
        (" garden phlox\n", "garden phlox"),
        ("737-800", "737-800"),
        ("?rose", "?rose"),
        ("position", "position"),
        ("no objection", "no objection"),
        ("Ram C/V Cargo Van Minivan (2012)", "Ram C/V Cargo Van Minivan (2012)"),
        ("x" * LONGEST_NAME, "x" * LONGEST_NAME),
    ],
)
def test_reads_the_class(solution, label):
    assert read_class(solution) == label


@pytest.mark.parametrize(
    "solution",
    [
        "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>",
        "[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}, {'Position': [1, 2, 3, 4]}]",
        '<answer>[{"position" : [1, 2, 3, 4]}]</answer>',
        "<answer>[{'Position': [1, 2, 3",
        "<answer>[{'Confidence': 1.0, 'Position': [1, 2, 3, 4]}]</answer>",
        "<answer>No Objects</answer>",
        " no objects. ",
        "<answer>(1,2),(3,4)</answer>",
        "( 1, 2 ) , ( 3.5, -4 )",
        "<|box_start|>(1,2),(3,4)<|box_end|>",
        "<answer>[]</answer>",
        "[1, 2, 3, 4]",
        "[[1, 2, 3, 4], [5, 6, 7, 8]]",
        [{"Position": [1, 2, 3, 4], "Confidence": 1.0}],  # JSON, not text
    ],
)
def test_a_detection_solution_is_no_class(solution):
    with pytest.raises(ValueError, match=r"found .*: a detection solution, not the name of a"):
        read_class(solution)


@pytest.mark.parametrize(
    ("solution", "problem"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<answer></answer>", "empty"),
        ("<answer> \n </answer>", "empty"),
        (None, "not text"),
        (["rose"], "not text"),
        ("<answer>rose", "tags are broken"),
        ("rose</answer>", "tags are broken"),
        ("</answer>rose<answer>", "tags are broken"),
        ("<answer>rose<answer>", "tags are broken"),
        ("<answer>", "tags are broken"),
        ("<answer>rose</answer><answer>tulip</answer>", "tags are broken"),
        ("<answer><answer>rose</answer></answer>", "tags are broken"),
        ("<answer>rose</answer>.", "tags are broken"),
        ("A <answer>rose</answer>", "tags are broken"),
        ("<think>x</think><answer>rose</answer>", "tags are broken"),
        ("<think>rose", "tags are broken"),
        ("<Answer>rose</Answer>", "tags are broken"),
        ("<answer >rose</answer>", "tags are broken"),
        ("...", "only punctuation"),
        ("<answer>_-_</answer>", "only punctuation"),
        ("x" * (LONGEST_NAME + 1), "longer than 1000"),
    ],
)
def test_a_broken_solution_is_refused(solution, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        read_class(solution)
    message = str(caught.value)
    assert "; write the class's name as <answer>garden phlox</answer>" in message
    assert f"found {repr(solution)[:77]}" in message
    assert "detection" not in message


def test_what_was_found_is_shortened():
    with pytest.raises(ValueError, match="broken") as caught:
        read_class("<answer>" + "x\n" * 500)
    found = str(caught.value).partition("found ")[2].partition(";")[0]
    assert found.startswith("'<answer>x\\nx\\n")
    assert found.endswith("...")
    assert len(found) == 80


# --------------------------------------------------------------------------------- read_aliases


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"garden phlox": ["Phlox paniculata"]},
        {"garden phlox": ["Phlox paniculata", "summer phlox"], "rose": ["Rosa"], "tulip": []},
        {"rose": ["Rose", "ROSE.", "Rosa", "rosa"]},  # says nothing new, and nothing wrong
        {"Wiesenschaumkraut": ["Cardamine", "草甸碎米荠"]},
    ],
)
def test_reads_aliases(tmp_path, table):
    path = tmp_path / "aliases.json"
    path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    assert read_aliases(path) == table
    path.write_text(json.dumps(table), encoding="utf-8-sig")
    assert read_aliases(str(path)) == table


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is not usable JSON"),
        ("{'rose': ['Rosa']}", "is not usable JSON"),
        ("[" * 100_000, "is not usable JSON"),
        ('{"rose": ["Rosa"]} x', "is not usable JSON"),
        (b'{"rose": ["Ros\xe9"]}', "not UTF-8 text: line 1 holds the byte 0xe9"),
        ('{"rose": ["Rosa"], "rose": ["Rosaceae"]}', "a key is in it twice"),
        ("[]", "is not an object of classes: found \\[\\]"),
        ('"rose"', "is not an object of classes: found 'rose'"),
        ("null", "is not an object of classes: found None"),
        ('{"rose": "Rosa"}', "aliases of 'rose' are no list: found 'Rosa'"),
        ('{"rose": null}', "aliases of 'rose' are no list: found None"),
        ('{"rose": {"Rosa": 1}}', "aliases of 'rose' are no list"),
        ('{"rose": ["Rosa", 1]}', "alias of 'rose' is no name: found 1"),
        ('{"rose": [["Rosa"]]}', "alias of 'rose' is no name"),
        ('{"rose": [""]}', "alias of 'rose' is no name: found ''"),
        ('{"rose": [" ."]}', "alias of 'rose' is no name: found ' .'"),
        ('{"": ["Rosa"]}', "'' is no class name"),
        ('{"-": ["Rosa"]}', "'-' is no class name"),
        ('{"tea rose": [], "Tea_Rose": []}', "'tea rose' and 'Tea_Rose' are one class"),
        ('{"rose": ["Rosa"], "tulip": ["rosa."]}', "'rosa.' stands for both 'rose' and 'tulip'"),
        ('{"rose": ["Tulip"], "tulip": []}', "'Tulip' stands for both 'tulip' and 'rose'"),
        ('{"rose": [], "tulip": ["ROSE"]}', "'ROSE' stands for both 'rose' and 'tulip'"),
    ],
)
def test_a_broken_aliases_file_is_refused(tmp_path, content, problem):
    path = tmp_path / "names of flowers.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem) as caught:
        read_aliases(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_aliases_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json: missing: there is no such"):
        read_aliases(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="not a regular file but a folder"):
        read_aliases(tmp_path)
    with pytest.raises(ValueError, match="null"):
        read_aliases("a\0b")


def test_an_alias_that_is_a_class_of_the_data_set_is_refused_and_unknown_classes_are_named():
    classes = ["rose", "Garden Phlox", "tulip"]
    aliases = {"garden_phlox": ["Phlox paniculata", "garden phlox"], "daisy": ["Bellis"]}
    assert unknown_classes(aliases, classes) == ["daisy"]
    assert unknown_classes({}, classes) == []
    with pytest.raises(UserError, match="'Tulip', an alias of 'rose', is a class too: .* remove"):
        unknown_classes({"rose": ["Rosa", "Tulip"]}, classes)
    with pytest.raises(UserError, match="'tulip' is a class and 'Tulipa' is none: write"):
        unknown_classes({"Tulipa": ["tulip"]}, classes)
