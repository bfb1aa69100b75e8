"""Commands that measure. Each prints ratios to TRL or to another revision; none is a test."""

import grpo  # noqa: F401  before torch: how its threads wait
