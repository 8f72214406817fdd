"""Timing steps: one beside another, the matrix products' peak around each, and what makes the host wait."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch

from fastsskd.batch import Batch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def one_step(engine: object, batch: Batch) -> None:
    loss, _ = engine(batch)
    engine.backward(loss)
    engine.step()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of a call, the device's work included."""
    if GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products, the mean over its repetitions."""
    best, times = 0.0, 30 if GPU else 8
    for m, k, n in ((4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (8192, 8192, 8192))[: 4 if GPU else 3]:
        a, b = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype)
        seconds_of(lambda a=a, b=b: a @ b)
        best = max(best, times * 2.0 * m * k * n / sum(seconds_of(lambda a=a, b=b: a @ b) for _ in range(times)))
    return best


def host_waits(engine: object, batch: Batch) -> int | None:
    """Calls in three steps that make the host wait for the GPU; None without one."""
    if not GPU:
        return None
    with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity.__members__.values())[:2]) as profile:
        for _ in range(3):
            one_step(engine, batch)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return sum(event.count for event in profile.key_averages() if event.key in waits)


class Rows:
    """Times rows of the table. Each step is timed beside one of ``reference``: what the machine does meanwhile,
    it does to both.

    Args:
        args: of the command; ``fp16`` says in which 16 bits the peak is measured.

    Attributes:
        float32_peaks: FLOP/s, one of each row.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.dtype = args, torch.float16 if args.fp16 else torch.bfloat16
        self.watch = common.IdleWatch(args.patience)
        self.float32_peaks: list[float] = []

    def time(
        self, name: str, make: Callable[[], object], batch: Batch, reference: tuple[object, dict] | None = None
    ) -> tuple[object, dict]:
        """An engine and its row: seconds of each step, the peak measured around it and, where there is a
        ``reference``, an engine and its row, how many times as long as its step it took. The steps of the reference
        are added to its row. On a GPU the memory that the row took."""
        row: dict = {"seconds": [], "peaks": [], "times_reference": []}
        engine, before = None, 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            engine = make()
            one_step(engine, batch)  # allocations, compilation
            if GPU:
                row["peak_gigabytes"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            self.float32_peaks.append(matrix_peak(torch.float32))
            for _ in range(self.args.rounds):
                other = None if reference is None else self._sample(*reference, batch)
                took = self._sample(engine, row, batch)
                row["times_reference"] += [] if other is None else [took / other]
        except (RuntimeError, ValueError) as error:  # no room, or not possible here: said in the table
            row["failed"] = str(error).splitlines()[0][:120]
        print(name, row, file=sys.stderr, flush=True)
        return engine, row

    def _sample(self, engine: object, row: dict, batch: Batch) -> float:
        self.watch.wait()
        before = matrix_peak(self.dtype)
        took = seconds_of(lambda: one_step(engine, batch))
        row["seconds"].append(took)
        row["peaks"].append((before + matrix_peak(self.dtype)) / 2)
        return took

    def all(self, makers: dict[str, Callable[[], object]], batch: Batch, reference: str) -> dict[str, dict]:
        """The rows of the table, each but ``reference`` beside it."""
        first = self.time(reference, makers[reference], batch)
        if "failed" in first[1]:
            raise SystemExit(f"{reference}: {first[1]['failed']}")
        first[1]["host_waits_in_3_steps"] = host_waits(first[0], batch)
        found = {reference: first[1]}
        for name, make in makers.items():
            if name != reference:
                found[name] = self.time(name, make, batch, first)[1]  # its engine goes before the next one comes
                gc.collect()
                if GPU:
                    torch.cuda.empty_cache()
        return found


def matrix_units() -> str:
    """Whether the processor has units for bf16 matrices."""
    flags = Path("/proc/cpuinfo")
    return "with AMX" if flags.exists() and "amx_bf16" in flags.read_text() else "without AMX"
