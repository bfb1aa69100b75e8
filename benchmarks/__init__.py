"""Commands that measure. Each prints ratios beside a peer or another revision; none is a test."""

import grpo.threads  # noqa: F401  before torch: how its threads wait
