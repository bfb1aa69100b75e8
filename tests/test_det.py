"""The detection rewards: reference values, what is read as boxes, and what never earns anything."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.boxes import (
    Box,
    giou,
    iou,
    match_boxes,
    parse_boxes,
    read_boxes,
    read_grounding,
    solution_kind,
)
from rewards.det import (
    confidence_reward,
    explain_boxes,
    explain_grounding,
    grounding_reward,
    iou_reward,
)
from rewards.readings import other_grounding_readings, other_readings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
A, B = (100, 100, 300, 300), (500, 500, 700, 700)


def frames_of(size, resized) -> dict:
    return {"thousandths": (1000.0, 1000.0), "pixels": size, "resized": resized}


FRAMES = frames_of((640, 480), (308, 224))


def boxes(*items) -> str:
    """An answer with these boxes: (x1, y1, x2, y2, confidence) each."""
    each = [f"{{'Position': {list(i[:4])}, 'Confidence': {i[4]}}}" for i in items]
    return f"<answer>[{', '.join(each)}]</answer>"


def truth(*items) -> str:
    return boxes(*((*item, 1.0) for item in items))


@pytest.mark.parametrize(
    "predicted, true, reward, calibrated, published",
    [
        ([(*A, 0.9)], [A], 1, 0.9, 0.9),
        ([(150, 100, 350, 300, 0.8)], [A], 0.6, 0.8, 0.8),
        ([(100, 100, 300, 200, 0.8)], [A], 0, 0, 0.2),
        ([(600, 600, 700, 700, 0)], [A], 0, 0, 1),
        ([(*A, 1)], [A, B], 0.5, 0.5, 1),
        ([(*A, 1), (0, 0, 50, 50, 0.3)], [A, B], 0.5, 0.35, 0.85),
        ([(150, 100, 350, 300, 0.9), (*A, 0.8)], [A], 0.3, 0.05, 0.55),
        (
            [(10, 12, 110, 112, 0.6), (10, 16, 110, 116, 0.9)],
            [(10, 11, 110, 111)],
            0.452381,
            0.15,
            0.65,
        ),
        ([(*A, 0.9), (*A, 0.9)], [A], 1, 0.9, 0.9),  # an exact duplicate is dropped
        ([(*A, 0.9), (*A, 0.4)], [A], 0.5, 0.25, 0.75),  # another confidence is another box
    ],
)
def test_reference_values(predicted, true, reward, calibrated, published):
    answer, solution = boxes(*predicted), truth(*true)
    assert iou_reward(answer, solution) == pytest.approx(reward, abs=1e-6)
    assert confidence_reward(answer, solution) == pytest.approx(calibrated, abs=1e-6)
    found = confidence_reward(answer, solution, "visual_rft")
    assert found == pytest.approx(published, abs=1e-6)


def test_nothing_there():
    nothing, some = "<answer>No Objects</answer>", truth(A)
    for kind in ("calibrated", "visual_rft"):
        for answer in (nothing, "<answer>[]</answer>", "<answer>no objects.</answer>"):
            assert iou_reward(answer, nothing) == confidence_reward(answer, nothing, kind) == 1
            assert iou_reward(answer, some) == confidence_reward(answer, some, kind) == 0
        assert iou_reward(some, nothing) == confidence_reward(some, nothing, kind) == 0
    with pytest.raises(ValueError, match="calibrated, visual_rft"):
        confidence_reward(nothing, nothing, "published")


ONE = Box(100, 100, 300, 300, 0.9)
READ = {
    "python": "[{'Position': [100, 100, 300, 300], 'Confidence': 0.9}]",
    "json": '[{"Position": [100, 100, 300, 300], "Confidence": 0.9}]',
    "lines": "[\n  {\n 'Position':\n [100,\n100,300,300],\n'Confidence'\n: 0.9\n}\n]",
    "fence": "```json\n[{'Position': [100, 100, 300, 300], 'Confidence': 0.9}]\n```",
    "bare fence": "```\n[{'Position': [100, 100, 300, 300], 'Confidence': 0.9}]```",
    "one dict": "{'Position': [100, 100, 300, 300], 'Confidence': 0.9}",
    "commas": "[{'Position': [100, 100, 300, 300,], 'Confidence': 0.9,},]",
    "case": "[{'POSITION': [100, 100, 300, 300], 'confidence': 0.9}]",
    "mixed quotes": "[{'Position\": [100, 100, 300, 300], \"Confidence': 0.9}]",
    "no quotes": "[{Position: [100, 100, 300, 300], Confidence: 0.9}]",
    "floats": "[{'Position': [1e2, 100.0, 3.0E2, +300], 'Confidence': .9}]",
    "quoted number": "[{'Position': [100, 100, 300, 300], 'Confidence': '0.9'}]",
    "order": "[{'Confidence': 0.9, 'Position': [100, 100, 300, 300]}]",
    "more keys": "[{'Label': 'ace', 'Position': [100, 100, 300, 300], 'Confidence': 0.9}]",
    "tuple": "[{'Position': (100, 100, 300, 300), 'Confidence': 0.9}]",
    "cut": "[{'Position': [100, 100, 300, 300], 'Confidence': 0.9}, {'Position': [5, 5",
    "qwen's own": '[{"bbox_2d": [100, 100, 300, 300], "label": "ace", "confidence": 0.9}]',
    "qwen's, fence": '```json\n[\n\t{"bbox_2d": [100, 100, 300, 300], "confidence": 0.9}]\n```',
    "cut early": "[{'Position': [100, 100, 300, 300], 'Confidence': 0.9}, ",
}


@pytest.mark.parametrize("name", READ)
def test_what_models_write_is_read(name):
    parsed = parse_boxes(READ[name])
    assert parsed.boxes == (ONE,) and parsed.bad == 0 and parsed.reason == ""


def test_a_box_in_qwens_own_form_without_confidence_is_sure():
    """That form has none; `Position` comes with one, and without it is a wrong box."""
    answer = '<answer>```json\n[{"bbox_2d": [100, 100, 300, 300], "label": "ace"}]\n```</answer>'
    assert iou_reward(answer, truth(A)) == confidence_reward(answer, truth(A)) == 1
    elsewhere = answer.replace("[100, 100", "[250, 250")
    two = answer.replace("}]", '}, {"bbox_2d": [500, 500, 600, 600]}]')
    assert confidence_reward(elsewhere, truth(A)) == confidence_reward(two, truth(A)) == 0
    assert confidence_reward(answer.replace("bbox_2d", "Position"), truth(A)) == 0
    beside = answer.replace('"label": "ace"', '"Position": [100, 100, 300, 300]')
    assert iou_reward(beside, truth(A)) == 0


def test_solutions_in_qwens_own_form():
    plain = '[{"bbox_2d": [100, 100, 300, 300], "label": "ace"}]'
    for solution in (plain, f"<answer>{plain}</answer>", f"<answer>```json\n{plain}\n```</answer>"):
        assert solution_kind(solution) == "boxes"
        assert read_boxes(solution) == (Box(*A),)
        assert iou_reward(boxes((*A, 1)), solution) == 1
    with pytest.raises(ValueError, match="not a list of boxes"):
        read_boxes('[{"bbox_2d": [100, 100, 300], "label": "ace"}]')


BAD = [
    '{"bbox_2d": [100, 100, 300], "label": "ace"}',
    '{"bbox_2d": [300, 300, 100, 100], "label": "ace"}',
    '{"bbox_2d": [100, 100, 300, 300], "confidence": 7}',
    '{"bbox_2d": [100, 100, 300, 300], "bbox_2d": [100, 100, 300, 300]}',
    '{"box_2d": [100, 100, 300, 300], "label": "ace"}',
    "{'Position': [100, 100, 300], 'Confidence': 0.9}",
    "{'Position': [100, 100, 300, 300, 5], 'Confidence': 0.9}",
    "{'Position': [100, 100, 300, 'x'], 'Confidence': 0.9}",
    "{'Position': [100, 100, 300, nan], 'Confidence': 0.9}",
    "{'Position': [100, 100, inf, 300], 'Confidence': 0.9}",
    "{'Position': [1e999, 100, 300, 300], 'Confidence': 0.9}",
    "{'Position': [300, 100, 100, 300], 'Confidence': 0.9}",
    "{'Position': [100, 300, 300, 100], 'Confidence': 0.9}",
    "{'Position': [100, 100, 100, 300], 'Confidence': 0.9}",
    "{'Position': [1100, 100, 1300, 300], 'Confidence': 0.9}",
    "{'Position': [100, 100, 300, 300]}",
    "{'Position': [100, 100, 300, 300], 'Confidence': nan}",
    "{'Position': [100, 100, 300, 300], 'Confidence': 1.1}",
    "{'Position': [100, 100, 300, 300], 'Confidence': -0.1}",
    "{'Position': [100, 100, 300, 300], 'Confidence': 'high'}",
    "{'Position': [100, 100, 300, 300], 'Confidence': 0.9, 'Confidence': 0.1}",
    "{'Position': [1_0, 100, 300, 300], 'Confidence': 0.9}",
    "{'Position': [__import__('os').getpid(), 1, 2, 3], 'Confidence': 0.9}",
    "{'Position': [100, 100, " + "9" * 5000 + ", 300], 'Confidence': 0.9}",
    "{}",
    "{'Confidence': 0.9}",
]


@pytest.mark.parametrize("element", BAD, ids=range(len(BAD)))
def test_a_bad_element_counts_as_a_wrong_box_and_voids_no_other(element):
    good = "{'Position': [100, 100, 300, 300], 'Confidence': 0.9}"
    alone = parse_boxes(f"[{element}]")
    assert (alone.boxes, alone.bad) == ((), 1)
    for text in (f"[{good}, {element}]", f"[{element}, {good}]"):
        assert parse_boxes(text).boxes == (ONE,) and parse_boxes(text).bad == 1
        assert iou_reward(f"<answer>{text}</answer>", truth(A)) == 0.5
        assert confidence_reward(f"<answer>{text}</answer>", truth(A)) == 0
    assert explain_boxes(f"<answer>[{element}]</answer>", truth(A)) == alone.faults[0] != ""


@pytest.mark.parametrize(
    "element, why",
    [
        ("{'Position': [100, 100, 300, 300]}", "a box with no Confidence"),
        ("{'bbox': [100, 100, 300, 300], 'Confidence': 1}", "a box with no Position"),
        ("{'Position': [100, 100, 300, 300], 'Confidence': 90}", "a Confidence that is not 0 to 1"),
        ("{'Position': [100, 100, 300, 300], 'Confidence': 1, 'Confidence': 1}", "two of Confid"),
        ("{'Position': [100, 100, 300], 'Confidence': 1}", "a Position that is not 4 numbers"),
        ("{'Position': [100], 'Confidence': 1}", "a Position that is not 4 numbers"),
        ("{'Position': [300, 300, 100, 100], 'Confidence': 1}", "corners swapped, or no area"),
        ("{'Position': [1100, 0, 1300, 300], 'Confidence': 1}", "no area inside the frame"),
        ("{'Position': [100, 100, 300, 300], 'Confidence': 1}, and more", "text between the boxes"),
    ],
)
def test_a_bad_box_says_what_is_wrong_with_it(element, why):
    assert why in explain_boxes(f"<answer>[{element}]</answer>", truth(A))


def test_boxes_are_clipped_to_their_frame():
    text = "[{'Position': [-50, 100, 640, 5000], 'Confidence': 1}]"
    assert parse_boxes(text).boxes == (Box(0, 100, 640, 1000, 1.0),)
    assert parse_boxes(text, (320, 240)).boxes == (Box(0, 100, 320, 240, 1.0),)


ANSWERS = [
    "",
    " ",
    "[",
    "{",
    "]",
    "[[100, 100, 300, 300]]",
    "[100, 100, 300, 300]",
    "100 100 300 300",
    "(100,100),(300,300)",
    "the box is here",
    "None",
    "null",
    "[None]",
    "no",
    "No Objects, or perhaps one",
    "No Objects [{'Position': [100, 100, 300, 300], 'Confidence': 1}]",
    "I see {'Position': [100, 100, 300, 300], 'Confidence': 1}",
    "[{'Position': [100, 100, 300, 300], 'Confidence': 1}",  # cut before the brace: see below
    "[{'Position': [100, 100,",
    "[{'bbox': [100, 100, 300, 300], 'Confidence': 1}]",
    "[{'Position': 100, 'Confidence': 1}]",
    "[{'Position': [], 'Confidence': 1}]",
    "[{'Position': [0, 0, 1000, 1000], 'Confidence': 1}]",
    "[{'Position': [100, 100, 300, 200], 'Confidence': 1}]",  # IoU exactly one half
    "[{'Position': [600, 600, 700, 700], 'Confidence': 0}]",
    "[{'Position': [0.1, 0.1, 0.3, 0.3], 'Confidence': 1}]",
    "[{'Position': [100, 100, 300, 300], 'Confidence': 2}]",
    "[{'Position': [100, 100, 300, 300], 'Confidence': NaN}]",
    "[{'Position': [100, 100, 300, 300], 'Confidence': Infinity}]",
    "[{'Position': [100, 100, 300, 300], 'Confidence': ''}]",
    "[{'Position': ['100', '100', '300', '300'], 'Confidence': 1}]",
    "[{'Position': [100; 100; 300; 300], 'Confidence': 1}]",
    "[{'Position': [[100, 100, 300, 300]], 'Confidence': 1}]",
    "[{'Position': [100, 100, 300, 300] * 2, 'Confidence': True}]",
    "eval('[{}]')",
    "__import__('os').system('true')",
    "<box>100,100,300,300</box>",
    "\0" * 50,
    "\u202e[{'Position': [100, 100, 300, 300], 'Confidence': 1}]",
    "[" * 1000,
    "{" * 1000,
]
del ANSWERS[17]  # (it is whole but for the list's bracket, and earns what it holds)
HOSTILE = [f"<think>x</think><answer>{answer}</answer>" for answer in ANSWERS]
GOOD = "[{'Position': [100, 100, 300, 300], 'Confidence': 1}]"
HOSTILE += [
    "",
    GOOD,
    f"<answer>{GOOD}",
    f"{GOOD}</answer>",
    f"<Answer>{GOOD}</Answer>",
    f"<answer>{GOOD}</answer><answer>{GOOD}</answer>",
    f"<answer>{GOOD}</answer></think>",
    f"<think><answer>{GOOD}</answer></think>",
    f"<answer><answer>{GOOD}</answer></answer>",
    f"<answer>{GOOD}</answer></answer>",
    f"<answer >{GOOD}</answer >",
    "<answer></answer>",
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_no_such_answer_earns_anything(completion):
    assert iou_reward(completion, truth(A)) == 0
    assert confidence_reward(completion, truth(A)) == 0
    assert explain_boxes(completion, truth(A))


def test_there_are_many_hostile_answers_and_the_good_one_is_good():
    assert len(HOSTILE) >= 50
    assert iou_reward(f"<answer>{GOOD}</answer>", truth(A)) == 1
    assert explain_boxes(f"<answer>{GOOD}</answer>", truth(A)) == ""


PIECES = ["[", "]", "{", "}", "'Position'", '"confidence"', ":", ",", " ", "1", "0.5", "1000", "-"]
PIECES += [
    "'bbox_2d'",
    "nan",
    "1e9",
    "No Objects",
    "<answer>",
    "</answer>",
    "</think>",
    "```",
    "\n",
    "(",
    ")",
]
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@pytest.mark.parametrize(
    "position, frame, reading",
    [
        ((100, 150, 300, 450), (1000.0, 1000.0), "as asked"),
        ((80, 60, 240, 180), (1000.0, 1000.0), "pixels of the image"),  # of 800 x 400
        ((0.1, 0.15, 0.3, 0.45), (1000.0, 1000.0), "shares of the image"),
        ((150, 100, 450, 300), (1000.0, 1000.0), "[y1, x1, y2, x2]"),
        ((100, 150, 200, 300), (1000.0, 1000.0), "[x, y, width, height]"),
        ((125, 375, 375, 1125), (800.0, 400.0), "thousandths of the image"),
        ((39.2, 29.4, 117.6, 88.2), (1000.0, 1000.0), "pixels of the resized image"),
        ((49, 73.5, 147, 196), (800.0, 400.0), "pixels of the resized image"),
    ],
)
def test_what_boxes_would_earn_if_they_were_meant_otherwise(position, frame, reading):
    """Only the reading that was meant finds both true boxes in full; a third box is in vain."""
    true = truth((100, 150, 300, 450), (100, 150, 300, 451))
    if frame != (1000.0, 1000.0):
        true = truth((100, 150, 300, 400), (100, 149, 300, 400))
    answer = boxes((*position, 0.7), (0, 0, 1, 1, 0.2))
    earned = other_readings(answer, true, 0.5, frame, frames_of((800, 400), (392, 196)))
    assert max(earned, key=earned.get) == reading and earned[reading] == 0.5
    same = reading == "as asked"  # which is also the reading with any confidence
    assert sum(value == 0.5 for value in earned.values()) == 1 + same
    assert earned["as asked"] == iou_reward(answer, true, frame=frame)


@pytest.mark.parametrize("confidence", ["", ", 'Confidence': 90", ", 'Confidence': 'high'"])
def test_right_boxes_with_a_bad_confidence_are_found(confidence):
    """What the reward is stands under "as asked"; a broken box beside it is a wrong one."""
    element = f"{{'Position': [100, 100, 300, 300]{confidence}}}"
    readings = (1000.0, 1000.0), FRAMES
    earned = other_readings(f"<answer>[{element}]</answer>", truth(A), 0.5, *readings)
    assert earned["as asked"] == 0 and earned["boxes with any confidence"] == 1
    answer = f"<answer>[{element}, {{'Position': [1, 2, 3]}}]</answer>"
    earned = other_readings(answer, truth(A), 0.5, *readings)
    assert earned["boxes with any confidence"] == 0.5


def test_repeated_boxes_are_as_asked_what_they_earn():
    answer = boxes((*A, 0.9), (*A, 0.9))
    earned = other_readings(answer, truth(A), 0.5, (1000.0, 1000.0), FRAMES)
    assert earned["as asked"] == iou_reward(answer, truth(A)) == 1


@pytest.mark.parametrize(
    "answer, why",
    [
        ("I see it", "not one box"),
        ("(1200,100),(1400,300)", "outside the frame of 1000 x 1000"),
        ("(300,300),(100,100)", "corners swapped, or no area"),
        ("(100,100),(300,301)", "GIoU below 1"),
        ("(100,100),(300,300)", ""),
    ],
)
def test_a_grounding_answer_says_what_is_wrong_with_it(answer, why):
    text = f"<answer>{answer}</answer>"
    assert explain_grounding(text, "(100,100),(300,300)") == why


def test_grounding_read_otherwise():
    """Pixels of a 2,000 x 1,500 photograph, where thousandths are asked for."""
    frame, true = (1000.0, 1000.0), "(100,200),(600,800)"
    size = frames_of((2000, 1500), (616, 448))
    earned = other_grounding_readings("<answer>(200,300),(1200,1200)</answer>", true, frame, size)
    assert earned["as asked"] == 0 and earned["pixels of the image"] == pytest.approx(1)
    earned = other_grounding_readings(
        "<answer>[61.6, 89.6, 369.6, 358.4]</answer>", true, frame, size
    )
    assert earned["pixels of the resized image"] == pytest.approx(1)
    right = other_grounding_readings(f"<answer>{true}</answer>", true, frame, size)
    assert max(right, key=right.get) == "as asked" and right["as asked"] == 1
    assert other_grounding_readings("<answer>there</answer>", true, frame, size) == {}


def test_no_positions_no_readings():
    for answer in (
        "",
        "<answer>No Objects</answer>",
        "<answer>[{'Position': [1, x, 3, 4]}]</answer>",
    ):
        assert other_readings(answer, truth(A), 0.5, (1000.0, 1000.0), FRAMES) == {}
    nothing = "<answer>No Objects</answer>"
    assert other_readings(boxes((*A, 1)), nothing, 0.5, (1000.0, 1000.0), FRAMES) == {}


@given(TEXT)
def test_no_text_makes_a_reward_raise_or_leave_its_range(text):
    for completion in (text, f"<answer>{text}</answer>"):
        for solution in (truth(A), truth(A, B), "<answer>No Objects</answer>"):
            values = [iou_reward(completion, solution), confidence_reward(completion, solution)]
            values.append(confidence_reward(completion, solution, "visual_rft"))
            assert all(0 <= value <= 1 for value in values)
            assert isinstance(explain_boxes(completion, solution), str)
            otherwise = other_readings(completion, solution, 0.5, (1000.0, 1000.0), FRAMES)
            assert all(0 <= value <= 1 for value in otherwise.values())
        assert 0 <= grounding_reward(completion, "(1,1),(9,9)") <= 1
        assert isinstance(explain_grounding(completion, "(1,1),(9,9)"), str)
    solution_kind(text)


@pytest.mark.parametrize(
    "unit",
    [*PIECES, "x ", "{}", "{'Position'  ", "{'Position': [", "{'Position': [1,2,3,4], ", "[{},"]
    + ["{'bbox_2d': [1,2,3,4], ", "{'bbox_2d': [", "}  "],
)
def test_a_megabyte_of_anything_is_read_at_once(unit):
    """Quadratic work on this much would outlast any patience: there is no clock here."""
    text = "[x" + unit * (1_000_000 // len(unit)) + "y"
    parse_boxes(text)
    iou_reward(f"<answer>{text}</answer>", truth(A))
    other_readings(f"<answer>{text}</answer>", truth(A), 0.5, (1000.0, 1000.0), FRAMES)
    grounding_reward(f"<answer>{text}</answer>", "(1,1),(9,9)")


coordinate = st.integers(0, 6)
some_box = st.tuples(coordinate, coordinate, st.integers(1, 4), st.integers(1, 4)).map(
    lambda t: Box(t[0], t[1], t[0] + t[2], t[1] + t[3])
)


@given(st.lists(st.tuples(some_box, st.integers(0, 9)), max_size=5), st.lists(some_box, max_size=4))
def test_matching_equals_a_loop_over_cells(predicted, true):
    """IoU by counting unit cells; the greedy choice written out."""
    predicted = [Box(b.x1, b.y1, b.x2, b.y2, c / 9) for b, c in predicted]

    def cells(box):
        across = range(int(box.x1), int(box.x2))
        return set(itertools.product(across, range(int(box.y1), int(box.y2))))

    taken, expected, seen = set(), [], []
    for box in sorted(predicted, key=lambda b: b.confidence, reverse=True):
        if box in seen:
            continue
        seen.append(box)
        best, which = 0.5, None
        for index, other in enumerate(true):
            shared = len(cells(box) & cells(other)) / len(cells(box) | cells(other))
            assert iou(box, other) == pytest.approx(shared)
            if index not in taken and shared > best + 1e-12:
                best, which = shared, index
        taken.add(which)
        expected.append((box, best if which is not None else 0.0))
    found = match_boxes(tuple(predicted), tuple(true))
    assert [box for box, _ in found] == [box for box, _ in expected]
    assert [o for _, o in found] == pytest.approx([o for _, o in expected])


def test_giou():
    one, far = Box(0, 0, 2, 2), Box(4, 0, 6, 2)
    assert giou(one, one) == 1
    assert giou(one, far) == pytest.approx(0 - 4 / 12)
    assert giou(one, Box(1, 0, 3, 2)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("(100,100),(300,300)", 1),
        (" ( 100 , 100 ) , (300,300) ", 1),
        ("[100, 100, 300, 300]", 1),
        ('[{"bbox_2d": [100, 100, 300, 300], "label": "ace"}]', 1),
        ('```json\n{"bbox_2d": [100, 100, 300, 300]}\n```', 1),
        ('[{"bbox_2d": [100, 100, 300, 300]}, {"bbox_2d": [100, 100, 300, 300]}]', 0),
        ('[{"bbox_2d": [100, 100, 300, 300], "bbox_2d": [1, 1, 2, 2]}]', 0),
        ("[{'Position': [100, 100, 300, 300]}]", 0),
        ("(100,100),(300,200)", 0.75),
        ("(500,500),(700,700)", (1 - 28 / 36) / 2),
        ("(300,300),(100,100)", 0),
        ("(100,100),(100,300)", 0),
        ("(100,100),(300,1300)", 0),
        ("(-1,100),(300,300)", 0),
        ("(100,100),(300,300),(100,100),(300,300)", 0),
        ("(100,100),(300,300) and (1,1),(2,2)", 0),
        ("box", 0),
        ("(nan,1),(2,3)", 0),
    ],
)
def test_grounding(answer, reward):
    completion = f"<think>x</think><answer>{answer}</answer>"
    assert grounding_reward(completion, "<answer>(100,100),(300,300)</answer>") == pytest.approx(
        reward
    )


def test_solutions_are_told_apart_and_read_strictly():
    assert solution_kind(truth(A)) == solution_kind("No Objects") == "boxes"
    assert solution_kind("<answer>(1,2),(3,4)</answer>") == "grounding"
    assert solution_kind("<answer>garden phlox</answer>") == "class"
    assert read_boxes(truth(A, B)) == (Box(*A), Box(*B))
    assert read_boxes("<answer>No Objects</answer>") == ()
    assert read_grounding("<answer>(1,2),(3,4)</answer>") == Box(1, 2, 3, 4)
    for solution, message in (
        ("<answer>garden phlox</answer>", "is a class, not boxes"),
        ("<answer>[{'Position': [1, 2, 3]}]</answer>", "not a list of boxes"),
        ("<answer>[{'Position': [1, 2, 3, 1200], 'Confidence': 1}]</answer>", "outside its frame"),
    ):
        with pytest.raises(ValueError, match=message):
            read_boxes(solution)
    with pytest.raises(ValueError, match="not one box"):
        read_grounding("<answer>(3,4),(1,2)</answer>")


def test_the_real_solutions_score_in_full():
    if not SHARED.exists():
        pytest.skip("the shared photographs are not here")
    rows = json.loads((SHARED / "cards" / "test.json").read_text())
    for row in rows:
        solution = row["solution"]
        assert iou_reward(solution, solution) == confidence_reward(solution, solution) == 1
