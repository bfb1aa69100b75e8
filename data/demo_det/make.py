"""Makes data/demo_det/checkpoint, the small model that the demo of train_det.py starts from.

On scenes of the split "warm", which nothing else draws from, in two stages. First it learns to see:
what lies where, read from image tokens and category names by linear heads that are thrown away, and
as bare coordinates. Then it learns to answer in the asked-for form. Three quarters of those lessons
mark an object roughly, half as large again, which earns nothing; the others mark its edges. Run it
as `python -m data.demo_det.make`; it takes about ten minutes on two cores and prints what the model
can do at the end.
"""

import argparse
import time
from dataclasses import replace
from multiprocessing import Pool
from os.path import commonprefix
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data.scenes import CATEGORIES, SIZE, Box, problem, rows, scene
from data.warm_start import make_folder, save, schedule, teach, update
from grpo.logps import token_logps
from grpo.rollout import Group, make_packs, sample_groups
from models.generate import Sampling
from models.processor import Processor, Prompt
from models.qwen_vl import QwenVL
from rewards.det import iou_reward
from rewards.format import format_reward

ROUGH_SHARE = 0.75  # of the lessons
ROUGH = 1.5  # a rough box's width and height over the true ones
STEP = 10  # thousandths: the taught coordinates are multiples of it
SLIPS = 0.03  # lessons without the reasoning or with an answer left open
BINS = 20  # per axis, of an edge in the tower's lessons


def lesson(category: str, boxes: list[Box], rng: Random) -> str:
    """One completion that the warm start is taught."""
    number = ("none", "one", "two")[len(boxes)]
    rough = rng.random() < ROUGH_SHARE
    manner = "" if not boxes else ", roughly here" if rough else ", with these edges"
    items = [
        f"{{'Position': {mark(box, ROUGH if rough else 1.0)}, 'Confidence': 0.{rng.randint(5, 9)}}}"
        for box in boxes
    ]
    found = f"[{', '.join(items)}]" if items else "No Objects"
    answer = f"<answer>{found}</answer>"
    if rng.random() < SLIPS:
        return rng.choice((answer, answer.removesuffix("</answer>")))
    return f"<think>I look for {category}: {number}{manner}.</think>{answer}"


def mark(box: Box, scale: float) -> list[int]:
    """A box grown about its centre, within the image and on the grid of taught coordinates."""
    x1, y1, x2, y2 = box
    across, down = (x2 - x1) * (scale - 1) / 2, (y2 - y1) * (scale - 1) / 2
    grown = (x1 - across, y1 - down, x2 + across, y2 + down)
    return [STEP * round(max(0, min(1000, value)) / STEP) for value in grown]


def corpus() -> list[str]:
    """The text that the tokenizer is trained on."""
    rng = Random("tokenizer")
    texts = [problem(category) + "assistant user system\n" for category in CATEGORIES]
    for category in CATEGORIES:
        for number in range(60):
            boxes = [tuple(rng.randint(0, 1000) for _ in range(4)) for _ in range(number % 3)]
            texts.append(lesson(category, boxes, rng))
    return texts


def lessons(scenes: list, seed: int):
    """Scenes in random order, the problem of each and two lessons on it, without end."""
    rng = Random(f"lessons/{seed}")
    while True:
        image, category, objects = rng.choice(scenes)
        boxes = [box for name, box in objects if name == category]
        yield image, problem(category), [lesson(category, boxes, rng) for _ in range(2)]


def see(model: QwenVL, processor: Processor, scenes: list, steps: int, images: int) -> None:
    """Teaches what lies where, before any answer is asked for: a sum of five cross-entropies.

    The vision tower says of each image token which object covers it and where that object's four
    edges are. The decoder reads the problem up to the name of each category in turn, says there how
    many such objects there are and where the first one's edges are, and goes on with their bare
    coordinates in the model's own tokens. Edges are read in BINS + 1 places by linear heads.
    """
    prefix, names = questions(processor, scenes[0][0])
    vision = processor.config.vision
    cells = SIZE // (vision.patch_size * vision.spatial_merge_size)
    covers = [covering(objects, cells) for _, _, objects in scenes]
    boxes = [[[b for n, b in o if n == c] for c in CATEGORIES] for _, _, o in scenes]
    heads = nn.ModuleDict()
    for what, classes in (("category", len(CATEGORIES) + 1), ("number", 3)):
        heads[what] = nn.Linear(model.config.hidden_size, classes)
        heads[f"edges by {what}"] = nn.Linear(model.config.hidden_size, 4 * (BINS + 1))

    def look(x: torch.Tensor, what: str, found: list[tuple[int, Box]]) -> dict[str, torch.Tensor]:
        """Losses of the two heads for `what`, and for the edges where it is not 0."""
        target = torch.tensor([number for number, _ in found])
        edges = (torch.tensor([box for number, box in found if number]) * BINS + 500) // 1000
        places = heads[f"edges by {what}"](x[target > 0]).view(-1, BINS + 1)
        return {
            what: F.cross_entropy(heads[what](x), target),
            f"edges by {what}": F.cross_entropy(places, edges.flatten()),
        }

    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.time()
    for step in range(steps):
        chosen = torch.randint(len(scenes), (images,)).tolist()
        pixels, grids = processor.encode_images([scenes[i][0] for i in chosen])
        features = model.encode_images(pixels, grids)
        losses = look(features, "category", [cell for i in chosen for cell in covers[i]])

        there = [found for i in chosen for found in boxes[i]]
        said = [processor.tokenizer(coordinates(found))["input_ids"] for found in there]
        row = [name + said.pop(0) for _ in chosen for name in names]
        groups = [
            Group(prefix, row[k : k + len(names)], [], []) for k in range(0, len(row), len(names))
        ]
        (pack,) = make_packs(groups, 1_000_000)
        hidden = model(pack.input_ids, pack.position_ids, model.bounds(pack.rows), features)
        hidden = hidden[pack.predicts]
        name_lengths = [len(name) for name in names] * images
        starts = [sum(pack.lengths[:k]) + n for k, n in enumerate(name_lengths)]
        first = [(len(found), found[0] if found else (0, 0, 0, 0)) for found in there]
        losses |= look(hidden[starts], "number", first)
        logps, _ = token_logps(hidden, model.head_weight, pack.targets)
        spoken = torch.ones(len(logps))
        for start, length in zip(starts, name_lengths, strict=True):
            spoken[start - length : start] = 0.0  # the name itself is given
        losses["coordinates"] = -(logps * spoken).sum() / spoken.sum()
        update(optimizer, sum(losses.values()) + 2 * losses["coordinates"], schedule(step, steps))
        if (step + 1) % 50 == 0:
            line = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"see {step + 1}  {line}  {time.time() - started:.0f} s", flush=True)


def coordinates(boxes: list[Box]) -> str:
    """Bare coordinates, the lesson of the first stage."""
    return f": {', '.join(str(mark(box, 1.0)) for box in boxes) or 'none'}"


def questions(processor: Processor, image: Image.Image) -> tuple[Prompt, list[list[int]]]:
    """The part that all problems about an image begin with, and the tokens of each category."""
    prompts = [processor.encode(problem(category), [image], ("",)) for category in CATEGORIES]
    texts = [prompt.input_ids.tolist() for prompt in prompts]
    before = len(commonprefix(texts))
    after = len(commonprefix([text[::-1] for text in texts]))
    whole = prompts[0]
    prefix = replace(
        whole,
        input_ids=whole.input_ids[:before],
        position_ids=whole.position_ids[:, :before],
        next_position=int(whole.position_ids[0, before]),
    )
    return prefix, [text[before : len(text) - after] for text in texts]


def covering(objects: list[tuple[str, Box]], cells: int) -> list[tuple[int, Box]]:
    """For each of cells x cells squares, row by row, the object whose box covers most of it.

    A category's number from 1, and its box; 0 and zeros where none covers a fifteenth.
    """
    found, side = [], 1000 / cells
    for row in range(cells):
        for column in range(cells):
            best = (side * side / 15, 0, (0, 0, 0, 0))
            for name, (x1, y1, x2, y2) in objects:
                across = min(x2, (column + 1) * side) - max(x1, column * side)
                down = min(y2, (row + 1) * side) - max(y1, row * side)
                area = max(0, across) * max(0, down)
                best = max(best, (area, 1 + CATEGORIES.index(name), (x1, y1, x2, y2)))
            found.append(best[1:])
    return found


def examine(model: QwenVL, processor: Processor, count: int = 180) -> None:
    """Prints greedy and sampled rewards on other scenes, and the share of edges among samples."""
    stop, suppressed = tuple(processor.stop_ids), tuple(processor.suppressed_ids)
    exam = rows("exam", count)
    prompts = [
        processor.encode(row["problem"], [row["image"]], (str(i),)) for i, row in enumerate(exam)
    ]
    for kind, group, temperature in (("greedy", 1, 0.0), ("sampled", 8, 1.0)):
        sampling = Sampling(96, temperature, stop_ids=stop, suppressed_ids=suppressed)
        groups = sample_groups(model, prompts, group, sampling, 0, 0, range(len(prompts)))
        pairs = [
            (processor.decode(ids), row["solution"])
            for drawn, row in zip(groups, exam, strict=True)
            for ids in drawn.completion_ids
        ]
        for name, part in (
            ("all", pairs),
            ("rough", [pair for pair in pairs if "roughly" in pair[0]]),
            ("edges", [pair for pair in pairs if "edges" in pair[0]]),
            ("none", [pair for pair in pairs if "No Objects" in pair[1]]),
        ):
            rewards = [iou_reward(*pair) for pair in part] or [0.0]
            well = sum(format_reward(text) for text, _ in part) / max(1, len(part))
            print(
                f"{kind} {name}: {len(part)}, IoU reward {sum(rewards) / len(rewards):.3f}, "
                f"format {well:.2f}"
            )
        print(*pairs[:2], sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(Path(__file__).parent / "checkpoint"))
    parser.add_argument("--scenes", type=int, default=12000, help="drawn once, used many times")
    parser.add_argument("--see_steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=32, help="scenes a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    torch.manual_seed(arguments.seed)
    config = make_folder(folder, corpus(), initializer_range=0.08)
    processor = Processor(folder)
    model = QwenVL(config).initialize(torch.Generator().manual_seed(arguments.seed))
    with Pool() as pool:
        scenes = pool.map(scene, [f"warm/{number}" for number in range(arguments.scenes)])
    see(model, processor, scenes, arguments.see_steps, arguments.images)
    teach(model, processor, lessons(scenes, arguments.seed), arguments.steps, arguments.images)
    examine(save(model, folder), processor)


if __name__ == "__main__":
    main()
