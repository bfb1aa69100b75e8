"""How torch's threads wait for each other on a busy machine. Import it before torch.

On Linux torch computes with GNU OpenMP, whose threads spin while they wait for each other. That is
fastest while every core is free. Once another program uses a core, a spinning thread takes the time
of the very thread that it waits for, and a step takes 10 to 60 times as long (docs/LOG.md).
OMP_WAIT_POLICY=passive has threads sleep instead. It changes no number, but costs up to twice the
time on a free machine, and OpenMP reads it once, when torch is loaded. So the load is measured
here, first. What the user has set in the environment wins.

Not here: the number of threads. It changes how sums are rounded, so a run must not choose it by
the load of the moment.
"""

import os
import sys
import time

USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
BUSY = 0.3  # cores in use by others from which on threads sleep
SAMPLE = 0.15  # seconds over which the load is measured

SLOW = 5.0  # times the usual step

chosen = ""  # what was set and why, for the run to print; empty if nothing was


def cpu_seconds() -> float | None:
    """CPU time that all processes have used so far on the cores this one may use; None if the
    system does not tell (it is not Linux)."""
    try:
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq
    ticks = [[int(row[i]) for i in (1, 2, 3, 6, 7)] for row in rows if row[0] in ours]
    return sum(map(sum, ticks)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time that this process and its finished children have used so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def spins() -> bool:
    """Whether torch's threads spin while they wait: nobody has set anything else."""
    return sys.platform == "linux" and not any(name in os.environ for name in USER_SETTINGS)


def choose() -> None:
    """Sets OMP_WAIT_POLICY=passive if another program uses a core."""
    global chosen
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if "torch" in sys.modules or not spins() or cores == 1 or (before := cpu_seconds()) is None:
        return
    time.sleep(SAMPLE)
    others = (cpu_seconds() - before) / SAMPLE
    if others >= BUSY:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        chosen = f"other programs use {others:.1f} of {cores} cores: OMP_WAIT_POLICY=passive"


class SlowSteps:
    """Finds steps that suddenly take many times longer because another program computes."""

    def __init__(self):
        self._usual: list[float] = []
        self._told = False

    def begin(self) -> None:
        """A step begins."""
        self._began, self._all, self._own = time.monotonic(), cpu_seconds(), own_seconds()

    def end(self) -> str:
        """The step has ended: what would help, once a run; empty if nothing is wrong."""
        seconds = time.monotonic() - self._began
        usual = sorted(self._usual)[len(self._usual) // 2] if len(self._usual) >= 3 else seconds
        self._usual = [*self._usual[-19:], seconds]
        if self._told or seconds < SLOW * usual or not spins() or self._all is None:
            return ""
        others = (cpu_seconds() - self._all - (own_seconds() - self._own)) / seconds
        if others < BUSY:
            return ""
        self._told = True
        return (
            f"this step took {seconds:.1f} s, the ones before {usual:.1f} s: other programs use "
            f"{others:.1f} cores, and threads that spin while they wait get in their way. End "
            f"them, or stop this run and resume it with OMP_WAIT_POLICY=passive in the environment"
        )


choose()
