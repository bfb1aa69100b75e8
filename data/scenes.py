"""Scenes of named objects drawn in code: the data set "demo:scenes" for detection.

A row asks for all objects of one category, a colour and a shape, among others that share its
colour, its shape or neither. In a fifth of the rows there is none. Each drawing follows from
(split, number) alone, so no drawing of one split occurs in another. Boxes are in thousandths of the
image per axis, as in the ViRFT data sets. No model and no reward is known here.
"""

import math
from random import Random

from PIL import Image, ImageDraw

SIZE = 112  # pixels a side: 8 x 8 patches of 14, 16 image tokens
SUPERSAMPLE = 4

COLOURS = {
    "red": (215, 50, 45),
    "blue": (60, 100, 220),
    "yellow": (245, 210, 50),
    "white": (240, 240, 240),
}
SHAPES = ("ball", "block", "star", "cross")
CATEGORIES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in thousandths


def problem(category: str) -> str:
    """The question for one category, in Visual-RFT's manner but shorter."""
    return (
        f"Detect all objects of category '{category}'. Think in <think> </think>, answer in "
        "<answer> </answer> with boxes or No Objects."
    )


def solution(boxes: list[Box]) -> str:
    """The ViRFT solution of these boxes."""
    if not boxes:
        return "<answer>No Objects</answer>"
    items = ", ".join(f"{{'Position': {list(box)}, 'Confidence': 1.0}}" for box in boxes)
    return f"<answer>[{items}]</answer>"


def rows(split: str, count: int) -> list[dict]:
    """`count` rows of a split in the ViRFT schema (image, problem, solution)."""
    table = []
    for number in range(count):
        image, category, boxes = scene(f"{split}/{number}")
        table.append({"image": image, "problem": problem(category), "solution": solution(boxes)})
    return table


def scene(seed: str) -> tuple[Image.Image, str, list[Box]]:
    """One drawing (RGB, SIZE x SIZE), the category asked for and its boxes, from left to right."""
    rng = Random(f"scene/{seed}")
    category = rng.choice(CATEGORIES)
    wanted = rng.choices((0, 1, 2), (0.2, 0.6, 0.2))[0]
    others = [name for name in CATEGORIES if name != category]
    names = [category] * wanted + rng.sample(others, rng.randint(1, 3))
    side = SIZE * SUPERSAMPLE
    image = _ground(side, rng)
    canvas = ImageDraw.Draw(image)
    _clutter(canvas, side, rng)
    placed, boxes = [], []
    for name in names:
        if (spot := _free_spot(placed, rng)) is None:
            continue
        placed.append(spot)
        extent = _draw_object(canvas, name, spot, rng)
        if name == category:
            boxes.append(tuple(round(1000 * value / side) for value in extent))
    image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    noise = Image.frombytes("RGB", image.size, rng.randbytes(SIZE * SIZE * 3))
    return Image.blend(image, noise, rng.uniform(0.03, 0.10)), category, sorted(boxes)


def _free_spot(placed, rng: Random):
    """(x, y, radius) in supersampled pixels, clear of what is placed; None where none is found."""
    side = SIZE * SUPERSAMPLE
    for _ in range(40):
        radius = side * rng.uniform(0.09, 0.17)
        x, y = rng.uniform(radius, side - radius), rng.uniform(radius, side - radius)
        if all(math.hypot(x - a, y - b) > radius + r for a, b, r in placed):
            return x, y, radius
    return None


def _draw_object(canvas, name: str, spot, rng: Random) -> tuple[float, float, float, float]:
    """Draws a category's object into the circle `spot`; returns the extent that it covers."""
    colour, shape = name.split()
    x, y, radius = spot
    fill = _vary(COLOURS[colour], rng, 12)
    edge = tuple(int(value * 0.6) for value in fill)
    wide, high = radius * rng.uniform(0.75, 1.0), radius * rng.uniform(0.75, 1.0)
    if shape == "ball":
        canvas.ellipse((x - wide, y - high, x + wide, y + high), fill, edge, SUPERSAMPLE)
        return x - wide, y - high, x + wide, y + high
    points = [(x + wide * a, y + high * b) for a, b in _OUTLINES[shape]]
    canvas.polygon(points, fill, edge, SUPERSAMPLE)
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [
        ((1.0, 0.42)[i % 2] * math.cos(angle), (1.0, 0.42)[i % 2] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    return [
        point
        for turn in range(4)
        for x, y in quarter
        for point in [((x, y), (-y, x), (-x, -y), (y, -x))[turn]]
    ]


_OUTLINES = {
    "block": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "star": _star(),
    "cross": _cross(),
}


def _ground(side: int, rng: Random) -> Image.Image:
    """Ground lit from the right and from below, in two colours of light."""
    across = Image.linear_gradient("L").rotate(90).resize((side, side))
    down = Image.linear_gradient("L").resize((side, side))
    red, green, blue = _vary((70, 75, 70), rng, 12)
    return Image.merge(
        "RGB",
        (
            across.point(lambda value: red + value * 0.45),
            Image.new("L", (side, side), green),
            down.point(lambda value: blue + value * 0.45),
        ),
    )


def _clutter(canvas, side: int, rng: Random) -> None:
    for _ in range(rng.randint(4, 10)):
        ends = [rng.uniform(0, side) for _ in range(4)]
        shade = _vary((115, 105, 90), rng, 55)
        canvas.line(ends, fill=shade, width=rng.randint(1, 4) * SUPERSAMPLE // 2)
    for _ in range(rng.randint(3, 10)):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.006, 0.02)
        shade = rng.choice(list(COLOURS.values()))
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=shade)


def _vary(colour, rng: Random, spread: int) -> tuple[int, int, int]:
    shift = rng.randint(-spread, spread)
    return tuple(max(0, min(255, value + shift)) for value in colour)
