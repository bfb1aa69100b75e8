"""What the environment says of this process's place in a run, and the store that ranks share.

Not here: what they do together (ranks.py).
"""

import datetime
import os
import socket

import torch.distributed as dist

from data.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def place() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of this process; 0, 1, 0 without them.

    Raises UserError if what torchrun sets is set in part, or to values that cannot be.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    wrong = ""
    for name, value in given.items():
        if name == "MASTER_ADDR":
            continue
        if not (value.isascii() and value.isdigit()):
            wrong = f"{name} is {value!r}, not a whole number"
        numbers[name] = int(value) if not wrong else 0
    rank, world, local = (numbers[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not wrong and not rank < world:
        wrong = f"RANK is {rank} and WORLD_SIZE {given.get('WORLD_SIZE', 'not set')}"
    if not wrong and world == 1 and local:
        wrong = f"LOCAL_RANK is {local} and WORLD_SIZE {given.get('WORLD_SIZE', 'not set')}"
    if not wrong and world > 1:
        # a process alone on its node needs no LOCAL_RANK
        missing = [name for name in VARIABLES if name not in given and name != "LOCAL_RANK"]
        if missing:
            wrong = f"WORLD_SIZE is {world} and {', '.join(missing)} not set"
        elif not 0 < numbers["MASTER_PORT"] < 2**16:
            wrong = f"MASTER_PORT is {numbers['MASTER_PORT']}"
    if wrong:
        raise UserError(
            f"environment variables: {wrong}. Either another program left them: unset "
            f"{' '.join(given)}, for one process. Or start all with torchrun, which sets them"
        )
    return rank, world, local


def prints_here() -> bool:
    """Whether this process prints what every process of its node would, while they cannot agree."""
    try:
        _, world, local = place()
    except UserError:
        return True
    return world == 1 or local == 0


def attempt_name(starts: int) -> str:
    """Names this attempt: a restarted job must not read what the last one stored."""
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{starts}"


def common_store(timeout: float) -> dist.Store:
    """The key-value store that all ranks share. Raises UserError if it cannot be had."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        return next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))[0]
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        why = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on {socket.gethostname()}, by "
                f"another run or what is left of one: end it, or name another port on every node"
            ) from error
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} ranks did not come together at {where} within "
            f"--timeout {timeout:g} s: start every node, with the same MASTER_ADDR and "
            f"MASTER_PORT, which others can reach ({why:.200})"
        ) from error
