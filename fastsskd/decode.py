"""Encoded audio -> fixed-length 16 kHz mono waveforms, in DALI. The only file that imports ``nvidia.dali``.

One pipeline definition serves every machine: decode, downmix and resample on the CPU (DALI's audio decoder has no GPU
form), random crop or loop, then, with ``device="gpu"``, the copy to the device, so that only waveforms cross the bus.
Features are computed from there by ``fastsskd_kernels`` (see ``loader.py``): DALI's own mel filters and missing
per-frame DC removal would give other features than the teachers were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types

SAMPLE_RATE = 16000
#: Of DALI's windowed-sinc resampler, from 0 (3 lobes) over 50 (16 lobes) to 100 (64 lobes).
RESAMPLE_QUALITY = 50.0


@dataclass(frozen=True)
class EncodedClip:
    """One clip on its way into the pipeline.

    Attributes:
        data: ``(num_bytes,)`` uint8, an audio file's bytes.
        crop: in [0, 1), where the crop starts, as a share of the possible starts; the loop's start for a short clip.
        segment: start and end inside the file, seconds; an end <= 0 means the whole file.
    """

    data: np.ndarray
    crop: float
    segment: tuple[float, float] = (0.0, -1.0)


class DecodeError(Exception):
    """DALI refused a batch; ``str()`` is its reason in one line. The pipeline stays usable."""


@pipeline_def(enable_conditionals=True)
def audio_pipeline(source: Callable[[], tuple], num_samples: int, device: str):
    """The pipeline: ``source()`` gives lists of (bytes, crop, segment); three outputs a clip.

    Returns:
        waveform ``(num_samples,)`` float32 on ``device``; samples of the whole file at 16 kHz, int32; the mean square
        of the whole file, which is not finite if any sample is not.
    """
    encoded, crop, segment = fn.external_source(
        source=source, num_outputs=3, batch=True, dtype=[types.UINT8, types.FLOAT, types.FLOAT], ndim=[1, 0, 1]
    )
    waveform, _ = fn.decoders.audio(
        encoded, downmix=True, dtype=types.FLOAT, sample_rate=SAMPLE_RATE, quality=RESAMPLE_QUALITY
    )
    decoded_length = waveform.shape(dtype=types.INT32)[0]
    power = fn.reductions.mean_square(waveform)
    if segment[1] > 0:
        start = fn.cast(segment[:1] * SAMPLE_RATE, dtype=types.INT32)
        stop = fn.cast(segment[1:] * SAMPLE_RATE, dtype=types.INT32)
        waveform = fn.slice(waveform, start=start, end=stop, axes=[0], out_of_bounds_policy="trim_to_shape")
    waveform = _crop_or_loop(waveform, crop, num_samples)
    if device == "gpu":
        waveform = waveform.gpu()
    return waveform, decoded_length, power


def _crop_or_loop(waveform, crop, num_samples: int):
    """A random crop, or for a clip that is too short a random rotation, tiled until it is long enough."""
    length = waveform.shape(dtype=types.INT32)[0]
    if length >= num_samples:
        start = fn.cast(crop * fn.cast(length - num_samples + 1, dtype=types.FLOAT), dtype=types.INT32)
        # float32 rounds up for lengths beyond 2^24.
        start = fn.reshape(math.min(start, length - num_samples), shape=[1])
        fixed = fn.slice(waveform, start=start, shape=[num_samples], axes=[0])
    else:
        # A rotation followed by tiling is a window on the endlessly repeated clip. DALI has no tile operator; adding
        # a column of zeros repeats the clip by broadcasting.
        start = fn.cast(crop * fn.cast(length, dtype=types.FLOAT), dtype=types.INT32)
        # An empty clip divides by 1 here and is refused by the slice below.
        repeats = (num_samples + start) // math.max(length, 1) + 1
        zeros = fn.zeros(shape=fn.stack(repeats, types.Constant(1, dtype=types.INT32)), dtype=types.FLOAT)
        tiled = fn.reshape(fn.expand_dims(waveform, axes=[0]) + zeros, shape=[-1])
        fixed = fn.slice(tiled, start=fn.reshape(start, shape=[1]), shape=[num_samples], axes=[0])
    return fixed


class Decoder:
    """The running pipeline.

    Args:
        source: called for the next batch, in the thread that calls :meth:`run` and ahead of it by ``depth`` batches;
            raises StopIteration at the end.
        max_batch: most clips in a batch.
        num_samples: length of the waveforms.
        device: ``"cpu"`` or a CUDA device.
        num_threads: DALI's decoding threads.
    """

    def __init__(
        self,
        source: Callable[[], Sequence[EncodedClip]],
        *,
        max_batch: int,
        num_samples: int,
        device: torch.device,
        num_threads: int,
        depth: int = 2,
    ):
        self.num_samples, self.device = num_samples, device
        self._pipeline = self._build(lambda: _columns(source()), max_batch, num_threads, depth)
        self._rescue: Pipeline | None = None
        self._rescue_clip: list[EncodedClip] = []

    def _build(self, source: Callable[[], tuple], max_batch: int, num_threads: int, depth: int) -> Pipeline:
        pipeline = audio_pipeline(
            source,
            self.num_samples,
            "gpu" if self.device.type == "cuda" else "cpu",
            batch_size=max_batch,
            num_threads=num_threads,
            device_id=self.device.index if self.device.type == "cuda" else None,
            prefetch_queue_depth=depth,
        )
        pipeline.build()
        return pipeline

    def run(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """The next batch.

        Returns:
            Waveforms ``(B, num_samples)`` float32 on the device, decoded lengths ``(B,)`` and mean squares ``(B,)``.

        Raises:
            DecodeError: a clip of this batch cannot be decoded; the next call gives the next batch.
            StopIteration: the source has ended and every batch was given.
        """
        return self._outputs(self._pipeline)

    def run_one(self, clip: EncodedClip) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Decode a single clip apart from the stream, to find out which one of a refused batch is bad."""
        if self._rescue is None:
            self._rescue = self._build(lambda: _columns(self._rescue_clip), max_batch=1, num_threads=1, depth=1)
        self._rescue_clip = [clip]
        return self._outputs(self._rescue)

    def _outputs(self, pipeline: Pipeline) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        try:
            waveform, length, power = pipeline.run()
        except RuntimeError as error:
            raise DecodeError(_reason(str(error))) from None
        tensor = _to_torch(waveform.as_tensor(), self.device)
        return tensor, np.array(length.as_array()), np.array(power.as_array())


def _columns(clips: Sequence[EncodedClip]) -> tuple[list, list, list]:
    """A batch as external_source takes it: one list for each of the three inputs."""
    return (
        [clip.data for clip in clips],
        [np.float32(clip.crop) for clip in clips],
        [np.asarray(clip.segment, np.float32) for clip in clips],
    )


def _to_torch(dali_tensor, device: torch.device) -> torch.Tensor:
    """Copy a DALI output into a tensor of ours, whose life does not depend on the pipeline's buffers."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    tensor = torch.empty(dali_tensor.shape(), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dali_tensor, tensor, cuda_stream=stream)
    return tensor


def _reason(message: str) -> str:
    """DALI's message in one line: the line that says what is wrong, without the pipeline's traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for marker in ("Error when decoding", "Unsupported", "Failed", "Assert on", "Error"):
        for line in lines:
            if marker in line and "Critical error" not in line and "Error in CPU operator" not in line:
                return line.split("] ", 1)[-1][:200]
    return (lines[-1] if lines else "cannot be decoded")[:200]
