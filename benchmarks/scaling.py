"""The time of a step as the group, the image and the completion grow, here and in TRL.

    python benchmarks/scaling.py --model tiny --json FILE

One of the three grows while the others stay at G 8, 448 x 448 pixels (256 image tokens) and 64
completion tokens; each point is a run of benchmarks/step.py. `--only ours` leaves the peer out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import step

POINTS = [
    *(("group", group) for group in (2, 4, 8, 16, 32)),
    *(("image", side) for side in (224, 448, 672, 896)),  # 64, 256, 576, 1,024 image tokens
    *(("completion", tokens) for tokens in (32, 64, 128, 256, 512)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "mid", "small"), default="tiny")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each trainer")
    parser.add_argument("--only", choices=step.KINDS, nargs="+", default=step.KINDS[:2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    usual = {"family": "qwen2_vl", "group": step.GROUP, "image": 448, "completion": 64}
    usual |= {"gradient_checkpointing": "false", "rounds": 1}
    reports = []
    for name, value in POINTS:
        setting = argparse.Namespace(**{**vars(options), **usual, name: value})
        report = {"grows": name, "value": value, **step.measure(setting)}
        reports.append(report)
        completions = step.PROMPTS * setting.group
        line = f"{name:10} {value:4}"
        for kind in options.only:
            seconds = report[kind]["step_s"]
            line += (
                f"  {kind} {seconds:7.2f} s, {1000 * seconds / completions:7.1f} ms a completion"
            )
            line += f", {report[kind]['peak_mb']:5.0f} MB"
        print(line + (f"  ratio {report['ratio']:.3f}" if "ratio" in report else ""), flush=True)
        if options.json:
            options.json.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
