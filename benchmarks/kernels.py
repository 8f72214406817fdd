"""How far are the kernels from the limit, and from what people use today?

    python benchmarks/kernels.py              # every CPU part, and the GPU part where there is a GPU
    python benchmarks/kernels.py --rounds 9   # quicker, rougher

One process; one thread for everybody unless a row says otherwise. Every row of a table is timed once per round, round
after round, so that a busy machine slows all of them; a cell is the median over rounds of the time for one 10 s clip at
16 kHz, each from a burst of calls. Before anything is timed, each candidate's output is compared with torchaudio's or
scikit-image's: a fast wrong kernel is not in the table. Results go to ``benchmarks/results/kernels.json`` and
``kernels.md``.

How to read it: MKL's real FFT of the 998 windowed frames, alone, is one part of the work. It is no hard limit, since an
FFT that keeps frames in SIMD lanes and in cache need not run at MKL's speed, but it is the yardstick: ratios to it
travel from machine to machine better than milliseconds do.

Last result, 2026-11-23: fbank 10.5 x torchaudio and 7.5 x DALI, patch HOG 380 x scikit-image; a 10 s clip in 0.39 ms.
"""

# ruff: noqa: E402
import math
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy and torch start their pools

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import common
import kernels_gpu
import kernels_peers as peers
import numba
import numpy as np
import torch

import fastsskd_kernels as kernels
from fastsskd_kernels import fbank_cpu
from fastsskd_kernels.simd import LANES

RESULTS = Path(__file__).parent / "results"
SAMPLES = 160_000
SPIN = 3_000_000
BURST_S = 0.06
MASK_BATCH, MASK_PATCHES = 64, 512


class Timer:
    """Times rows of a table round after round, waiting for an idle machine as long as its patience lasts."""

    def __init__(self, rounds: int, patience_s: float):
        self.rounds, self.idle = rounds, common.IdleWatch(patience_s)

    def __call__(self, rows: dict[str, tuple[Callable, int]]) -> dict[str, dict]:
        """name -> (call, clips per call) to name -> milliseconds per clip: wall time, CPU time of all threads.

        One sample is a burst of calls, as a loader makes them: a single short call after a pause would measure how a
        processor wakes up.
        """
        samples = {name: [] for name in rows}
        for _ in range(self.rounds):
            for name, (work, clips) in rows.items():
                self.idle.wait()
                burst(work, BURST_S)
                wall, cpu = burst(work, BURST_S)
                samples[name].append((wall * 1e3 / clips, cpu * 1e3 / clips))
        return {
            name: {
                "median_ms": statistics.median(wall for wall, _ in s),
                "best_ms": min(wall for wall, _ in s),
                "cpu_ms": statistics.median(cpu for _, cpu in s),
            }
            for name, s in samples.items()
        }


def burst(work: Callable, seconds: float) -> tuple[float, float]:
    """Call again and again for a while: wall and CPU seconds per call."""
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - wall < seconds:
        work()
        calls += 1
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def check(name: str, result, expected, atol: float) -> None:
    difference = np.abs(np.asarray(result) - np.asarray(expected)).max()
    if not difference <= atol:
        raise SystemExit(f"{name}: off by {difference:.2g}, allowed {atol:g}; nothing was timed")


def fbank_rows(clips: torch.Tensor, timer: Timer) -> dict:
    """fbank: ours and the peers."""
    numpy_fbank, dali = peers.NumpyFbank(), peers.DaliFbank(clips.numpy())
    expected = peers.torchaudio_fbank(clips[0])
    few, one = clips[:4], clips[:1]
    check("numba", kernels.fbank(one)[0], expected, 2e-3)
    check("torch", kernels.fbank(few, backend="torch")[0], expected, 2e-3)
    check("numpy", numpy_fbank(one[0].numpy()), expected, 2e-3)
    check("DALI, loudest half of the mel bins", np.asarray(dali()[0]).T[:, 64:], expected[:, 64:], 0.5)
    frames = torch.zeros(998, 512)
    frames[:, :400] = torch.randn(998, 400)
    return timer(
        {
            "fbank, numba": (lambda: kernels.fbank(one), 1),
            "fbank, torch reference, batch of 4": (lambda: kernels.fbank(few, backend="torch"), 4),
            "MKL rfft of the 998 frames, nothing else": (lambda: torch.fft.rfft(frames), 1),
            "torchaudio kaldi.fbank": (lambda: peers.torchaudio_fbank(one[0]), 1),
            "DALI spectrogram + mel + log": (dali, peers.DALI_BATCH),
            "NumPy, librosa style": (lambda: numpy_fbank(one[0].numpy()), 1),
        }
    )


def hog_rows(clips: torch.Tensor, timer: Timer) -> dict:
    """HOG: ours and scikit-image's."""
    fbank = kernels.pad_frames(kernels.fbank(clips[:1]), 1024, "repeat")
    image = fbank[0].numpy()
    cells = kernels.hog(fbank)[0]
    normalised = cells / torch.sqrt((cells**2).sum(-1, keepdim=True) + 1e-10)
    expected = peers.skimage_hog(image, 9, (16, 16), (1, 1), block_norm="L2").reshape(-1, 9)
    check("hog", normalised, expected, 1e-4)
    check("hog_patch_mean", kernels.hog_patch_mean(fbank)[0], cells.sum(-1), 1e-5)
    return timer(
        {
            "hog_patch_mean, numba": (lambda: kernels.hog_patch_mean(fbank), 1),
            "hog_patch_mean, torch reference": (lambda: kernels.hog_patch_mean(fbank, backend="torch"), 1),
            "hog with 9 orientations, numba": (lambda: kernels.hog(fbank), 1),
            "hog with 9 orientations, torch reference": (lambda: kernels.hog(fbank, backend="torch"), 1),
            "skimage.feature.hog": (lambda: peers.skimage_patches(image), 1),
        }
    )


def fused_rows(clips: torch.Tensor, timer: Timer) -> dict:
    """features in one call, against its parts called one after the other; and what fresh memory costs."""
    one, small = clips[:1], (clips[:1] * 32768).to(torch.int16)
    out = kernels.features(one)

    def parts():
        fbank = kernels.fbank(one)
        hog = kernels.hog_patch_mean(kernels.pad_frames(fbank, 1024, "repeat"))
        return kernels.pad_frames(fbank, 1024).sub_(-4.2677393).mul_(0.5 / 4.5689974), hog

    check("features", out[0], parts()[0], 1e-5)
    return timer(
        {
            "features, one call": (lambda: kernels.features(one), 1),
            "features, one call, memory given": (lambda: kernels.features(one, out=out), 1),
            "features, one call, int16 in, memory given": (lambda: kernels.features(small, out=out), 1),
            "its parts one after the other": (parts, 1),
        }
    )


def mask_rows(timer: Timer) -> dict:
    """Masks of a batch on the CPU; cells are milliseconds per batch."""
    x = torch.rand(MASK_BATCH, MASK_PATCHES, generator=torch.Generator().manual_seed(0))
    seeds, weight = torch.arange(MASK_BATCH), kernels.patch_weight(x)
    return timer(
        {
            "patch_weight": (lambda: kernels.patch_weight(x), 1),
            "inter_patch_mask": (lambda: kernels.inter_patch_mask(weight, 0.75, generator=seeds), 1),
            "intra_patch_mask (8.4 MB result)": (lambda: kernels.intra_patch_mask(64, (64, 8), generator=seeds), 1),
        }
    )


def thread_rows(clips: torch.Tensor, timer: Timer) -> dict:
    """Sixteen clips on one thread and on two, beside DALI and inside it.

    A thread's own buffers show how the kernel scales. A common batch adds what the memory of the machine allows.
    """
    small = (clips * 32768).to(torch.int16)
    batch = kernels.features(small)
    own = [kernels.features(small[i : i + 1]) for i in range(2)]
    halves = [slice(0, 8), slice(8, 16)]
    pool = ThreadPoolExecutor(2)
    spin(1)

    def eight_times(i: int):
        for _ in range(8):
            kernels.features(small[i : i + 1], out=own[i])

    def half(rows: slice):
        kernels.features(small[rows], out=(batch[0][rows], batch[1][rows]))

    inside = {n: peers.DaliNumbaFeatures(small.numpy(), n) for n in (1, 2)}
    check("DALI numba_function", np.asarray(inside[2]()[0][3]), batch[0][3], 1e-6)
    return timer(
        {
            "one thread": (lambda: [eight_times(i) for i in range(2)], 16),
            "two Python threads": (lambda: list(pool.map(eight_times, range(2))), 16),
            "loop without memory, one thread": (lambda: [spin(SPIN), spin(SPIN)], 16),
            "loop without memory, two threads": (lambda: list(pool.map(spin, [SPIN, SPIN])), 16),
            "into a batch, one thread": (lambda: [half(rows) for rows in halves], 16),
            "into a batch, two Python threads": (lambda: list(pool.map(half, halves)), 16),
            "into a batch inside DALI, numba_function, one thread": (inside[1], peers.DALI_BATCH),
            "into a batch inside DALI, numba_function, two threads": (inside[2], peers.DALI_BATCH),
        }
    )


@numba.njit(nogil=True)
def spin(steps):
    """About 2 ms per million steps of nothing but arithmetic: what two cores of this machine can gain at best."""
    total = 0.0
    for i in range(steps):
        total += 1.0 / (i + 1.0)
    return total


def compile_seconds() -> dict:
    """First call of ``features`` in a new process: with an empty cache, then with the cache that this left."""
    program = (
        "import time, torch, fastsskd_kernels as k; w = torch.zeros(1, 16000); k.features(w, backend='torch');"
        "t, c = time.perf_counter(), time.process_time(); k.features(w);"
        "print(time.perf_counter() - t, time.process_time() - c)"
    )
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty cache", "warm cache"):
            environment = os.environ | {"NUMBA_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
            wall, cpu = map(float, done.stdout.split())
            seconds[name] = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}
    return seconds


def working_memory() -> dict:
    """Bytes that one thread allocates for one clip beside the result."""
    plan = fbank_cpu.make_plan(16000, 128, "hanning")
    sizes = {
        "FFT rows": 2 * plan.place.size * LANES,
        "waveform tile": plan.shift * (LANES + (plan.window.size - 1) // plan.shift),
        "mel rows": 128 * LANES,
        "latest rows of the log-mel": 4 * math.lcm(LANES, 16) * 128,
        "HOG column sums": 128,
    }
    return {name: 4 * size for name, size in sizes.items()} | {"frames per block": LANES}


def machine(options: argparse.Namespace) -> dict:
    names = ("torch", "torchaudio", "numba", "numpy", "scikit-image")
    versions = {name: version(name) for name in names} | {"dali": peers.dali_version()}
    command = f"python benchmarks/kernels.py --rounds {options.rounds} --patience {options.patience:g}"
    return common.machine(versions, command) | {"lanes": LANES}


def verdicts(tables: dict) -> list[dict]:
    """Each requirement, what was found, and whether it holds; None where this run cannot tell."""

    def ms(table: str, row: str) -> float:
        return tables[table][row]["median_ms"]

    def gain(one: str, two: str) -> float:
        return ms("threads", one) / ms("threads", two)

    fbank, patch_mean = ms("fbank", "fbank, numba"), ms("hog", "hog_patch_mean, numba")
    found = [
        ("fbank against torchaudio", ms("fbank", "torchaudio kaldi.fbank") / fbank, ">=", 10.0, "x"),
        ("fbank against DALI", ms("fbank", "DALI spectrogram + mel + log") / fbank, ">=", 4.0, "x"),
        ("fbank of a clip", fbank, "<=", 0.7, "ms"),
        ("hog_patch_mean against skimage", ms("hog", "skimage.feature.hog") / patch_mean, ">=", 20.0, "x"),
        ("hog_patch_mean of a clip", patch_mean, "<=", 0.25, "ms"),
        ("inter-patch mask of 64 x 512", ms("masks", "inter_patch_mask"), "<=", 2.0, "ms"),
        ("intra-patch mask of 64 x 512", ms("masks", "intra_patch_mask (8.4 MB result)"), "<=", 2.0, "ms"),
        ("two threads against one", gain("one thread", "two Python threads"), ">=", 1.8, "x"),
        ("first call, compiling, CPU time", tables["compile"]["empty cache"]["cpu_s"], "<=", 5.0, "s"),
    ]
    rows = [common.verdict(*row) for row in found]
    bare = gain("loop without memory, one thread", "loop without memory, two threads")
    for row in rows:
        if row["what"].startswith("two threads") and bare < 1.8:
            row |= {"met": None, "why": f"a bare arithmetic loop gained {bare:.2f} x: no second core was free"}
    return rows


def markdown(results: dict) -> str:
    """The results as one page."""
    lines = [
        "# Kernels",
        "",
        common.machine_line(results["machine"]),
        "",
        "One thread, 10 s clip at 16 kHz, medians over rounds in which every row is timed once. CPU is the time of all "
        "threads: on a busy machine it says more than the wall time, and no number of threads gains there.",
        "",
        *common.verdict_lines(results["verdicts"]),
    ]
    for title, unit in (("fbank", "clip"), ("hog", "clip"), ("fused", "clip"), ("threads", "clip"), ("masks", "batch")):
        first = next(iter(results[title].values()))["median_ms"]
        lines += ["", f"## {title}", "", f"| | ms per {unit} | best | CPU | relative to the first row |"]
        lines += ["|---|---|---|---|---|"]
        for name, cell in results[title].items():
            median = cell["median_ms"]
            lines.append(
                f"| {name} | {median:.3f} | {cell['best_ms']:.3f} | {cell['cpu_ms']:.3f} | {median / first:.2f} |"
            )
    for title in ("compile", "memory", "gpu"):
        lines += ["", f"## {title}", ""] + [f"- {name}: {value}" for name, value in results[title].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait, in all, for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="one round: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for kernels.json and kernels.md")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.patience = 1, 0.0
    torch.set_num_threads(1)
    timer = Timer(options.rounds, options.patience)
    clips = torch.randn(peers.DALI_BATCH, SAMPLES, generator=torch.Generator().manual_seed(0)) * 0.1
    results = {"machine": machine(options)}
    results["fbank"] = fbank_rows(clips, timer)
    results["hog"] = hog_rows(clips, timer)
    results["fused"] = fused_rows(clips, timer)
    results["threads"] = thread_rows(clips, timer)
    results["masks"] = mask_rows(timer)
    timer.idle.wait()
    results["compile"] = compile_seconds()
    results["memory"] = working_memory()
    results["gpu"] = kernels_gpu.measure()
    results["verdicts"] = verdicts(results)
    results["machine"]["samples_on_an_idle_machine"] = str(timer.idle)
    common.write(options.out, "kernels", results, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
