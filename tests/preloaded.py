"""What a run of the demo needs before its first step, imported and drawn (see tests/forked.py)."""

import grpo.run.run
import tests.ranks  # noqa: F401
from data.load import load
from models.processor import Processor
from tests.runs import CHECKPOINT

Processor(CHECKPOINT)  # imports transformers
for split in ("train", "test"):
    load("demo:flowers", split)
grpo.run.run.write_report = lambda folder: ""  # it takes a process and two seconds
