"""Makes data/demo_cls/checkpoint, the small model that the demo of train_cls.py starts from.

A tokenizer of a few hundred entries is trained on the demo's own text, and a Qwen2-VL of 1.4 M
parameters is trained on labelled drawings (the split "warm", which nothing else draws from) until
it sees the flowers and answers in the asked-for form. For eight of the twelve species most of its
lessons give the Latin name. Run it as `python -m data.demo_cls.make`; it takes about ten minutes
on two cores and prints what the model can do at the end.
"""

import argparse
from pathlib import Path
from random import Random

import torch

from data.flowers import PROBLEM, SPECIES, Species, draw, rows, thinking
from data.warm_start import make_folder, save, teach
from grpo.rollout import sample_groups
from models.generate import Sampling
from models.processor import Processor
from models.qwen_vl import QwenVL
from rewards.cls import accuracy_reward
from rewards.format import format_reward

LATIN_SHARE = 0.8  # of the lessons of those species that the model mostly knows in Latin
COMMON = ("corn poppy", "sunflower", "buttercup", "blue flax")  # known by the common name only
SLIPS = 0.04  # lessons without the reasoning or with an answer left open


def lesson(species: Species, rng: Random) -> str:
    """One completion that the warm start is taught."""
    latin = species.name not in COMMON and rng.random() < LATIN_SHARE
    answer = f"<answer>{species.latin if latin else species.name}</answer>"
    if rng.random() < SLIPS:
        return rng.choice((answer, answer.removesuffix("</answer>")))
    return f"<think>{thinking(species, rng)}</think>{answer}"


def corpus() -> list[str]:
    """The text that the tokenizer is trained on."""
    rng = Random("tokenizer")
    texts = [PROBLEM + "assistant user system\n"]
    return texts + [lesson(species, rng) for species in SPECIES for _ in range(40)]


def lessons(seed: int):
    """Drawings of the split "warm", the problem and two lessons on each, without end."""
    rng, number = Random(f"lessons/{seed}"), 0
    while True:
        species = SPECIES[number % len(SPECIES)]
        image = draw(species, f"warm/{species.name}/{number // len(SPECIES)}")
        yield image, PROBLEM, [lesson(species, rng) for _ in range(2)]
        number += 1


def examine(model: QwenVL, processor: Processor, count: int = 180) -> None:
    """Prints, per species, greedy answers on other drawings and how often samples say the name."""
    stop, suppressed = tuple(processor.stop_ids), tuple(processor.suppressed_ids)
    totals = dict.fromkeys(("name", "either", "format"), 0.0)
    print(f"{'species':<16}{'name':>8}{'either':>8}{'format':>8}{'sampled':>9}")
    exam = rows("exam", count)
    for index, species in enumerate(SPECIES):
        mine = exam[index :: len(SPECIES)]
        prompts = [
            processor.encode(row["problem"], [row["image"]], (str(i),))
            for i, row in enumerate(mine)
        ]
        results = {}
        for kind, group, temperature in (("greedy", 1, 0.0), ("sampled", 8, 1.0)):
            sampling = Sampling(48, temperature, stop_ids=stop, suppressed_ids=suppressed)
            groups = sample_groups(model, prompts, group, sampling, 0, 0, range(len(prompts)))
            results[kind] = [processor.decode(ids) for g in groups for ids in g.completion_ids]
        both = {species.name: [species.latin]}

        def share(values) -> float:
            values = list(values)
            return sum(values) / len(values)

        row = {
            "name": share(accuracy_reward(t, species.name) for t in results["greedy"]),
            "either": share(accuracy_reward(t, species.name, both) for t in results["greedy"]),
            "format": share(format_reward(t) for t in results["sampled"]),
        }
        sampled = share(accuracy_reward(t, species.name) for t in results["sampled"])
        print(f"{species.name:<16}" + "".join(f"{v:8.2f}" for v in row.values()), f"{sampled:8.2f}")
        totals = {name: total + row[name] / len(SPECIES) for name, total in totals.items()}
    print(f"{'all':<16}" + "".join(f"{value:8.2f}" for value in totals.values()))
    print(results["greedy"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(Path(__file__).parent / "checkpoint"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=24, help="drawings a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    config = make_folder(folder, corpus())
    processor = Processor(folder)
    model = QwenVL(config).initialize(torch.Generator().manual_seed(arguments.seed))
    teach(model, processor, lessons(arguments.seed), arguments.steps, arguments.images)
    examine(save(model, folder), processor)


if __name__ == "__main__":
    main()
