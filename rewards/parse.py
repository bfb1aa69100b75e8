"""Find the answer in a completion.

Not here: what an answer means (`cls.py`, `det.py`), and whether the completion as a whole keeps to
the layout that was asked for (`format.py`).
"""

OPEN, CLOSE = "<answer>", "</answer>"


def find_answer(completion: str) -> tuple[str | None, str]:
    """Find the text in the one `<answer>...</answer>` after the last `</think>`.

    A completion without `</think>` is searched whole. Tags are exact: lower case, no white space.

    Returns (answer, ""), the answer stripped and never empty; or (None, reason), the reason one of
    "no answer tag", "several answers", "answer not closed", "empty answer". Raises nothing, and
    takes time linear in the text's length.
    """
    tail = completion.rpartition("</think>")[2]
    opened, closed = tail.count(OPEN), tail.count(CLOSE)
    # Several answers are no answer: to pick one of them would pay for writing down every guess.
    if opened > 1 or closed > 1:
        return None, "several answers"
    if opened == 0:
        return None, "no answer tag"
    answer, end, _ = tail.partition(OPEN)[2].partition(CLOSE)
    if not end:
        return None, "answer not closed"
    answer = answer.strip()
    return (answer, "") if answer else (None, "empty answer")


def perfect(solution: str) -> str:
    """The completion that a data set's solution asks for: some reasoning, then the solution."""
    answer = solution.strip()
    if OPEN not in answer:
        answer = f"{OPEN}{answer}{CLOSE}"
    return f"<think>It is so.</think>{answer}"
