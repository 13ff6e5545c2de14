"""What the tests of two processes run in them."""

import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from smalti.core.testing.processes import run_in_processes


def process(rank):
    """Which process this is."""
    return os.getpid()


def variable(rank, name):
    """Of the environment."""
    return os.environ[name]


def summed(rank, tensor):
    """Of all ranks, with what this rank's seeds draw."""
    total = tensor + rank
    dist.all_reduce(total)
    return total, torch.rand(()).item(), random.random()


def one_raises(rank):
    """The other waits for it."""
    if rank == 1:
        raise LookupError("no such tile")
    dist.barrier()


def one_ends(rank):
    """The other waits for it."""
    if rank == 1:
        os._exit(3)
    dist.barrier()


def one_hangs(rank):
    """The other is done, and waits at the end of the call."""
    if rank == 1:
        time.sleep(600)


def told(rank, path):
    """Leave a file, and hang."""
    Path(f"{path}-{rank}").touch()
    time.sleep(600)


if __name__ == "__main__":
    run_in_processes(told, sys.argv[1])
