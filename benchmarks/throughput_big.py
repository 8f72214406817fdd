"""Two parts of ``throughput.py`` about size: shards that are not in memory, and a manifest of millions of rows."""

import ctypes
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from throughput_data import repeat, shifted

from fastsskd import manifest

PIECE = 1 << 20  # bytes a call of sequential reading
COLD_ROUNDS = 3
THREADS = 2
MAP_SHARED, PROT_READ = 1, 1


def cold(bench, ours, folder: Path) -> dict:
    """Our loader on large shards that were dropped from the page cache, and on the same when they are in it."""
    source = make_shards(bench.data["sources"]["packed"], folder, bench.options.big_gb)
    shards, extents = source["shards"], source.pop("extents")
    limits = {"window_s": bench.options.window, "warm_s": 0, "most_clips": len(extents) - 10 * 32}
    found = {"gigabytes": round(sum(os.path.getsize(shard) for shard in shards) / 1e9, 2), "clips": len(extents)}
    rounds = {"cold": [], "warm": [], "sequential": [], "random": []}
    extra = []  # CPU seconds that a plain read costs more from the disk than from memory
    for _ in range(1 if bench.options.smoke else COLD_ROUNDS):
        found["resident_before_cold"] = round(drop(shards), 3)
        rounds["cold"].append(rate(bench.sample(ours, source, **limits)))
        drop(shards)
        megabytes, from_disk = read_random(shards, extents, bench.options.window)
        rounds["random"].append(megabytes)
        drop(shards)
        rounds["sequential"].append(read_sequential(shards))
        found["resident_before_warm"] = round(resident(shards), 3)
        rounds["warm"].append(rate(bench.sample(ours, source, **limits)))
        _, from_memory = read_random(shards, extents, bench.options.window)
        extra.append(from_disk - from_memory)
    per_clip = statistics.mean(size for _, _, size in extents) / 1e6
    found["megabytes_per_clip"] = round(per_clip, 3)
    found["disk_cpu_ms_per_clip"] = 1e3 * statistics.median(extra)
    for name, values in rounds.items():
        clips = [value / per_clip for value in values] if name in ("sequential", "random") else values
        found[name] = {"clips_per_s": statistics.median(clips), "range": [min(clips), max(clips)]}
        found[name]["megabytes_per_s"] = found[name]["clips_per_s"] * per_clip
    return found


def rate(result: dict) -> float:
    if "failed" in result:
        raise SystemExit(f"fastsskd on large shards: {result['failed']}")
    return result["clips_per_s"]


def make_shards(packed: dict, folder: Path, gigabytes: float) -> dict:
    """Copies of the packed shards in which every clip is another one, so that nothing could be stored only once."""
    clips = manifest.load(packed["once"])
    extents = [(str(clips.path(i)), *clips.extent(i)) for i in range(len(clips))]
    once = sum(os.path.getsize(shard) for shard in packed["shards"])
    copies = max(1, round(gigabytes * 1e9 / once))
    folder.mkdir()
    paths, shards, places = [], [], []
    for copy in range(copies):
        name = {shard: f"{copy:04d}-{Path(shard).name}" for shard in packed["shards"]}
        for shard in packed["shards"]:
            content = bytearray(Path(shard).read_bytes())
            for i, (path, offset, size) in enumerate(extents):
                if path == shard:
                    change(memoryview(content)[offset : offset + size], copy * len(extents) + i)
            write_through(folder / name[shard], content)
        shards += [str(folder / name[shard]) for shard in packed["shards"]]
        paths += [name[path] for path, _, _ in extents]
        places += [(str(folder / name[path]), offset, size) for path, offset, size in extents]
    target = folder / "big.manifest"
    repeat(clips, copies, target, paths=paths)
    return {"manifest": str(target), "ids": packed["ids"], "shards": shards, "extents": places}


def change(wav: memoryview, seed: int) -> None:
    """Rotate and soften the samples of a 16-bit WAV in place."""
    start = bytes(wav[:4096]).index(b"data") + 8
    samples = np.frombuffer(wav, np.int16, (len(wav) - start) // 2, start)
    samples[:] = shifted(samples, seed)


def write_through(path: Path, content: bytearray) -> None:
    """On the disk, not only on its way there: pages that still must be written cannot be dropped."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def drop(files: list[str]) -> float:
    """Drop files from the page cache; returns the share of them that is still there."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return resident(files)


def resident(files: list[str]) -> float:
    """Share of the files' pages in the page cache, as ``mincore`` tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    there = pages = 0
    for file in files:
        size = os.path.getsize(file)
        descriptor = os.open(file, os.O_RDONLY)
        place = libc.mmap(None, size, PROT_READ, MAP_SHARED, descriptor, 0)
        flags = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if libc.mincore(place, size, flags):
            raise OSError(ctypes.get_errno(), "mincore")
        there += int((np.frombuffer(flags, np.uint8) & 1).sum())
        pages += len(flags)
        libc.munmap(place, size)
        os.close(descriptor)
    return there / pages


def read_sequential(shards: list[str]) -> float:
    """Megabytes a second of reading the shards from front to back, in two threads."""

    def read(shard: str) -> int:
        with open(shard, "rb", buffering=0) as file:
            buffer, total = bytearray(PIECE), 0
            while count := file.readinto(buffer):
                total += count
            return total

    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, shards))
    return total / 1e6 / (time.monotonic() - began)


def read_random(shards: list[str], extents: list[tuple[str, int, int]], seconds: float) -> tuple[float, float]:
    """Reading clips from all over the shards, in two threads, for a while: megabytes a second, CPU seconds a clip."""
    files = {shard: os.open(shard, os.O_RDONLY) for shard in shards}
    order = np.random.default_rng(5).permutation(len(extents))
    began, busy = time.monotonic(), time.process_time()

    def read(places: np.ndarray) -> tuple[int, int]:
        total, count, buffer = 0, 0, bytearray(max(size for _, _, size in extents))
        for place in places:
            shard, offset, size = extents[place]
            total += os.preadv(files[shard], [memoryview(buffer)[:size]], offset)
            count += 1
            if time.monotonic() - began > seconds:
                break
        return total, count

    with ThreadPoolExecutor(THREADS) as pool:
        total, count = map(sum, zip(*pool.map(read, [order[i::THREADS] for i in range(THREADS)]), strict=True))
    taken, busy = time.monotonic() - began, time.process_time() - busy
    for descriptor in files.values():
        os.close(descriptor)
    return total / 1e6 / taken, busy / count


def large_manifest(bench, ours) -> dict:
    """Start-up and memory with millions of rows, which point to the same few clips, against those with few rows."""
    packed = bench.data["sources"]["packed"]
    clips = manifest.load(packed["once"])
    target = Path(packed["once"]).with_name("large.manifest")
    began = time.monotonic()
    repeat(clips, -(-bench.options.rows // len(clips)), target, rows=bench.options.rows)
    found = {"rows": bench.options.rows, "file_mb": round(target.stat().st_size / 1e6, 1)}
    found["seconds_to_make"] = round(time.monotonic() - began, 1)
    keys = ("start_s", "first_batch_s", "clips_per_s", "rss_mb", "pss_mb", "file_mb")
    for name, path in (("large", target), ("small", Path(packed["once"]))):
        source = packed | {"manifest": str(path)}
        results = [bench.sample(ours, source) for _ in range(bench.options.rounds)]
        found[name] = {key: statistics.median(result[key] for result in results) for key in keys}
    return found
