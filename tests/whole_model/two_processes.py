"""Runs a function on two ranks (gloo), and returns what each of them found."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def run_on_two_ranks(work: Callable[[int], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Call `work(rank)`, a function of a module, in two processes; return both results, which torch.load can read."""
    mp.spawn(_worker, args=(work, folder), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def _worker(rank: int, work: Callable[[int], dict[str, Any]], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(work(rank), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
