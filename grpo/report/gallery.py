"""The held-out rows and the training groups that a report shows, ready for the template."""

from grpo.report.pictures import Album, class_of, draw, has_boxes
from grpo.report.read import Completions, RunRecord
from grpo.report.sample import CARDS, LETTERS, SAMPLES, pick_groups, rank_rows, shortened

LETTERS_OF_A_CARD = 1000  # of each of its texts


class Gallery:
    """Held-out rows, worst and most changed first: a card each, at most `CARDS`. Empty without an
    evaluation.

    count: of all held-out rows. first, last: steps of the two evaluations, the same if there was
    one only. classes: of the rows that are shown. boxes: whether answers are boxes. term: the
    reward that decides whether an answer is right; least: the value that it must exceed (boxes) or
    reach. without_frames: whether boxes cannot be drawn, as the run did not write their frame.
    """

    def __init__(self, run: RunRecord, album: Album):
        evaluations = run.answers()
        self.count, self.cards, self.classes, self.term, self.boxes = 0, [], [], "", False
        self.first = self.last = None
        if not evaluations or not evaluations[-1][1]:
            return
        (self.first, before), (self.last, after) = evaluations[0], evaluations[-1]
        record = next(iter(after.values()))
        self.term, self.boxes = next(iter(record["rewards"])), has_boxes(record["truth"])
        self.least = run.config.get("iou_threshold", 0.5) if self.boxes else 1
        self.without_frames = self.boxes and not run.frames
        before = before if self.first != self.last else {}
        now = {row: self._value(record) for row, record in after.items()}
        then = {row: self._value(record) for row, record in before.items()}
        self.count = len(after)
        for row in rank_rows(then, now)[:CARDS]:
            self.cards.append(self._card(row, before.get(row), after[row], run, album))
        names = sorted({card["class"] for card in self.cards})
        self.classes = names
        changes = sorted(self.cards, key=lambda card: -abs(card["change"]))
        for rank, card in enumerate(changes):
            card["by_change"], card["class_number"] = rank, names.index(card["class"])
        for rank, card in enumerate(sorted(self.cards, key=lambda card: card["value"])):
            card["by_value"] = rank

    def _value(self, record: dict) -> float:
        return record["rewards"].get(self.term) or 0.0

    def _is_right(self, record: dict) -> bool:
        value = self._value(record)
        return value > self.least if self.boxes else value >= self.least

    def _card(self, place: tuple, before: dict | None, after: dict, run: RunRecord, album) -> dict:
        """place: a data set's name, "" if there is one, and a row's number."""
        row, picture = album.row(True, *place), album.picture(True, *place)
        frames, (dataset, number) = frames_for(run, place[0]), place
        drawn = draw("truth", after["truth"], picture, frames, "")
        if before:
            drawn += draw("before", before["answer"], picture, frames, None)
        drawn += draw("after", after["answer"], picture, frames, None)
        kind = class_of(after, row, self.boxes)
        change = self._value(after) - self._value(before) if before else 0.0
        answers = [self._answer("before", before)] if before else []
        return {
            "row": number,
            "called": called(dataset, number),
            "title": shortened(kind, 80),
            "class": shortened(of_set(dataset, kind), 80),
            "picture": picture,
            "images": len(row.images) if row else 0,
            "problem": shortened(row.problem, LETTERS_OF_A_CARD) if row else None,
            "truth": shortened(after["truth"], LETTERS_OF_A_CARD),
            "answers": [*answers, self._answer("after", after)],
            "drawn": drawn if self.boxes else [],
            "value": self._value(after),
            "change": change,
            "was": "" if before is None else "right" if self._is_right(before) else "wrong",
            "now": "right" if self._is_right(after) else "wrong",
        }

    def _answer(self, when: str, record: dict) -> dict:
        return {
            "when": when,
            "step": self.first if when == "before" else self.last,
            "right": self._is_right(record),
            "answer": shortened(record["answer"], LETTERS_OF_A_CARD),
            "completion": shortened(record["completion"], LETTERS_OF_A_CARD),
            "rewards": record["rewards"],
            "reasons": record.get("reasons") or {},
        }


def frames_for(run: RunRecord, dataset: str) -> dict | None:
    """`RunRecord.frames` of a data set."""
    sets = (run.frames or {}).get("sets")
    return sets.get(dataset) if sets else run.frames


def called(dataset: str, row: int) -> str:
    """3, or 3 of flowers."""
    return f"{row}{f' of {dataset}' * bool(dataset)}"


def of_set(dataset: str, name: str) -> str:
    """A class, with its data set where there are several."""
    return f"{dataset}: {name}" if dataset else name


def training_groups(run: RunRecord, completions: Completions, album: Album) -> list[dict]:
    """Some groups of completions, spread evenly over the run, in the order of the steps."""
    picked = pick_groups(completions.groups)
    groups = []
    for step, prompt in picked:
        records = completions.group(step, prompt)
        shown = records[:SAMPLES]
        letters = min(3000, LETTERS // (len(picked) * len(shown)))
        index, truth = records[0]["row"], records[0]["truth"]
        dataset = records[0].get("dataset") or ""
        row, picture = album.row(False, dataset, index), album.picture(False, dataset, index)
        frames = frames_for(run, dataset)
        boxes, drawn = has_boxes(truth), []
        if boxes:
            drawn = draw("truth", truth, picture, frames, "")
            for number, record in enumerate(shown):
                kind = "up" if (record["advantage"] or 0.0) > 0 else "down"
                drawn += draw(kind, record["answer"], picture, frames, str(number))
        rewards = [record["reward"] or 0.0 for record in records]
        largest = max(abs(record["advantage"] or 0.0) for record in records) or 1.0
        groups.append({
            "step": step,
            "prompt": prompt,
            "row": index,
            "truth": shortened(truth, LETTERS_OF_A_CARD),
            "class": shortened(of_set(dataset, class_of(records[0], row, boxes)), 80),
            "problem": shortened(row.problem, LETTERS_OF_A_CARD) if row else None,
            "picture": picture,
            "drawn": drawn,
            "boxes": boxes,
            "dead": len(set(rewards)) == 1,
            "lowest": min(rewards),
            "highest": max(rewards),
            "size": len(records),
            "samples": [
                {
                    "number": number,
                    "completion": shortened(record["completion"], letters),
                    "rewards": record["rewards"],
                    "reward": record["reward"],
                    "advantage": record["advantage"],
                    "strength": round(100 * abs(record["advantage"] or 0.0) / largest),
                    "tokens": record.get("tokens"),
                    "truncated": record.get("truncated", False),
                }
                for number, record in enumerate(shown)
            ],
        })  # fmt: skip
    return groups
