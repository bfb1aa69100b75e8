"""Flat rewards: the metrics of a step, and the findings of a run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import grpo.run.diagnose
from grpo.reward import Record
from grpo.run.diagnose import KEPT, LONGEST
from rewards.parse import FAILURES

ADVICE = "if these are synonyms, pass --aliases"
WEIGHTS = {"accuracy": 1.0, "format": 1.0}
LOW, HIGH = "diagnosis/accuracy/at_minimum", "diagnosis/format/at_maximum"
DEAD = "diagnosis/all_groups_dead"


def record(accuracy=0.0, layout=1.0, answer="tulip", truth="rose", why="wrong class", **more):
    """A completion with the terms accuracy and format; `more` replaces any of its fields."""
    text = f"<think>petals</think><answer>{answer}</answer>"
    fields = {
        "row": 7,
        "completion": text,
        "answer": answer,
        "truth": truth,
        "rewards": {"accuracy": accuracy, "format": layout},
        "reasons": {
            "accuracy": "" if accuracy == 1 else why,
            "format": "" if layout == 1 else "no think tag",
        },
        "reward": accuracy + layout,
        "tokens": 9,
        "truncated": False,
    }
    return Record(**(fields | more))


def Watch(after, state=None, advice="", weights=WEIGHTS, failures=FAILURES, thought="open"):
    return grpo.run.diagnose.Watch(after, weights, failures, state, advice, thought)


def step_metrics(rows, weights=WEIGHTS, failures=FAILURES):
    return Watch(1, weights=weights, failures=failures).metrics(groups(rows))


def groups(rows):
    """Groups with these records, as far as a Watch looks at them."""
    return [SimpleNamespace(records=records) for records in rows]


def look(watch, step, rows, hints=(), task=None):
    return watch.look(step, groups(rows), lambda groups, task: hints, task)


def lively(**more):
    """Two groups in which both terms move."""
    right = {"accuracy": 1.0, "answer": "rose"}
    return [[record(**more), record(**right)], [record(layout=0.0), record(**right)]]


def watched(watch, steps, hints=()):
    """What is said at each step, from step 1 on: a list of {name: text}."""
    return [look(watch, step, rows, hints) for step, rows in enumerate(steps, 1)]


# ---- one step's metrics -------------------------------------------------------------------------


def test_dead_groups_are_told_apart_by_where_they_are_equal():
    least, most = record(layout=0.0), record(accuracy=1.0)
    rows = [[least, least], [most, most], [record(), record()], [least, most], [most, least]]
    metrics = step_metrics(rows)
    shares = {kind: metrics[f"dead_groups/{kind}"] for kind in ("all_min", "all_max", "other")}
    assert shares == {"all_min": 1 / 5, "all_max": 1 / 5, "other": 1 / 5}


def test_a_maximum_that_differs_by_rounding_is_the_maximum():
    assert 0.1 + 0.2 != 0.3
    rows = [[record(reward=0.1 + 0.2)] * 2]
    assert step_metrics(rows, {"accuracy": 0.3})["dead_groups/all_max"] == 1.0


def test_a_group_whose_rewards_differ_by_rounding_is_not_dead():
    """The advantage decides by exact equality, and so does frac_reward_zero_std."""
    metrics = step_metrics([[record(reward=0.1 + 0.2), record(reward=0.3)]], {"accuracy": 0.3})
    assert sum(metrics[f"dead_groups/{kind}"] for kind in ("all_min", "all_max", "other")) == 0


def test_parse_failures_count_each_completion_once_per_reason():
    both = {"accuracy": "no answer tag", "format": "no answer tag"}
    rows = [
        [record(reasons=both, answer=None), record()],
        [record(why="empty answer", answer=None), record(accuracy=1.0)],
    ]
    metrics = step_metrics(rows)
    assert metrics["parse_failures/no_answer_tag"] == 1 / 4
    assert metrics["parse_failures/empty_answer"] == 1 / 4
    assert metrics["parse_failures/several_answers"] == 0.0
    assert "parse_failures/wrong_class" not in metrics
    assert sum(name.startswith("parse_failures/") for name in metrics) == len(FAILURES)


def test_the_script_says_which_reasons_are_parse_failures():
    metrics = step_metrics([[record(why="wrong class")] * 2], failures=["wrong class"])
    failures = {name: share for name, share in metrics.items() if "parse" in name}
    assert failures == {"parse_failures/wrong_class": 1.0}


def test_near_misses_have_an_answer_that_earns_nothing():
    rows = [[record(), record(answer=None)], [record(accuracy=0.3), record(accuracy=1.0)]]
    assert step_metrics(rows)["near_misses"] == 1 / 4


# ---- findings -----------------------------------------------------------------------------------


def test_latin_names_are_shown_beside_the_classes():
    """A run on flowers whose answers are all Latin: what it is told."""
    phlox = record(answer="Phlox paniculata", truth="garden phlox")
    lily = record(answer="Lilium", truth="fire lily")
    mute = record(answer=None, why="no answer tag", layout=0.0)
    [nothing, said, *_] = watched(Watch(2, advice=ADVICE), [[[phlox] * 6 + [lily, mute]]] * 3)
    assert nothing == {} and set(said) == {LOW}
    assert said[LOW].split("\n") == [
        "accuracy has been 0, its minimum, in every completion since step 1 "
        "(up to step 2: 16 completions).",
        "reasons:",
        "  wrong class 88%",
        "  no answer tag 12%",
        "most frequent wrong answers:",
        "  `Phlox paniculata` for `garden phlox`, 12 times: " + ADVICE,
        "  `Lilium` for `fire lily`, 2 times",
        "a completion in full (row 7, truth `garden phlox`):",
        "  <think>petals</think><answer>Phlox paniculata</answer>",
        "usual causes:",
        "  75% are identical to another completion of their group: "
        "sampling lacks diversity, raise --temperature",
    ]


def test_a_term_at_its_maximum_no_longer_teaches():
    [said] = watched(Watch(1), [[[record(), record(accuracy=1.0)]]])
    assert set(said) == {HIGH}
    assert "format has been 1, its maximum" in said[HIGH] and "no longer teaches" in said[HIGH]
    assert "  <think>petals</think><answer>tulip</answer>" in said[HIGH].split("\n")


def test_dead_groups_are_found_where_every_term_moves():
    """Each term differs between groups, none within one."""
    rows = [[record(layout=0.0)] * 2, [record(accuracy=1.0)] * 2, [record()] * 2, [record()] * 2]
    [said] = watched(Watch(1, advice=ADVICE), [rows])
    assert set(said) == {DEAD}
    lines = said[DEAD].split("\n")
    assert "  at the minimum 25%, at the maximum 25%, equal otherwise 50%" in lines
    assert "accuracy: wrong class 75%" in lines and "format: no think tag 25%" in lines
    assert f"  `tulip` for `rose`, 6 times: {ADVICE}" in lines


def test_one_group_that_moves_is_not_dead():
    assert watched(Watch(1), [lively()]) == [{}]


def test_each_finding_is_said_once_and_no_earlier():
    flat = [[record(answer="tulip"), record(answer="lily")]]  # accuracy 0, format 1, all dead
    said = watched(Watch(3), [flat] * 4 + [lively()] + [flat] * 5)
    assert [set(found) for found in said] == [set(), set(), {LOW, HIGH, DEAD}] + [set()] * 7


def test_another_finding_is_said_when_its_own_steps_are_full():
    low = [[record(), record(layout=0.0)]]
    flat = [[record(), record()]]
    said = watched(Watch(2), [low, low, flat, flat, flat])
    assert [set(found) for found in said] == [set(), {LOW}, set(), {HIGH, DEAD}, set()]
    assert "since step 3 (up to step 4: 4 completions)" in said[3][HIGH]


def test_a_step_that_moves_begins_the_count_anew():
    flat = [[record(), record()]]
    said = watched(Watch(3), [flat, flat, lively(), flat, flat, flat])
    assert [bool(found) for found in said] == [False] * 5 + [True]
    assert "since step 4 (up to step 6" in said[5][LOW]


def test_one_completion_above_zero_is_enough_to_say_nothing():
    rows = [[record(layout=0.0), record(layout=0.0)], [record(0.01), record(layout=0.0)]]
    assert LOW not in watched(Watch(1), [rows])[0]
    rows[1][0] = record()
    assert LOW in watched(Watch(1), [rows])[0]


def test_zero_steps_turn_it_off():
    assert watched(Watch(0), [[[record()] * 2]] * 3) == [{}] * 3


# ---- the evidence -------------------------------------------------------------------------------


def test_truncation_is_named_with_its_share_and_its_flag():
    rows = [[record(answer=f"{i}", truncated=i < 3) for i in range(4)]]
    [said] = watched(Watch(1), [rows])
    line = "75% of the completions were truncated at the length limit"
    assert f"  {line}: raise --max_completion_length" in said[LOW].split("\n")
    assert "--temperature" not in said[LOW]


def test_identical_completions_are_counted_within_a_group_only():
    one, two = record(answer="tulip"), record(answer="lily")
    [said] = watched(Watch(1), [[[one, two], [one, two]]])
    assert "--temperature" not in said[LOW] and "0% are identical" in said[LOW]
    [said] = watched(Watch(1), [[[one, one], [two, one]]])
    assert "  50% are identical to another completion of their group: " in said[LOW]
    assert "--temperature" in said[LOW] and "--max_completion_length" not in said[LOW]


def test_hints_of_the_script_are_causes_of_the_main_term_only():
    hint = "read as pixels the boxes would have earned an IoU of 0.61"
    rows = [[record(layout=0.0, answer="1"), record(layout=0.0, answer="2")]]
    [said] = watched(Watch(1), [rows], [hint])
    assert f"usual causes:\n  {hint}" in said[LOW] and f"\n  {hint}" in said[DEAD]
    assert hint not in said["diagnosis/format/at_minimum"]
    assert "`1` for `rose`" not in said["diagnosis/format/at_minimum"]


PAID, BARE = "<think>petals</think><answer>tulip</answer>", "<answer>tulip</answer>"


@pytest.mark.parametrize(
    "thought, wanted, texts, name, done",
    [
        ("closed", "answer", [PAID, PAID, BARE], "another_thought", "open another"),
        ("closed", "think", [PAID, BARE, BARE], "no_thought", "have no thought of their own"),
        ("closed", "answer", [PAID, BARE, BARE], None, ""),
        ("closed", "think", [PAID, PAID, BARE], None, ""),
        ("closed", "answer", [PAID, BARE], None, ""),  # half is not most
        ("opened", "think", [PAID, PAID, BARE], None, ""),
        ("open", "answer", [PAID, PAID, BARE], None, ""),
    ],
)
def test_most_answers_open_a_thought_after_a_closed_one(thought, wanted, texts, name, done):
    """Said even if a few earn the format reward: no term is flat here."""
    watch, task = Watch(2, thought=thought), SimpleNamespace(answer_format=wanted)
    row = [record(completion=text, layout=float(i == 0)) for i, text in enumerate(texts)]
    row += [record(completion=texts[0], accuracy=1.0), record(completion=texts[-1])]
    assert look(watch, 1, [row], (), task) == {}
    found = look(watch, 2, [row], (), task)
    if name is None:
        assert found == {}
        return
    misfit = PAID if wanted == "answer" else BARE
    count = 2 * sum(r.completion == misfit for r in row)
    assert list(found) == [f"diagnosis/{name}"]
    lines = found[f"diagnosis/{name}"].split("\n")
    said = f"the prompt has closed the thought, and {count} answers {done} since step 1 "
    assert lines[0] == said + "(up to step 2: 10 completions)."
    assert lines[-1] == f"  {misfit}"
    assert look(watch, 3, [row], (), task) == {}, "once"


def test_a_step_in_which_most_answers_fit_begins_the_count_again():
    watch, task = Watch(2, thought="closed"), SimpleNamespace(answer_format="answer")
    earned = {"accuracy": 1.0}, {"layout": 0.0}, {}
    thinking, bare = ([[record(completion=c, **e) for e in earned]] for c in (PAID, BARE))
    found = [look(watch, i, rows, (), task) for i, rows in enumerate([thinking, bare, thinking])]
    assert found == [{}] * 3
    state = json.loads(json.dumps(watch.state()))
    again = Watch(2, state, thought="closed")
    assert list(look(again, 3, thinking, (), task)) == ["diagnosis/another_thought"]


def test_the_completion_shown_failed_for_the_most_frequent_reason():
    rare = record(answer=None, why="no answer tag", completion="nothing to see")
    usual, once = record(answer="lily"), record(answer="iris")
    [said] = watched(Watch(1), [[[rare, usual, usual, once]]])
    assert "  `lily` for `rose`, 2 times\n  `iris` for `rose`, 1 time\n" in said[LOW]
    assert "  <think>petals</think><answer>lily</answer>" in said[LOW].split("\n")
    assert "nothing to see" not in said[LOW]


def test_a_long_completion_is_cut_and_said_so():
    [said] = watched(Watch(1), [[[record(completion="a" * LONGEST + "b" * 41)]]])
    assert f"a completion cut at {LONGEST} of {LONGEST + 41} characters" in said[LOW]
    assert "  " + "a" * LONGEST + "..." in said[LOW].split("\n")
    [said] = watched(Watch(1), [[[record(completion="a" * LONGEST)]]])
    assert "a completion in full" in said[LOW] and "..." not in said[LOW]


@pytest.mark.parametrize("hostile", ["\x1b[2J\r\n" * 50, "\ud800\u202e\0", "é" * 9999])
def test_hostile_text_neither_steers_the_terminal_nor_floods_it(hostile):
    row = [record(answer=f"{i}{hostile}", truth=hostile, completion=hostile) for i in range(9)]
    for i, r in enumerate(row):
        r.reasons.update({"accuracy": f"{i}{hostile}", "format": ""})
    [said] = watched(Watch(1, advice=ADVICE), [[row]], [hostile] * 9)
    assert set(said) == {LOW, HIGH, DEAD}
    for text in said.values():
        lines = text.split("\n")
        assert len(lines) <= 25 and all(line.isprintable() and len(line) < 3000 for line in lines)
        assert text.encode()


# ---- memory and resuming ------------------------------------------------------------------------


def test_memory_is_bounded_however_long_the_run():
    watch, sizes = Watch(3), []
    for step in range(1, 13):
        names = [f"{step}-{i} " + "x" * 5000 for i in range(KEPT + 50)]
        row = [record(answer=n, truth=n, completion=n, why=n) for n in names]
        look(watch, step, [row])
        sizes.append(len(json.dumps(watch.state())))
    assert sizes[2] > sizes[0] and max(sizes[3:]) < sizes[2] * 1.1
    for past in watch.state()["window"]:
        assert len(past["wrong"]) == len(past["reasons"]["accuracy"]) == KEPT


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_says_the_same(stop):
    steps = [lively()] + [
        [[record(answer=f"{step % 2}"), record(answer=f"{i}", truncated=step == i)] for i in "ab"]
        for step in range(7)
    ]
    whole = watched(Watch(4, advice=ADVICE), steps)
    first = Watch(4, advice=ADVICE)
    said = watched(first, steps[:stop])
    second = Watch(4, json.loads(json.dumps(first.state())), ADVICE)
    for number, rows in enumerate(steps[stop:], stop + 1):
        said.append(look(second, number, rows))
    assert said == whole and sum(map(len, whole)) == 3


def test_one_of_several_data_sets_that_earns_nothing_is_found():
    """Beside a set that learns it would not be seen; over the steps that have drawn it, and over a
    resume."""
    lazy = [[record(dataset="lazy"), record(dataset="lazy", layout=0.0)]]
    busy = [[replace(one, dataset="busy") for one in group] for group in lively()]
    steps = [busy + lazy, busy, busy + lazy]
    watch = Watch(2)
    assert look(watch, 1, steps[0]) == {} == look(watch, 2, steps[1])
    watch = Watch(2, json.loads(json.dumps(watch.state())))
    said = look(watch, 3, steps[2])
    assert said.keys() == {"diagnosis/lazy/accuracy/at_minimum"}
    (text,) = said.values()
    assert text.startswith("lazy: accuracy has been 0, its minimum, in every completion")
    assert look(watch, 4, steps[2]) == {}, "once"


def test_what_all_data_sets_show_is_said_once():
    rows = [[record(dataset=name), record(dataset=name, layout=0.0)] for name in ("a", "b")]
    watch = Watch(2)
    look(watch, 1, rows)
    assert look(watch, 2, rows).keys() == {LOW}
