"""What the device is, and its rates: products, memory, launches, waits."""

import importlib.util
import time

import torch

LIBRARIES = ("triton", "flash_attn", "bitsandbytes", "trl", "vllm")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work, repeat: int) -> float:
    """Of one call of `work`, on average; the first two calls do not count."""
    work(), work()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    synchronize()
    return (time.perf_counter() - began) / repeat


def measure(settings: dict, report) -> None:
    """Reports the device's name and memory (GB, 1e9 bytes), the versions of what runs on it, and
    rates: operations a second of a bfloat16 product, bytes a second of a copy, seconds of a launch
    and of a wait. A device that is not measured at full size has `settings["quick"]`."""
    here, quick = device(), settings["quick"]
    cuda = here.type == "cuda"
    facts = {"name": "CPU", "count": 1, "torch": torch.__version__, "cuda": torch.version.cuda}
    if cuda:
        properties = torch.cuda.get_device_properties(here)
        facts |= {"name": properties.name, "count": torch.cuda.device_count()}
        facts |= {"gb": properties.total_memory / 1e9}
        facts |= {"capability": ".".join(map(str, torch.cuda.get_device_capability(here)))}
    facts["libraries"] = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    report("card", facts)

    n, numbers, repeat = (512, 2**22, 3) if quick else (8192, 2**29, 20)
    a, b = (torch.randn(n, n, device=here, dtype=torch.bfloat16) for _ in "ab")
    rates = {"flops": 2 * n**3 / seconds(lambda: a @ b, repeat)}
    one, other = (torch.zeros(numbers, device=here, dtype=torch.bfloat16) for _ in "ab")
    rates["bandwidth"] = 4 * numbers / seconds(lambda: one.copy_(other), repeat)
    few = torch.zeros(1, device=here)
    rates["launch"] = seconds(lambda: few.add_(1), 100 if quick else 2000)
    rates["wait"] = seconds(few.item, 10 if quick else 200)
    report("rates", rates)
