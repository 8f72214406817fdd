"""The GPU part of ``kernels.py``: clips per second, bytes moved against the copy bandwidth, kernels, synchronisations.

Plain torch operations, one after the other, are limited by memory traffic: each reads its inputs and writes its output.
``Traffic`` adds those bytes up operation by operation; their sum over the measured time, divided by the bandwidth of a
device-to-device copy in the same run, says how much of that limit is reached, and the sum alone what fusing would save.
"""

import statistics
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastsskd_kernels as kernels

CLIPS, SAMPLES = 256, 160_000
GOAL = 100_000  # clips per second on an H200-class card


class Traffic(TorchDispatchMode):
    """Counts operations that do work and the bytes that they read and write. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not (operation.is_view or "empty" in operation.name() or "view" in operation.name()):
            read, written = distinct((args, kwargs)), distinct(result)
            if operation.name().endswith(
                ("fill_.Scalar", "fill_.Tensor", "copy_", ".out")
            ):  # what is overwritten is not read
                read = {key: size for key, size in read.items() if key not in written}
            self.operations += 1
            self.bytes += sum(read.values()) + sum(written.values())
        return result


def distinct(tree) -> dict[tuple, int]:
    """Memory of each tensor in a nest of arguments, slices of one storage apart: place to bytes."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {(leaf.untyped_storage().data_ptr(), leaf.storage_offset(), leaf.shape): touched(leaf) for leaf in leaves}


def touched(tensor: torch.Tensor) -> int:
    """Bytes of distinct elements: overlapping frames and broadcast axes count once."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), max(span, 0)) * tensor.element_size()


def milliseconds(work: Callable, rounds: int = 20) -> float:
    """Median device time of a call."""
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure() -> dict:
    """All numbers of this machine's GPU, or the reason why there are none."""
    if not torch.cuda.is_available():
        return {"status": "not measured: no CUDA device on this machine"}
    clips = torch.randn(CLIPS, SAMPLES, generator=torch.Generator().manual_seed(0)).mul_(0.1).cuda()
    out = kernels.features(clips, backend="torch")
    expected = kernels.features(clips[:2].cpu(), backend="torch")
    for result, reference in zip(out, expected, strict=True):
        torch.testing.assert_close(result[:2].cpu(), reference, atol=2e-3, rtol=0)

    def work():
        kernels.features(clips, backend="torch", out=out)

    torch.cuda.set_sync_debug_mode("error")  # a host synchronisation inside would raise here
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with Traffic() as traffic:
        work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    launched = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) / 1e6
    time = milliseconds(work)
    return {
        "status": "measured",
        "device": torch.cuda.get_device_name(),
        "clips_per_second": round(CLIPS / time * 1e3),
        "goal_clips_per_second": GOAL,
        "milliseconds": round(time, 3),
        "gigabytes_moved": round(traffic.bytes / 1e9, 2),
        "gigabytes_per_second": round(traffic.bytes / time / 1e6),
        "copy_gigabytes_per_second": round(copy),
        "share_of_copy_bandwidth": round(traffic.bytes / time / 1e6 / copy, 2),
        "torch_operations": traffic.operations,
        "kernels_launched": launched,
        "host_synchronisations": 0,
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }
