"""More of the detection rewards: hostile elements, junk that must never pay, and the real data.

The reference values, the accept table and most hostile completions are in test_det.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_cls
import train_det
from data.errors import UserError
from data.rows import SplitRows
from rewards.boxes import corners_of
from rewards.cls import read_class
from rewards.det import (
    confidence_reward,
    explain_boxes,
    grounding_reward,
    iou_reward,
    match_boxes,
    parse_boxes,
    read_boxes,
)
from rewards.notations import read_solution
from tests.runs import data_of

CARDS = Path(__file__).resolve().parents[2] / "shared" / "data" / "cards"
GOOD = "{'Position': [100, 100, 300, 300], 'Confidence': 1.0}"
TRUTH = f"<answer>[{GOOD}]</answer>"
NOTHING = "<answer>No Objects</answer>"


def said(answer: str) -> str:
    return f"<think>Corners and edges.</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "answer",
    [
        "[{'Position': [100,100,300,300], 'Confidence': 0x1}]",
        "[{'Position': [100,100,300,300], 'Confidence': 1.0000001}]",
        "[{'Position': [100,100,300,300], 'Confidence': -1e-9}]",
        "[{'Position': [100,100,300,300], 'Confidence': 1/2}]",
        "[{'Position': [100,100,300,300], 'Confidence': 90%}]",
        "[{'Position': [100,100,300,300], 'Confidence': None}]",
        "[{'Position': [100,100,300,300], 'Confidence': [1]}]",
        "[{'Position': [100,100,300,300], 'Confidence': {}}]",
        "[{'Position': [100,100,300,300], 'Confidence': 1e999}]",
        "[{'Position': [100,100,300,300], 'Confidence': -Infinity}]",
        "[{'Position': [100,100,300,300], 'Score': 1}]",
        "[{'Position': [100+0,100,300,300], 'Confidence': 1}]",
        "[{'Position': [100,100,300,300][:], 'Confidence': int('1')}]",
        "[{'Position': [100,,300,300], 'Confidence': 1}]",
        "[{'Position': [100 100 300 300], 'Confidence': 1}]",
        "[{'Position': [100,100,300,300,300], 'Confidence': 1}]",
        "[{'Position': [300,300,100,100], 'Confidence': 1}]",
        "[{'Position': [100,100,100,100], 'Confidence': 1}]",
        "[{'Position': [-300,-300,-100,-100], 'Confidence': 1}]",
        "[{'Position': [1000,1000,2000,2000], 'Confidence': 1}]",
        "[{'Position': [-inf,-inf,inf,inf], 'Confidence': 1}]",
        "[{'Position': [NaN,NaN,NaN,NaN], 'Confidence': 1}]",
        "[{'Position': [100,100,300," + "9" * 5000 + "], 'Confidence': 1}]",
        "[{'Position': [100,100,300,300], 'Position': [100,100,300,300], 'Confidence': 1}]",
        "[{'Position': [100,100,300,300], 'Confidence': 0, 'Confidence': 1}]",
        "[{'Position': {'x1': 100, 'y1': 100, 'x2': 300, 'y2': 300}, 'Confidence': 1}]",
        "[{'Position': 'the upper left', 'Confidence': 1}]",
        "[('Position', [100,100,300,300], 'Confidence', 1)]",
        "[[100,100,300,300,1.0]]",
        "['No Objects']",
        "[{'Position': [1,1,3,3], 'Confidence': 1}]",
        "[{'Position': [0,0,1e3,1e3], 'Confidence': 1}]",
        "dict(Position=[100,100,300,300], Confidence=1)",
        "open('/etc/passwd').read()",
        "[].__class__.__base__.__subclasses__()",
        "<answer_[{'Position': [100,100,300,300], 'Confidence': 1}]",
        "```json\n```",
        "```",
        "true",
        "0",
        "null\0",
        "\ud800",
    ],
)
def test_these_answers_earn_nothing_and_say_why(answer):
    assert iou_reward(said(answer), TRUTH) == 0
    assert confidence_reward(said(answer), TRUTH) == 0
    assert explain_boxes(said(answer), TRUTH)
    if answer not in ("[]", "No Objects"):
        assert iou_reward(said(answer), NOTHING) == confidence_reward(said(answer), NOTHING) == 0


@pytest.mark.parametrize(
    "junk",
    [
        "{'Position': [100, 100, 300, 300]}",
        "{'Position': [500, 500, 600, 600], 'Confidence': 1}",
        "{'Position': [600, 600, 500, 500], 'Confidence': 0}",
        "{'Position': [500, 500, 600, 600], 'Confidence': -9}",
        "{}",
        "5",
        "None",
        "'a string'",
    ],
)
@pytest.mark.parametrize("times", [1, 7])
def test_junk_beside_the_right_box_never_pays(junk, times):
    answer = said("[" + ", ".join([GOOD] + [junk] * times) + "]")
    assert iou_reward(answer, TRUTH) <= 0.5
    assert confidence_reward(answer, TRUTH) == 0


def test_a_bad_element_costs_in_the_published_formula_too():
    answer = said(f"[{GOOD}, {{}}, {{}}, {{}}]")
    assert confidence_reward(answer, TRUTH, "visual_rft") == 0.25


def test_guesses_all_over_the_image_pay_less_than_one_box():
    tiles = [(x, y, x + 200, y + 200) for x in range(0, 801, 100) for y in range(0, 801, 100)]
    each = [f"{{'Position': {list(tile)}, 'Confidence': 1}}" for tile in tiles]
    answer = said("[" + ", ".join(each) + "]")
    assert 0 < iou_reward(answer, TRUTH) <= 1 / len(tiles)
    assert confidence_reward(answer, TRUTH) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(), st.floats(), st.floats(), st.floats(), st.floats()), max_size=6)
)
def test_no_numbers_raise_or_leave_zero_to_one(rows):
    each = [f"{{'Position': {list(row[:4])}, 'Confidence': {row[4]}}}" for row in rows]
    answer = said("[" + ", ".join(each) + "]")
    parsed = parse_boxes(answer.partition("<answer>")[2].partition("</answer>")[0])
    assert len(parsed.boxes) + parsed.bad == len(rows)
    for box in parsed.boxes:
        assert 0 <= box.x1 < box.x2 <= 1000 and 0 <= box.y1 < box.y2 <= 1000
        assert 0 <= box.confidence <= 1
    for solution in (TRUTH, NOTHING):
        assert 0 <= iou_reward(answer, solution) <= 1
        for kind in ("calibrated", "visual_rft"):
            assert 0 <= confidence_reward(answer, solution, kind) <= 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_grounding_pays_the_truth_most(corners):
    x1, y1, x2, y2 = corners
    reward = grounding_reward(said(f"({x1},{y1}),({x2},{y2})"), "(5,5),(15,15)", (20.0, 20.0))
    assert 0 <= reward <= 1
    assert (reward == 1) == (corners == [5, 5, 15, 15])
    if x1 >= x2 or y1 >= y2:
        assert reward == 0


def test_a_prediction_and_a_true_box_are_matched_once():
    predicted = read_boxes("[" + ", ".join([GOOD] * 3) + "]")
    assert len(match_boxes(predicted, predicted)) == 1
    near = [f"{{'Position': [100, 100, 300, {300 + i}], 'Confidence': 1}}" for i in range(9)]
    matched = match_boxes(parse_boxes(f"[{', '.join(near)}]").boxes, read_boxes(TRUTH))
    assert [overlap for _, overlap in matched] == [1.0] + [0.0] * 8


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_true_solutions_of_the_real_data_score_in_full(split):
    if not CARDS.exists():
        pytest.skip("the shared photographs are not here")
    rows = json.loads((CARDS / f"{split}.json").read_text(encoding="utf-8"))
    assert rows
    for row in rows:
        assert read_boxes(row["solution"]) == read_boxes(row["solution"], (1000.0, 1000.0))
        for kind in ("calibrated", "visual_rft"):
            assert confidence_reward(row["solution"], row["solution"], kind) == 1
        assert iou_reward(row["solution"], row["solution"]) == 1
        assert explain_boxes(row["solution"], row["solution"]) == ""


SPACES = " " * 2**20


@pytest.mark.parametrize(
    "answer",
    [
        f"x{SPACES}x",
        f"[{GOOD}{SPACES}x",
        f"[{{'Position': [{SPACES}], 'Confidence': 1}}]",
        f"[{{'Position'{SPACES}}}]",
        f"(1,2){SPACES}x",
        "[1" + "\n" * 2**20 + "x",
    ],
    ids=range(6),
)
def test_a_megabyte_of_white_space_inside_is_read_at_once(answer):
    iou_reward(said(answer), TRUTH)
    grounding_reward(said(answer), "(1,1),(9,9)")


@pytest.mark.parametrize(
    "element",
    [
        "{'NotPosition': [100, 100, 300, 300], 'Confidence': 1}",
        "{'Position': [100, 100, 300, 300], 'MyConfidence': 1}",
        "{'Position': [100, 100, 300, 300], 'Confidence': 1 0.5}",
        "{'Position': [0, 0, 1e-200, 1e-200], 'Confidence': 1}",
    ],
)
def test_these_elements_are_bad(element):
    parsed = parse_boxes(f"[{element}]")
    assert (parsed.boxes, parsed.bad, parsed.reason) == ((), 1, "")


def test_every_stray_element_counts():
    assert parse_boxes(f"[{GOOD}, 'x', None, 5]").bad == 3


def test_a_deeply_indented_box_is_read():
    lines = ("\n" + " " * 60).join(["[{'Position': [100,", "100,", "300,", "300],"])
    assert parse_boxes(lines + " 'Confidence': 1}]").boxes == read_boxes(TRUTH)


@pytest.mark.parametrize("tail", ["", ",", ", {'Position': [5, 6", "]}", "] and more"])
def test_a_truth_that_is_not_whole_is_refused(tail):
    with pytest.raises(ValueError, match="not a list of boxes"):
        read_boxes(f"<answer>[{GOOD}{tail}</answer>")


# ---- other notations -----------------------------------------------------------------------------

A, B = (101, 201, 350, 666), (4, 5, 24, 30)
TOKENS = "<|box_start|>(101,201),(350,666)<|box_end|>"
# how it is written, what it is, its boxes
READ = [
    ("101,201,350,666", "grounding", [A]),
    ("101 201 350 666", "grounding", [A]),
    ("101; 201; 350; 666", "grounding", [A]),
    ("(101, 201.0, 350, 666)", "grounding", [A]),
    ("[101 201 350 666]", "grounding", [A]),
    ("[101, 201, 350, 666]", "grounding", [A]),
    ("x1=101, y1=201, x2=350, y2=666", "grounding", [A]),
    ("[4.123456789012345, 5, 24, 30]", "grounding", [(4.123456789, 5, 24, 30)]),
    ("[[101, 201, 350, 666]]", "grounding", [A]),
    ("[(101, 201, 350, 666)]", "grounding", [A]),
    ("```json\n[[101, 201, 350, 666]]\n```", "grounding", [A]),
    ("[[101, 201, 350, 666], [4, 5, 24, 30]]", "boxes", [A, B]),
    ("101,201,350,666\n4,5,24,30", "boxes", [A, B]),
    (TOKENS, "grounding", [A]),
    (f"<answer>{TOKENS}</answer>", "grounding", [A]),
    (f"<|object_ref_start|>cup<|object_ref_end|>{TOKENS}", "grounding", [A]),
    (f"{TOKENS}, <|box_start|>(4,5),(24,30)<|box_end|>", "boxes", [A, B]),
    ("<box>[[101,201,350,666]]</box>", "grounding", [A]),
    ("<ref>a cup</ref><box>(101,201),(350,666)</box>", "grounding", [A]),
    ("<box>101 201 350 666</box>", "grounding", [A]),
    ("<|ref|>cup<|/ref|><|det|>[[101,201,350,666],[4,5,24,30]]<|/det|>", "boxes", [A, B]),
    ('[{"bbox": [101, 201, 350, 666], "label": "cup"}]', "boxes", [A]),
    ("{'bbox_2d': (101, 201, 350, 666), 'label': None}", "boxes", [A]),
    ('[{"bbox_2d": [101, 201, 350, 666], "confidence": null}]', "boxes", [A]),
    ("[{'Position': [101, 201, 350, 666]}]", "boxes", [A]),
    ('{"xmin": 101, "ymin": 201, "xmax": 350, "ymax": 666}', "boxes", [A]),
    ('[{"bbox": {"x1": 101, "y1": 201, "x2": 350, "y2": 666}}]', "boxes", [A]),
    ('{"bboxes": [[101, 201, 350, 666], [4, 5, 24, 30]]}', "boxes", [A, B]),
    ("No object.", "boxes", []),
    ("[]", "boxes", []),
]
UNREAD = [
    ('[{"box_2d": [101, 201, 350, 666]}]', "Gemini writes with y before x"),
    ('{"x": 101, "y": 201, "width": 50, "height": 66}', "with a width and a height"),
    ("x: 4, y: 5, w: 24, h: 30", "with a width and a height"),
    ('[{"bbox": [400, 300, 100, 120]}]', "x1 >= x2 (a box is x1, y1, x2, y2, not x, y, width"),
    ("<loc0123><loc0200><loc0500><loc0600> cup", "PaliGemma's"),
    ("cup<loc_12><loc_34><loc_500><loc_600>", "Florence-2's"),
    ("<object><patch_index_0044><patch_index_0863></object>", "Kosmos-2's"),
    ("{<12><30><50><60>}", "hundredths"),
    ("[0.1, 0.2, 0.5, 0.6]", "shares of the image"),
    ("[{'Position': [0.1, 0.2, 0.5, 0.6], 'Confidence': 1.0}]", "shares of the image"),
    ("cup 0.93 10 20 410 300", "with a name or a unit"),
    ("10 20 410 300 cup", "with a name or a unit"),
    ("10px, 20px, 410px, 300px", "with a name or a unit"),
    ("BOX(10 20,410 300)", "with a name or a unit"),
    ("0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4", "YOLO's"),
    ("[[4, 5], [24, 5], [24, 30]]", "points or a polygon"),
    ("[4, 5, 24, 5, 24, 30, 4, 30]", "points or a polygon"),
    ("[4, 5]", "points or a polygon"),
    ("4,5,24,5,24,30", "something around"),
    ("[4, 5, 24, 30, 0.9]", "is not four numbers"),
    ('<point x="10.5" y="20.1">cup</point>', "points, not boxes"),
    ('{"point_2d": [4, 5]}', "no key bbox_2d"),
    (f"The cup is at {TOKENS}", "text around the boxes, 'The cup is at'"),
    ("<|box_start|>(101,201),(350,666)", "something missing"),
    ("The cup is at [4, 5, 24, 30].", "something around"),
    ("cup: 4, 5, 24, 30", "something around"),
    ("((4,5,24,30),(4,5,24,30))", "something around"),
    ("<bndbox><xmin>4</xmin></bndbox>", "something around"),
    ("[{'Position': [4, 5, 24", "no list of boxes"),
    ("-4,5,24,30", "box 1 of 1, [-4, 5, 24, 30], has a negative coordinate"),
    ("[NaN, 5, 24, 30]", "is not four numbers"),
    ("[1e20, 5, 1e21, 30]", "no place in an image"),
    ('[{"bbox": [4, 5, 24, 30], "confidence": "high"}]', "a confidence that is not 0 to 1"),
    ('["cat"]', "neither boxes nor a class"),
    ('{"label": "cat"}', "no key bbox_2d"),
    ("[" * 4000 + "]" * 4000, "no list of boxes"),
    ("<box>" * 9000, "something missing"),
]
CLASSES = [
    *("Boeing 737-800", "4", "1,2", "(1, 2)", "3/4", "2012 Audi A5 Coupe", "2012-05-24"),
    *("24.12.2020 10:30", "192.168.0.1", "1.2.3.4", "1,2,3,4-tetrahydronaphthalene"),
    *("[Red] rose", "{cat}", "box turtle", "location 12", "R: 12, G: 30, B: 40, A: 255"),
    *("BMW X1: sDrive", "Position 4", "12 34 56", "<think>[1,2,3,4]</think> true", "(1998)"),
]


@pytest.mark.parametrize("text, kind, boxes", READ, ids=range(len(READ)))
def test_boxes_in_these_notations_are_read(text, kind, boxes):
    reading = read_solution(text)
    assert (reading.kind, reading.fault) == (kind, "")
    assert corners_of(reading.text) == boxes
    again = read_solution(reading.text)
    assert (again.text, again.notation) == (reading.text, "")
    if reading.listed:
        as_list = reading.as_list()
        assert as_list.kind == "boxes" and corners_of(as_list.text) == boxes
        assert read_boxes(as_list.text)[0].confidence == 1


@pytest.mark.parametrize("text, why", UNREAD, ids=range(len(UNREAD)))
def test_boxes_that_are_not_read_are_named(text, why):
    reading = read_solution(text)
    assert reading.kind != "class" and why in reading.fault
    if "is not read" in reading.fault:
        assert "one box is read as <answer>(101,201),(350,666)</answer>" in reading.fault


def refusal(script, solutions) -> str:
    """What a script's `read_task` says of rows with these solutions; "" if it takes them."""
    table = [{"image": "a.png", "problem": "Find it", "solution": text} for text in solutions]
    rows = SplitRows(table, Path())
    rows.sizes, rows.name = [[(1000, 1000)]] * len(rows), "d"
    processor = SimpleNamespace(answers_in="thousandths", resized=lambda w, h: (w, h))
    config = script.Config(dataset_name="d")
    try:
        script.read_task(config, data_of(rows, processor=processor), [])
    except UserError as error:
        return str(error)
    return ""


def test_no_script_sends_to_the_other_what_it_would_not_take():
    for text, *_ in READ:
        assert refusal(train_det, [text] * 2) == "", text
        said = refusal(train_cls, [text] * 2)
        assert "torchrun train_det.py" in said and repr(text)[1:-1][:30] in said, text
    for text, why in UNREAD:
        for script in (train_cls, train_det):
            said = refusal(script, [text] * 2)
            assert "2 bad rows" in said and why in said and "torchrun" not in said, text
    for text in CLASSES:
        assert refusal(train_cls, [text] * 2) == "", text
        assert "torchrun train_cls.py" in refusal(train_det, [text] * 2), text
        assert read_class(text.rpartition("</think>")[2]), text


def test_one_row_with_several_boxes_makes_all_lists():
    one, two = "[4, 5, 24, 30]", "[[4, 5, 24, 30], [101, 201, 350, 666]]"
    for first in (one, TOKENS, "4,5,24,30"):
        assert refusal(train_det, [first, two]) == refusal(train_det, [first, "[]"]) == ""
    assert "2 kinds" in refusal(train_det, ["(4,5),(24,30)", "[]"])  # which is grounding's own
