"""Ranks: start them, and let them agree on small things without touching the device."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastsskd.errors import InputError


def start(device: str, timeout: float = 600.0) -> None:
    """Initialise DeepSpeed's process group: NCCL on GPUs, gloo on CPUs; a lone process becomes rank 0 of 1.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        timeout: seconds that a rank waits for the others, here and in this file's functions.

    Raises:
        InputError: another program has the port of rank 0.
    """
    global _timeout
    _timeout = timedelta(seconds=timeout)
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # On a CPU DeepSpeed would compile a shared-memory collective (43 s, needs ninja, leaves 69 MB a rank in /dev/shm)
    # that gloo does without. A private name: setup.py pins the version.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What it says of a skipped step we say better, with the clips: bad_steps.py.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW" not in record.getMessage())
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # every rank would take all cores
            torch.set_num_threads(cores_per_rank())
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = int(os.environ["MASTER_PORT"])
        raise InputError(
            f"port {port} of this machine is taken, perhaps by another run; give this one a port of its own: "
            f"--master_port {port + 1}"
        ) from None


def _keep_freed_memory() -> None:
    """Let the C library use freed memory again, where it would give each larger tensor back to the system.

    Every step makes the same tensors; as new pages each is cleared on its first touch. A step of the nano model takes
    0.80 to 0.86 of the time (5,000 to 14,000 page faults a step before, 150 after), one of the base model with 8 clips
    0.82 (a million before, 4 after) and 8 % more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)  # a tensor of 32 MB or more would be a mapping of its own, whatever the threshold


def cores_per_rank() -> int:
    """Cores this process may run on, divided by the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's name, then DeepSpeed's.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, cores // int(ranks))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_cpu_group())
    return gathered


def gather_numbers(values: list[int]) -> list[list[int]]:
    """The same small list of integers of every rank; on the CPU, so that the device's queue is not waited for."""
    if world_size() == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.int64)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own, group=_cpu_group())
    return [other.tolist() for other in gathered]


_group: Any = None
_timeout = timedelta(seconds=600)


def _cpu_group() -> Any:
    global _group
    if _group is None:
        is_gloo = dist.get_backend() == "gloo"
        _group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo", timeout=_timeout)
    return _group


def lost_contact(error: BaseException) -> bool:
    """Whether ``error`` is a collective's: another rank has ended, or did not come in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
