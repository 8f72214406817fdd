"""Timing steps: one beside another, the matrix products' peak around each, what a step would take if neighbours on the
same processor never slowed it down, and what makes the host wait."""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch

from fastsskd.batch import Batch
from fastsskd_kernels.product import fits, product

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


Products = dict[tuple[str, int, int, int], list[float]]
"""Whose matrix product, ``(m, k) x (k, n)``: how long each of several repetitions took."""


def matrix_products(dtype: torch.dtype) -> Products:
    """Large ones: torch's, and on a CPU's matrix unit ours."""
    found, times = {}, 30 if GPU else 8
    for m, k, n in ((4096, 768, 3072), (4096, 3072, 768), (2048, 2048, 2048), (8192, 8192, 8192))[: 4 if GPU else 3]:
        a, b = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype)
        ways = {"torch": torch.mm}
        if dtype == torch.bfloat16 and not GPU and fits(m, k, n):
            ways["ours"] = product
        for name, multiply in ways.items():
            multiply(a, b)
            work = functools.partial(multiply, a, b)
            found[name, m, k, n] = [seconds_of(work) for _ in range(times)]
    return found


def peak_of(products: Products, typical: Callable[[Sequence[float]], float] = statistics.mean) -> float:
    """FLOP/s of the best of them; of its repetitions the mean, unless told."""
    return max(2.0 * math.prod(sizes) / typical(seconds) for (_, *sizes), seconds in products.items())


def spared(seconds: Sequence[float]) -> float:
    """The 5th percentile: what something takes that is done often, when nobody else is in its way."""
    return sorted(seconds)[len(seconds) // 20]


class Operations:
    """What a step would take if each of its operations always took as long as when nobody else is in its way.

    On a shared machine a neighbour slows a step of seconds down nearly always, for a part of it; each operation, which
    the steps do dozens of times, is spared now and then. So each counts with its :func:`spared` time; what lies
    between operations with the least that a step had. A compiled block is one operation. Where neighbours leave less
    than a twentieth of the time alone, or a row is of few steps, this too is slower than the machine can be.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._between: list[float] = []

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of a step, whose operations are noted."""
        options = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True, "acc_events": True}
        with torch.profiler.profile(**options) as profile:
            took = seconds_of(work)
        self._between.append(max(took - self._note(profile.events()), 0.0))
        del profile
        gc.collect()  # events know each other: 0.2 GB a step of the base model
        return took

    def _note(self, events: Iterable) -> float:
        """Seconds inside all of them."""
        inside = 0.0
        for event in events:
            own = event.self_cpu_time_total / 1e6
            self._seconds[event.name, str(event.input_shapes)].append(own)
            inside += own
        return inside

    def add(self, other: Operations) -> None:
        """More steps of the same."""
        for operation, seconds in other._seconds.items():
            self._seconds[operation] += seconds
        self._between += other._between

    def seconds(self) -> float:
        """Of a step at the machine's best."""
        steps = len(self._between)
        return min(self._between) + sum(spared(each) * len(each) / steps for each in self._seconds.values())


def host_waits(engine: object, batch: Batch) -> int | None:
    """Calls in three steps that make the host wait for the GPU; None without one."""
    if not GPU:
        return None
    with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity.__members__.values())[:2]) as profile:
        for _ in range(3):
            one_step(engine, batch)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
    return sum(event.count for event in profile.key_averages() if event.key in waits)


@dataclass
class Timed:
    """What is timed, its row of the table, and the operations of its steps, where a CPU does them."""

    engine: object
    row: dict
    operations: Operations = field(default_factory=Operations)


class Rows:
    """Times rows of the table. Each step is timed beside one of ``reference``: what the machine does meanwhile,
    it does to both.

    Args:
        args: of the command; ``fp16`` says in which 16 bits the peak is measured.

    Attributes:
        float32_peaks: FLOP/s, one of each row.
        products: of all steps, together.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.dtype = args, torch.float16 if args.fp16 else torch.bfloat16
        self.watch = common.IdleWatch(args.patience)
        self.float32_peaks: list[float] = []
        self.products: Products = defaultdict(list)

    def time(self, name: str, make: Callable[[], object], batch: Batch, reference: Timed | None = None) -> Timed:
        """An engine and its row: seconds of each step, the peak measured around it and, where there is a
        ``reference``, how many times as long as its step it took. The steps of the reference are added to its row.
        On a CPU what a step would take without neighbours, and how many times as long as the reference's steps
        beside it; on a GPU the memory that the row took."""
        timed, before = Timed(None, {"seconds": [], "peaks": [], "times_reference": []}), 0
        row, beside = timed.row, None if reference is None else Timed(reference.engine, reference.row)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            timed.engine = make()
            one_step(timed.engine, batch)  # allocations, compilation
            if GPU:
                row["peak_gigabytes"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            self.float32_peaks.append(peak_of(matrix_products(torch.float32)))
            around = matrix_products(self.dtype)
            for _ in range(self.args.rounds):
                if beside is not None:
                    other, around = self._sample(beside, batch, around)
                took, around = self._sample(timed, batch, around)
                row["times_reference"] += [] if beside is None else [took / other]
        except (RuntimeError, ValueError) as error:  # no room, or not possible here: said in the table
            row["failed"] = str(error).splitlines()[0][:120]
        else:
            if not GPU:
                self._without_neighbours(timed, reference, beside)
        print(name, row, file=sys.stderr, flush=True)
        return timed

    def _sample(self, timed: Timed, batch: Batch, before: Products) -> tuple[float, Products]:
        """Seconds of a step, and the matrix products after it; ``before`` are those right before."""
        self.watch.wait()
        took = (seconds_of if GPU else timed.operations.time)(lambda: one_step(timed.engine, batch))
        after = matrix_products(self.dtype)
        timed.row["seconds"].append(took)
        timed.row["peaks"].append((peak_of(before) + peak_of(after)) / 2)
        for shape, seconds in after.items():
            self.products[shape] += seconds
        return took, after

    def _without_neighbours(self, timed: Timed, reference: Timed | None, beside: Timed | None) -> None:
        timed.row["spared_s"] = timed.operations.seconds()
        if reference is not None and beside is not None:
            timed.row["spared_times_reference"] = timed.row["spared_s"] / beside.operations.seconds()
            reference.operations.add(beside.operations)
            reference.row["spared_s"] = reference.operations.seconds()

    def all(
        self,
        makers: dict[str, Callable[[], object]],
        batch: Batch,
        reference: str,
        found: dict[str, dict],
        keep: Callable[[], None],
    ) -> None:
        """Add the rows of the table to ``found``, each but ``reference`` beside it; ``keep`` is called after each."""
        first = self.time(reference, makers[reference], batch)
        if "failed" in first.row:
            raise SystemExit(f"{reference}: {first.row['failed']}")
        first.row["host_waits_in_3_steps"] = host_waits(first.engine, batch)
        found[reference] = first.row
        keep()
        for name, make in makers.items():
            if name != reference:
                timed = self.time(name, make, batch, first)
                found[name] = timed.row
                keep()
                _let_go(timed)
        _let_go(first)


def _let_go(timed: Timed) -> None:
    """Of its memory: DeepSpeed's hooks keep an engine until it is told to remove them."""
    if timed.engine is not None:
        timed.engine.destroy()
    timed.engine = None
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def matrix_units() -> str:
    """Whether the processor has units for bf16 matrices."""
    flags = Path("/proc/cpuinfo")
    return "with AMX" if flags.exists() and "amx_bf16" in flags.read_text() else "without AMX"
