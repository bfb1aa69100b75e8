"""Runs one part of benchmarks/gpu: `child.py MODULE:NAME SETTINGS FOUND`.

Calls the function with its settings (JSON). What it reports is appended to the file FOUND, a line
of JSON each, by rank 0 alone.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def main() -> None:
    function, settings, path = sys.argv[1:]
    module, name = function.split(":")

    def report(name: str, value) -> None:
        if os.environ.get("RANK", "0") == "0":
            with open(path, "a") as file:
                file.write(json.dumps({name: value}) + "\n")

    getattr(importlib.import_module(module), name)(json.loads(settings), report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written, and a library's thread may abort Python's own shutdown


if __name__ == "__main__":
    main()
