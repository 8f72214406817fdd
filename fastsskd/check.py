"""What is in a manifest, found by decoding it: bad clips, lengths, and the statistics for normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import fastsskd_kernels as kernels
from fastsskd.audio_file import BadClip, probe
from fastsskd.errors import InputError
from fastsskd.loader import Loader, default_workers
from fastsskd.manifest import Manifest


def find_bad(manifest: Manifest, *, workers: int = 0) -> Iterator[tuple[int, dict[str, str]]]:
    """Decode every clip as training would.

    Yields:
        Clips looked at so far, and the reason by key of those found bad so far.
    """
    # The shortest crop that has a feature frame: the file is decoded whole whatever the crop.
    loader = Loader(manifest, batch_size=16, seconds=0.16, workers=workers)
    done = 0
    try:
        for batch in loader:
            done = min(done + loader.sampler.global_batch, len(manifest))
            yield done, loader.skipped
            del batch
    finally:
        loader.close()


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
    frames = kernels.num_frames(round(seconds * 16000))
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

    def read(i: int) -> Any:
        try:
            return probe(np.fromfile(manifest.path(i), np.uint8).data)
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
