"""README's picture: what a demo's model answered before and after training, and its learning curve.

    python -m demo.picture RUN [RUN ...] --output docs/demo.png

Everything is read from the run folders (config.yaml, metrics.jsonl, eval-*.jsonl) and their data
set. It shows the first held-out rows of different classes whose answer was not right before
training; the numbers above them are of all held-out rows.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.errors import UserError
from data.images import open_image
from data.load import load
from grpo.report.read import read_run
from rewards.boxes import parse_boxes, read_boxes, solution_kind
from rewards.coco import category

WIDTH, PANEL, MARGIN = 1760, 510, 50  # pixels; PANEL is the height of a panel
IMAGE, GAP, SHOWN = 250, 34, 4  # side of an example, space between two, how many
INK, GREY, PALE = "#1f2328", "#6b7280", "#e5e7eb"
BEFORE, AFTER = "#d1242f", "#1a7f37"
NAMES = {"accuracy": "right answers", "iou": "mean IoU reward"}


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


class DemoRun:
    """A run as the picture shows it: its curve, held-out means, first and last answers.

    Raises UserError for a run that was not evaluated before and after training.
    """

    def __init__(self, folder: Path):
        run = read_run(folder)
        answers = run.answers()
        if len(answers) < 2 or not run.training:
            raise UserError(f"{folder}: a run without held-out evaluations before and after")
        (_, first), (_, last) = answers
        names = run.config["dataset_name"]
        if isinstance(names, list) and len(names) > 1:
            raise UserError(f"{folder}: a run on several data sets")
        name = names if isinstance(names, str) else names[0]
        self.rows = load(name, run.config.get("dataset_test_split") or "test")
        self.pairs = [(first[row], record) for row, record in last.items()]
        self.term = next(iter(self.pairs[0][0]["rewards"]))
        mean, held_out = f"rewards/{self.term}/mean", f"eval/{self.term}"
        self.curve = [(line["step"], line[mean]) for line in run.training]
        self.held_out = [(line["step"], line[held_out]) for line in run.evaluations]
        self.boxes = solution_kind(self.rows[0].solution) == "boxes"

    def examples(self) -> list[tuple]:
        """(row, record before, record after) of the first rows of distinct classes."""
        chosen = {}
        for before, after in self.pairs:
            row = self.rows[before["row"]]
            kind = category(row.problem) if self.boxes else before["truth"]
            right = before["rewards"][self.term] == 1
            empty = self.boxes and not read_boxes(row.solution)
            if kind not in chosen and not right and not empty:
                chosen[kind] = (row, before, after)
        return list(chosen.values())[:SHOWN]


def draw_panel(canvas: ImageDraw.ImageDraw, page: Image.Image, run: DemoRun, top: int) -> None:
    """One run's numbers, examples and curve, from `top` pixels down the page on."""
    title = "Find the object" if run.boxes else "Name the flower"
    canvas.text((MARGIN, top), title, INK, font(40))
    means = [sum(r[i]["rewards"][run.term] for r in run.pairs) / len(run.pairs) for i in (0, 1)]
    numbers = [f"{mean:.2f}" if run.boxes else f"{mean:.0%}" for mean in means]
    note = f"{NAMES.get(run.term, run.term)} on {len(run.pairs)} held-out drawings:  "
    canvas.text((MARGIN, top + 58), note, GREY, font(26))
    x = MARGIN + canvas.textlength(note, font(26))
    for text, colour in ((numbers[0], BEFORE), (" before,  ", GREY), (numbers[1], AFTER)):
        canvas.text((x, top + 58), text, colour, font(26))
        x += canvas.textlength(text, font(26))
    legend = "  (white: the true box)" if run.boxes else ""
    canvas.text((x, top + 58), f" after {run.curve[-1][0]} steps{legend}", GREY, font(26))
    for column, (row, before, after) in enumerate(run.examples()):
        corner = (MARGIN + column * (IMAGE + GAP), top + 116)
        image = open_image(row.images[0]).resize((IMAGE, IMAGE), Image.Resampling.LANCZOS)
        page.paste(image, corner)
        below = corner[1] + IMAGE + 12
        if run.boxes:
            draw_boxes(canvas, corner, row.solution, before["answer"], after["answer"])
        right = [record["rewards"][run.term] for record in (before, after)]
        for line, (record, reward) in enumerate(zip((before, after), right, strict=True)):
            colour = (BEFORE, AFTER)[line] if run.boxes else (BEFORE, AFTER)[reward == 1]
            answer = f"IoU {reward:.2f}" if run.boxes else record["answer"] or "no answer"
            canvas.text((corner[0], below + 34 * line), answer, colour, font(24))
        asked = category(row.problem) if run.boxes else ""
        canvas.text((corner[0] + IMAGE, below), asked, GREY, font(24), anchor="ra")
    left = MARGIN + SHOWN * (IMAGE + GAP) + 50
    draw_curve(canvas, run, (left, top + 20, WIDTH - MARGIN, top + 116 + IMAGE))


def draw_boxes(canvas, corner, solution: str, before: str | None, after: str | None) -> None:
    """The true boxes in white, those of the answers before and after in their colours. corner: of
    the image on the page, pixels."""
    answers = [(box, "white", 5) for box in read_boxes(solution)]
    for text, colour in ((before, BEFORE), (after, AFTER)):
        answers += [(box, colour, 3) for box in parse_boxes(text or "").boxes]
    for box, colour, width in answers:
        edges = [edge * IMAGE / 1000 for edge in (box.x1, box.y1, box.x2, box.y2)]
        x1, y1, x2, y2 = (e + corner[i % 2] for i, e in enumerate(edges))
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def draw_curve(canvas, run: DemoRun, area: tuple[int, int, int, int]) -> None:
    """The term's mean in each step's completions, and its held-out means as dots."""
    left, top, right, bottom = area
    left, top = left + 44, top + 50
    steps = max(step for step, _ in run.curve)

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / steps, bottom - (bottom - top) * value

    canvas.text((left, area[1]), f"{NAMES.get(run.term, run.term)} while training", GREY, font(24))
    for value in (0.0, 0.5, 1.0):
        canvas.line((at(0, value), at(steps, value)), PALE, 2)
        canvas.text((left - 12, at(0, value)[1]), f"{value:g}", GREY, font(22), anchor="rm")
    for step in (0, steps):
        canvas.text((at(step, 0)[0], bottom + 16), str(step), GREY, font(22), anchor="ma")
    canvas.text((at(steps / 2, 0)[0], bottom + 16), "step", GREY, font(22), anchor="ma")
    canvas.line([at(step, value) for step, value in run.curve], "#d1d5db", 2, joint="curve")
    smooth, points = 10, []
    for index in range(len(run.curve)):
        window = [value for _, value in run.curve[max(0, index + 1 - smooth) : index + 1]]
        points.append(at(run.curve[index][0], sum(window) / len(window)))
    canvas.line(points, "#0969da", 5, joint="curve")
    for step, value in run.held_out:
        x, y = at(step, value)
        colour = BEFORE if step == run.held_out[0][0] else AFTER
        canvas.ellipse((x - 11, y - 11, x + 11, y + 11), colour, "white", 3)


def picture(folders: list[Path], output: Path) -> None:
    """Draws the panels of the runs below each other. Raises UserError as `DemoRun`."""
    runs = [DemoRun(folder) for folder in folders]
    page = Image.new("RGB", (WIDTH, MARGIN + PANEL * len(runs)), "white")
    canvas = ImageDraw.Draw(page)
    for number, run in enumerate(runs):
        draw_panel(canvas, page, run, MARGIN + PANEL * number)
    page.quantize(256).save(output, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, a panel each")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"))
    arguments = parser.parse_args()
    try:
        picture(arguments.runs, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
