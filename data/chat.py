"""Conversations as LLaMA-Factory, ms-swift, VLM-R1 and TRL store them: one question, one answer.

A row has `messages` (role, content), `conversations` (from, value) or messages in `prompt`, and its
images in a column or among the parts of a message. The last answer is the solution, unless a column
`solution` (`answer`, `ground_truth`) holds it. A system prompt is put before the question. Not
here: conversations of several questions, which are refused.
"""

import json

from data.errors import UserError
from data.rows import IMAGE_COLUMNS, PLACEHOLDER, as_text

COLUMNS = ("messages", "conversations", "prompt")
SOLUTIONS = ("solution", "answer", "ground_truth")
USER, ASSISTANT, SYSTEM = ("user", "human"), ("assistant", "gpt", "model"), ("system",)
UNSUPPORTED = ("videos", "video", "audios", "audio", "tools")
UNSUPPORTED += ("rejected_response", "rejected", "chosen")


def is_chat(columns, first: dict) -> bool:
    """Whether a table with these columns and this first row holds conversations."""
    if "problem" in columns or not set(COLUMNS) & set(columns):
        return False
    return "prompt" not in columns or isinstance(first.get("prompt"), list)


def frame_of(first: dict) -> str | None:
    """What the boxes of ms-swift's `objects` count, of a table with this first row: "pixels"; None
    if it has none."""
    return "pixels" if isinstance(first.get("objects"), dict) else None


def convert(row: dict) -> dict:
    """A conversation -> images, problem and solution; a `fault` that says why if it has none."""
    try:
        return _converted(row)
    except ValueError as error:
        return {"problem": None, "solution": None, "fault": str(error)}


def _converted(row: dict) -> dict:
    unsupported = [name for name in UNSUPPORTED if row.get(name)]
    if unsupported:
        raise UserError(f"it has {', '.join(unsupported)}, which cannot be trained on here")
    turns = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if isinstance(turns, str):  # some tables hold JSON
        try:
            turns = json.loads(turns)
        except (json.JSONDecodeError, RecursionError):
            raise UserError(f"its conversation is no list of messages: {turns[:80]!r}") from None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"its conversation is no list of messages: {str(turns)[:80]!r}")
    images = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), [])
    images = list(images) if isinstance(images, list | tuple) else [images]
    inline_images: list = []
    messages = [(_role(turn), _text(turn, inline_images)) for turn in turns]
    if row.get("objects"):
        messages = _with_objects(messages, row["objects"])
    questions = [text for role, text in messages if role == "user"]
    if len(questions) != 1:
        raise UserError(f"it has {len(questions)} questions; one question and its answer is a row")
    if row.get("system"):
        messages.insert(0, ("system", _as_text(row["system"])))
    system = "".join(f"{text.strip()}\n\n" for role, text in messages if role == "system")
    answers = [text for role, text in messages if role == "assistant"]
    rule = row.get("reward_model")  # verl's
    row = row | rule if isinstance(rule, dict) else row
    solution = next((row[name] for name in SOLUTIONS if row.get(name) is not None), None)
    if solution is None:
        if not answers or messages[-1][0] != "assistant":
            raise UserError("it ends without an answer, and has no column solution")
        solution = answers[-1]
    problem, images = f"{system}{questions[0]}", images or inline_images
    placeholders = problem.count(PLACEHOLDER)
    if placeholders and placeholders != len(images):
        raise UserError(f"{placeholders} {PLACEHOLDER} in the question, and images: {len(images)}")
    problem = _without_leading(problem)
    return {"images": images, "problem": problem, "solution": _as_text(solution)}


def _with_objects(messages: list[tuple[str, str]], objects) -> list[tuple[str, str]]:
    """ms-swift's placeholders filled: each <ref-object> with a name of `ref`, each <bbox> with a
    box of `bbox`, [x1, y1, x2, y2] in pixels."""
    if not isinstance(objects, dict) or objects.get("bbox_type", "real") != "real":
        kind = objects.get("bbox_type") if isinstance(objects, dict) else objects
        raise UserError(f"its objects are {str(kind)[:80]!r}; read are ref and bbox in pixels")
    names, boxes = list(objects.get("ref") or []), list(objects.get("bbox") or [])
    filled = []
    for role, text in messages:
        one = text.strip() == "<bbox>"
        for mark, values in (("<ref-object>", names), ("<bbox>", boxes)):
            while mark in text:
                if not values:
                    raise UserError(f"its objects have fewer values than there are {mark}")
                text = text.replace(mark, _as_text(values.pop(0)), 1)
        if role == "assistant" and not one and text.startswith("[") and "][" in text:
            text = f"[{text.replace('][', '], [')}]"  # several boxes are a list of them
        filled.append((role, text))
    if names or boxes:
        raise UserError(f"its objects have {len(names) + len(boxes)} values that no text asks for")
    return filled


def _role(turn: dict) -> str:
    """ "user", "assistant" or "system", whatever the format calls them."""
    role = turn.get("role", turn.get("from"))
    for name, known in (("user", USER), ("assistant", ASSISTANT), ("system", SYSTEM)):
        if role in known:
            return name
    raise UserError(f"a message is by {str(role)[:40]!r}; known are user, assistant and system")


def _text(turn: dict, images: list) -> str:
    """The message's text; images among its parts are added to `images`."""
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, list):
        return _as_text(content)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            return _as_text(content)  # four numbers, as VLM-R1's answers are
        elif part.get("type") in ("image", "image_url"):
            keys = ("image", "image_url", "url", "path")
            image = next((part[key] for key in keys if part.get(key)), None)
            image = image.get("url") if isinstance(image, dict) and "url" in image else image
            images += [] if image is None else [image]
            texts.append(PLACEHOLDER)
        elif part.get("text") is not None:
            texts.append(_as_text(part["text"]))
        elif "bbox_2d" in part or "Position" in part:
            return _as_text(content)
        else:
            raise UserError(f"a message has a part of type {str(part.get('type'))[:40]!r}")
    return "".join(texts)


def _as_text(value) -> str:
    """Text as it is, numbers and lists of boxes as JSON; None, NaN and the like as nothing."""
    text = as_text(value)
    return text if isinstance(text, str) else ""


def _without_leading(problem: str) -> str:
    """The problem without placeholders at its start: images come first anyway. Unchanged if there
    are others further on."""
    text = problem.lstrip()
    while text.startswith(PLACEHOLDER):
        text = text.removeprefix(PLACEHOLDER).lstrip()
    return text if PLACEHOLDER not in text else problem
