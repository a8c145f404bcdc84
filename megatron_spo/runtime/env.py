"""The only reader of environment variables: what the launcher (torchrun, or nothing) says about this process."""

import os


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Number of processes of the job."""
    return _integer("WORLD_SIZE", 1)


def rank() -> int:
    """Index of this process in the job."""
    return _integer("RANK", 0)


def local_rank() -> int:
    """Index of this process on its node."""
    return _integer("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes of the job on this node."""
    return _integer("LOCAL_WORLD_SIZE", 1)
