"""What is in a manifest, found by decoding it: bad clips, lengths, and the statistics for normalisation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import fastsskd_kernels as kernels
from fastsskd.audio.file import BadClip, probe
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import ClipReader, Crop, open_clip
from fastsskd.errors import InputError
from fastsskd.loader import Loader, default_workers
from fastsskd.manifest import Manifest
from fastsskd.stream import PART


def find_bad(manifest: Manifest, *, workers: int = 0) -> Iterator[tuple[int, dict[str, str]]]:
    """Decode every clip as training would.

    Yields:
        Clips looked at so far, and the reason by key of those found bad so far.
    """
    shards, own, bad = ShardFiles(manifest.root), threading.local(), {}

    def look(part: range) -> dict[str, str]:
        if not hasattr(own, "reader"):
            own.reader = ClipReader(manifest, shards, PART)
        results = own.reader.read(list(part), [Crop(None)] * len(part))
        return {manifest.key(part[i]): str(result) for i, result in results if isinstance(result, BadClip)}

    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for start in range(0, len(manifest), 16 * PART):
            stop = min(start + 16 * PART, len(manifest))
            parts = [range(first, min(first + PART, stop)) for first in range(start, stop, PART)]
            for found in pool.map(look, parts):
                bad |= found
            yield stop, bad


def feature_statistics(
    manifest: Manifest, *, seconds: float, limit: int, seed: int, workers: int = 0
) -> dict[str, Any]:
    """Mean and standard deviation of the log-mel features over the frames of random crops, padding left out.

    Args:
        seconds: length of the crops.
        limit: clips to look at, drawn at random; 0 = all.

    Returns:
        ``mean``, ``std``, ``num_clips`` and ``skipped`` (reasons by key).

    Raises:
        InputError: no clip can be read.
    """
    if limit and limit < len(manifest):
        manifest = manifest.select(np.sort(np.random.default_rng(seed).permutation(len(manifest))[:limit]))
    # Undo nothing: with mean 0 and std 0.5 the loader's normalisation is the identity.
    loader = Loader(manifest, batch_size=16, seconds=seconds, train=True, seed=seed, mean=0.0, std=0.5, workers=workers)
    frames = kernels.num_frames(round(seconds * SAMPLE_RATE))
    count, total, square, clips = 0, 0.0, 0.0, 0
    try:
        for batch in loader:
            values = batch.fbank[:, :frames].to(torch.float64)
            count, clips = count + values.numel(), clips + len(batch)
            total, square = total + values.sum().item(), square + values.square().sum().item()
    finally:
        loader.close()
    if not clips:
        key, reason = next(iter(loader.skipped.items()))
        raise InputError(f"no clip of the manifest can be read (first: {key}: {reason})")
    mean = total / count
    std = max(square / count - mean**2, 0.0) ** 0.5
    return {"mean": mean, "std": std, "num_clips": clips, "skipped": loader.skipped}


def headers(manifest: Manifest, *, workers: int = 0) -> dict[str, Any]:
    """Lengths, sampling rates, formats and channels as the files' headers tell them."""

    shards = ShardFiles(manifest.root)

    def read(i: int) -> Any:
        try:
            return probe(open_clip(manifest, i, shards))
        except (BadClip, OSError):
            return None

    with ThreadPoolExecutor(workers or default_workers()) as pool:
        infos = [info for info in pool.map(read, range(len(manifest))) if info is not None]
    seconds = [info.num_frames / info.sample_rate for info in infos if info.num_frames]
    return {
        "seconds": _quantiles(seconds),
        "hours": sum(seconds) / 3600,
        "sample_rates": _tally(info.sample_rate for info in infos),
        "formats": _tally(info.format for info in infos),
        "channels": _tally(info.channels for info in infos),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.quantile(values, [0.0, 0.05, 0.5, 0.95, 1.0])
    return dict(zip(("min", "p5", "median", "p95", "max"), (round(float(p), 3) for p in points), strict=True))


def _tally(values: Any) -> dict[str, int]:
    names, counts = np.unique([str(value) for value in values], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))
