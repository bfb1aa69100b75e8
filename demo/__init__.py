"""How the two small checkpoints of the demos were made, and the picture of README."""

import grpo  # noqa: F401  before torch: how its threads wait
