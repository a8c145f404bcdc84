"""Measures the bandwidth between the nodes of a job, with one process per node."""

import socket
import statistics
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_spo.errors import UserError
from megatron_spo.runtime import env

REPEATS, TIMEOUT = 5, timedelta(minutes=2)
BYTES = {"nccl": 2**28, "gloo": 2**24}
SLOW = 0.5
"""A link with less than this fraction of the median bandwidth is named."""


class Link(NamedTuple):
    """Bandwidth between two nodes in GB/s, of the faster of several transfers in one direction."""

    first: str
    second: str
    speed: float


def measure_links(least: float) -> str | None:
    """Measures the links between consecutive processes, pair by pair; returns a summary on the main process.

    Args:
        least: minimum bandwidth in GB/s.

    Raises:
        UserError: the processes cannot connect, or a link is slower than `least`; on every process alike.
    """
    if env.world_size() < 2:
        raise UserError("--links measures between nodes; start it with srun or torchrun, one process per node")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(0)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        speeds = _speeds(torch.device("cuda" if backend == "nccl" else "cpu"), BYTES[backend])
    except (RuntimeError, ValueError) as error:  # of torch.distributed; it has no common class for them
        raise UserError(f"the nodes cannot communicate over {backend}: {str(error).splitlines()[0]}; check the "
                        "network, or set SPO_INTERFACE to its interface") from error  # fmt: skip
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, env.node_name() or socket.gethostname())
    dist.destroy_process_group()
    links = [Link(a, b, speed) for a, b, speed in zip(names, names[1:], speeds, strict=False)]
    text = summary(links, least)
    return text if env.rank() == 0 else None


def summary(links: list[Link], least: float) -> str:
    """Returns one line about the links.

    Raises:
        UserError: a link is slower than `least`.
    """
    slowest, median = min(links, key=lambda link: link.speed), statistics.median(link.speed for link in links)
    named = f"{slowest.speed:.3g} GB/s between {slowest.first} and {slowest.second}"
    if slowest.speed < least:
        raise UserError(f"the slowest link has {named}, but at least {least:g} GB/s are required (median: "
                        f"{median:.3g}); avoid one of the nodes, or check that the fast network is used")  # fmt: skip
    bad = [link for link in links if link.speed < SLOW * median]
    more = "; slow: " + ", ".join(f"{one.first}-{one.second} {one.speed:.3g}" for one in bad) if bad else ""
    return f"links: median {median:.3g} GB/s, slowest {named}{more}"


def _speeds(device: torch.device, size: int) -> list[float]:
    """Returns the bandwidth of each link (i, i + 1) in GB/s. Links with an even i are measured before the others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    block, result = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(ranks - 1, device=device)
    for parity in (0, 1):
        first = rank if rank % 2 == parity else rank - 1
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            start = time.perf_counter()
            if 0 <= first < ranks - 1:
                if rank == first:
                    dist.send(block, first + 1)
                else:
                    dist.recv(block, first)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if 0 <= first < ranks - 1 and rank == first + 1:
            result[first] = size / min(times[1:]) / 1e9
    dist.all_reduce(result)
    return [float(value) for value in result]
