"""Why a reward is flat: dead groups, parse failures, near misses, and findings in plain text.

A record is one completion: "rewards" {term: 0 to 1}, the main term first; "reasons" {term: why not
its maximum, or ""}; "reward", the weighted sum; "answer", what was found, or None; "truth", the
right answer; "completion"; "truncated". `records` is a row of G of them per prompt.

Not here: what an answer means, why a term pays (the rewards say so), where a finding is written.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence

FIND_FAILURES = ("no answer tag", "several answers", "answer not closed", "empty answer")
PARSE_FAILURES = (*FIND_FAILURES, "not a list of boxes")
DEAD = {"all_min": "at the minimum", "all_max": "at the maximum", "other": "equal otherwise"}
KEPT = 200  # distinct wrong answers, and reasons of a term, that are kept of one step
WIDTH, LONGEST = 80, 600  # characters shown: of an answer or a reason, of a completion
LISTED = 5  # most lines of any one list
TRUNCATED_TELLS, IDENTICAL_TELLS = 0.1, 0.5  # the least share that is named as a cause


def step_metrics(
    records: list[list[dict]],
    total_min: float,
    total_max: float,
    parse_failures: Sequence[str] = PARSE_FAILURES,
) -> dict[str, float]:
    """What one step says about rewards that carry no gradient.

    total_min, total_max: the least and the greatest weighted sum of the terms.

    Returns shares, 0 to 1. Of groups whose rewards are all equal: `dead_groups/all_min`,
    `dead_groups/all_max`, `dead_groups/other`. Of completions: `parse_failures/<reason>` for each
    of `parse_failures`, 0 where it did not occur, and a completion counts once however many terms
    name it; `near_misses`, those with an answer for which the main term pays nothing.
    """
    completions = [record for row in records for record in row]
    dead = Counter(_dead(row, total_min, total_max) for row in records)
    failures = Counter(reason for r in completions for reason in set(r["reasons"].values()))
    metrics = {f"dead_groups/{kind}": dead[kind] / len(records) for kind in DEAD}
    for why in parse_failures:
        metrics[f"parse_failures/{why.replace(' ', '_')}"] = failures[why] / len(completions)
    metrics["near_misses"] = sum(map(_is_near_miss, completions)) / len(completions)
    return metrics


class Watch:
    """Finds rewards that have been flat for `after` steps in a row, and says each finding once.

    after: steps (--diagnose_after); 0 finds nothing. state: what `state()` returned, to go on from
    there. advice: what to do if the wrong answers are right after all, e.g. "if these are synonyms,
    pass --aliases". Memory is bounded: the last `after` steps' counts, each of `KEPT` texts.
    """

    def __init__(self, after: int, state: Mapping | None = None, advice: str = ""):
        self.after, self.advice, state = after, advice, state or {"window": [], "said": []}
        self._window, self._said = deque(state["window"], maxlen=after), list(state["said"])

    def state(self) -> dict:
        """What a resumed run needs to find and say the same: plain lists and dicts, for JSON."""
        return {"window": list(self._window), "said": list(self._said)}

    def update(
        self, step: int, records: list[list[dict]], total_min: float, total_max: float
    ) -> list[str]:
        """Takes in one step's records; returns the names of what is found now, mostly none.

        `diagnosis/<term>/at_minimum`, `diagnosis/<term>/at_maximum`, `diagnosis/all_groups_dead`:
        each once per run, at the step that completes `after` in a row.
        """
        self._window.append(_summary(step, records, total_min, total_max))
        if len(self._window) < self.after or self.after < 1:
            return []
        flat = set.intersection(*(set(past["flat"]) for past in self._window))
        found = sorted(flat.difference(self._said))
        self._said += found
        return found

    def explain(
        self, found: Sequence[str], records: list[list[dict]], hints: Sequence[str] = ()
    ) -> dict[str, str]:
        """What `update` just found in plain text, {name: at most 25 lines}.

        hints: more evidence that the script found, a line each, the first `LISTED` of them shown
        where the main term is at its minimum or all groups are dead.
        """
        texts = {}
        for index, term in enumerate(records[0][0]["rewards"]):
            if (name := f"diagnosis/{term}/at_minimum") in found:
                texts[name] = self._at_minimum(term, index == 0, records, hints)
            if (name := f"diagnosis/{term}/at_maximum") in found:
                texts[name] = self._at_maximum(term, records)
        if (name := "diagnosis/all_groups_dead") in found:
            texts[name] = self._all_dead(records, hints)
        return texts

    # ---- the texts: lines of evidence from the window, and a completion of the last step ---------

    def _at_minimum(self, term: str, is_main: bool, records: list, hints: Sequence[str]) -> str:
        lines = [f"{term} has been 0, its minimum, in every completion {self._span()}."]
        lines += ["reasons:", *(f"  {reason}" for reason in self._reasons(term))]
        lines += self._wrong_answers() if is_main else []
        lines += self._example(records, term) + self._causes(hints if is_main else ())
        return "\n".join(lines)

    def _at_maximum(self, term: str, records: list) -> str:
        lines = [f"{term} has been 1, its maximum, in every completion {self._span()}."]
        lines += [
            "It no longer teaches: only differences within a group give a gradient. If this is"
        ]
        lines += ["what should be paid for, other terms or harder prompts must teach from here on."]
        return "\n".join(lines + self._example(records, term))

    def _all_dead(self, records: list, hints: Sequence[str]) -> str:
        groups = {kind: sum(past["dead"][kind] for past in self._window) for kind in DEAD}
        total, main = sum(groups.values()), next(iter(records[0][0]["rewards"]))
        lines = [
            f"all groups have been dead {self._span()}: equal rewards, so no gradient from them.",
            "  " + ", ".join(f"{text} {groups[kind] / total:.0%}" for kind, text in DEAD.items()),
        ]
        reasons = {term: self._reasons(term) for term in records[0][0]["rewards"]}
        lines += [f"{term}: {', '.join(said)}" for term, said in reasons.items() if said][:LISTED]
        lines += self._wrong_answers()
        return "\n".join(lines + self._example(records, main) + self._causes(hints))

    def _span(self) -> str:
        first, last = self._window[0]["step"], self._window[-1]["step"]
        return f"since step {first} (up to step {last}: {self._sum('completions')} completions)"

    def _sum(self, name: str) -> int:
        return sum(past[name] for past in self._window)

    def _usual(self, term: str) -> list[tuple[str, int]]:
        """The most frequent reasons that kept a term from its maximum, with their counts."""
        reasons = (Counter(past["reasons"][term]) for past in self._window)
        return sum(reasons, Counter()).most_common(LISTED)

    def _reasons(self, term: str) -> list[str]:
        """The same with their shares of the completions, e.g. "wrong class 87%"."""
        return [f"{why} {n / self._sum('completions'):.0%}" for why, n in self._usual(term)]

    def _example(self, records: list[list[dict]], term: str) -> list[str]:
        """The first completion that failed a term for its most frequent reason, else the first."""
        completions = [record for row in records for record in row]
        usual = [why for why, _ in self._usual(term)[:1]]
        failed = (r for r in completions if r["rewards"][term] < 1 and _why(r, term) in usual)
        chosen = next(failed, completions[0])
        text = chosen["completion"]
        cut = f"cut at {LONGEST} of {len(text)} characters" if len(text) > LONGEST else "in full"
        place = f"row {chosen['row']}, truth `{_shown(chosen['truth'])}`"
        return [f"a completion {cut} ({place}):", f"  {_shown(text, LONGEST)}"]

    def _wrong_answers(self) -> list[str]:
        pairs = (Counter({(a, t): n for a, t, n in past["wrong"]}) for past in self._window)
        usual = sum(pairs, Counter()).most_common(LISTED)
        lines = [f"  `{a}` for `{t}`, {n} time{'s' * (n > 1)}" for (a, t), n in usual]
        if lines and self.advice:
            lines[0] += f": {self.advice}"
        return ["most frequent wrong answers:", *lines] if lines else []

    def _causes(self, hints: Sequence[str]) -> list[str]:
        total = self._sum("completions")
        truncated, identical = self._sum("truncated") / total, self._sum("identical") / total
        cut = f"{truncated:.0%} of the completions were truncated at the length limit"
        same = f"{identical:.0%} are identical to another completion of their group"
        lines = [f"  {_shown(hint, LONGEST)}" for hint in hints[:LISTED]]
        if truncated >= TRUNCATED_TELLS:
            lines.append(f"  {cut}: raise --max_completion_length")
        if identical >= IDENTICAL_TELLS:
            lines.append(f"  {same}: sampling lacks diversity, raise --temperature")
        return ["usual causes:", *(lines or [f"  none seen: {cut}, {same}"])]


def _summary(step: int, records: list[list[dict]], total_min: float, total_max: float) -> dict:
    """The counts of one step that findings are made of, for JSON."""
    completions = [record for row in records for record in row]
    terms = list(completions[0]["rewards"])
    dead = Counter(_dead(row, total_min, total_max) for row in records)
    copies = [n for row in records for n in Counter(r["completion"] for r in row).values()]
    unpaid = {t: [r for r in completions if r["rewards"][t] < 1] for t in terms}
    reasons = {t: Counter(_why(r, t) for r in unpaid[t]) for t in terms}
    misses = [(_shown(r["answer"]), _shown(r["truth"])) for r in completions if _is_near_miss(r)]
    earned = {t: any(r["rewards"][t] > 0 for r in completions) for t in terms}
    flat = [f"diagnosis/{t}/at_minimum" for t in terms if not earned[t]]
    flat += [f"diagnosis/{t}/at_maximum" for t in terms if not unpaid[t]]
    flat += [] if dead[""] else ["diagnosis/all_groups_dead"]
    return {
        "step": step,
        "completions": len(completions),
        "flat": flat,
        "dead": {kind: dead[kind] for kind in DEAD},
        "truncated": sum(bool(r["truncated"]) for r in completions),
        "identical": sum(n for n in copies if n > 1),
        "reasons": {t: dict(reasons[t].most_common(KEPT)) for t in terms},
        "wrong": [[*pair, count] for pair, count in Counter(misses).most_common(KEPT)],
    }


def _dead(row: list[dict], total_min: float, total_max: float) -> str:
    """Which kind of `DEAD` a group is, or "" where it carries a gradient."""
    reward = row[0]["reward"]
    if any(record["reward"] != reward for record in row):
        return ""
    for kind, end in (("all_min", total_min), ("all_max", total_max)):
        if math.isclose(reward, end, abs_tol=1e-9):  # a sum of floats: equal up to rounding
            return kind
    return "other"


def _why(record: dict, term: str) -> str:
    return _shown(record["reasons"].get(term) or "no reason given")


def _is_near_miss(record: dict) -> bool:
    return record["answer"] is not None and next(iter(record["rewards"].values())) <= 0


def _shown(text: str, width: int = WIDTH) -> str:
    """Text cut at `width`, on one line; escaped where it could steer a terminal."""
    text = text if len(text) <= width else text[:width] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
