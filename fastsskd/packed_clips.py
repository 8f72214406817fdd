"""Plain clips in tar shards -> their rows of a batch, some clips in one call.

Plain is mono 16-bit WAV at 16 kHz, what `fastsskd pack` makes. What else a shard holds, and what is wrong with a clip,
is for :class:`~fastsskd.clip_reader.ClipReader`.
"""

from __future__ import annotations

import contextlib

import numpy as np
from torch import Tensor

import fastsskd_kernels as kernels
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_table import WHOLE_FILE, Manifest


class PackedClips:
    """Fills rows; one a thread.

    Args:
        manifest: the clips.
        shards: open tar shards, shared by all readers of the manifest.
        num_samples: of a crop.
        num_frames, mean, std: of the features, see ``kernels.features``.
    """

    def __init__(
        self, manifest: Manifest, shards: ShardFiles, *, num_samples: int, num_frames: int, mean: float, std: float
    ):
        self._manifest, self._shards = manifest, shards
        self._settings = {"num_samples": num_samples, "num_frames": num_frames, "mean": mean, "std": std}
        self._memory = np.empty(kernels.wav_memory(num_samples), np.uint8)

    def fill(self, index: np.ndarray, positions: np.ndarray, fbank: Tensor, hog: Tensor) -> np.ndarray:
        """Write the features of plain clips into their rows.

        Args:
            index: ``(k,)`` clips of the manifest.
            positions: ``(k,)`` of their crops, see :class:`~fastsskd.clip_reader.Crop`.
            fbank, hog: ``(k, T, F)`` and ``(k, N)``, contiguous.

        Returns:
            ``(k,)`` bool, False = not written.
        """
        offsets, sizes = self._manifest.extents(index)
        start, end = self._manifest.segments(index)
        plain = (sizes > 0) & (start == WHOLE_FILE[0]) & (end == WHOLE_FILE[1]) & self._manifest.good[index]
        if not plain.any():
            return plain
        files = {}  # kept until the end: one that nobody refers to is closed
        for place in np.flatnonzero(plain).tolist():
            with contextlib.suppress(OSError):
                files[place] = self._shards.open(self._manifest.file_name(int(index[place])))
        numbers = np.full(len(index), -1)
        numbers[list(files)] = [file.descriptor for file in files.values()]
        sizes = np.where(plain, sizes, 0)
        out = fbank, hog
        return kernels.wav_features(numbers, offsets, sizes, positions, **self._settings, out=out, memory=self._memory)
