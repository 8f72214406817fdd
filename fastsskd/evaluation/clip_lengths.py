"""How long the clips of a manifest are, from their headers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import fastsskd_kernels as kernels
from fastsskd import distributed
from fastsskd.audio.file import BadClip, probe
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import open_clip
from fastsskd.manifest import Manifest


def longer_than(manifest: Manifest, seconds: float, *, workers: int | None = None) -> np.ndarray:
    """Which clips have more samples, at the model's rate, than a crop of ``seconds``.

    Returns:
        ``(n,)`` bool; False for a clip that cannot be read, and where the header does not tell.
    """
    shards, num_samples = ShardFiles(manifest.root), round(seconds * SAMPLE_RATE)

    def look(i: int) -> bool:
        try:
            info = probe(open_clip(manifest, i, shards))
        except (BadClip, OSError):
            return False
        if info.num_frames is None:
            return False
        start, end = manifest.segment(i)
        last = info.num_frames if end <= 0 else min(round(end * info.sample_rate), info.num_frames)
        _, up, down = kernels.resample_table(info.sample_rate, SAMPLE_RATE)
        return kernels.resampled_length(max(last - round(start * info.sample_rate), 0), up, down) > num_samples

    with ThreadPoolExecutor(workers or distributed.cores_per_rank()) as pool:
        return np.fromiter(pool.map(look, range(len(manifest))), bool, len(manifest))
