"""The head's share of a training pass, for each kind of loss: time, and memory beside its inputs.

    python benchmarks/head.py                       # time, on a CPU: float32, two threads
    FOLDER/python benchmarks/head.py --device cuda  # memory, by the allocator (rehearsed or real)

token: a loss that is a sum over tokens, chunk by chunk. completions: one that compares whole
completions, so that all log-probs are computed before the backward pass. entropy: --entropy_coef.
Medians of --repeat rounds, in turns, after a warm-up.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo.engine.head import token_chunks, token_logps


def token(inputs, entropy: float) -> None:
    for _, logps, entropies in token_chunks(*inputs):
        (logps.sum() - (entropy * entropies.sum() if entropy else 0)).backward()


def completions(inputs, entropy: float) -> None:
    logps, entropies = token_logps(*inputs)
    (logps.sum() - (entropy * entropies.sum() if entropy else 0)).backward()


CASES = {
    "token": (token, 0.0),
    "completions": (completions, 0.0),
    "token, entropy": (token, 0.01),
    "completions, entropy": (completions, 0.01),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    on_gpu = options.device == "cuda"
    place = {"device": options.device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    weight = torch.randn(options.vocabulary, options.hidden, **place).mul_(0.02).requires_grad_()
    hidden = torch.randn(options.tokens, options.hidden, **place).requires_grad_()
    targets = torch.arange(options.tokens, device=options.device)
    seconds = {name: [] for name in CASES}
    for _ in range(1 if on_gpu else options.repeat + 1):
        for name, (part, entropy) in CASES.items():
            weight.grad = hidden.grad = None
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            part((hidden, weight, targets), entropy)
            seconds[name].append(time.perf_counter() - started)
            if on_gpu:
                held = (torch.cuda.max_memory_allocated() - before) / 1e6
                print(f"{name:22}{held:9.1f} MB", flush=True)
    if not on_gpu:
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        for name, median in medians.items():
            print(f"{name:22}{median:8.2f} s{median / medians['token']:8.2f} of token")


if __name__ == "__main__":
    main()
