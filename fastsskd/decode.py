"""Encoded audio -> mono waveforms at the file's own rate, in DALI. The only file that imports ``nvidia.dali``.

The pipeline decodes and downmixes, in DALI's threads and ahead of the caller. It is the same with and without a GPU:
DALI's audio decoder runs on the CPU only. The rest is not left to DALI: features would not be those the teachers
were trained on: its resampler (2.4.0) folds everything above the new Nyquist frequency back into the clip, its mel
filters are not Kaldi's, and it has no per-frame DC removal. ``fastsskd_kernels`` does these (see ``stream.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types


@dataclass(frozen=True)
class Decoded:
    """A decoded clip.

    Attributes:
        samples: ``(S,)`` float32, mono; a view that the next ``run`` of the decoder overwrites.
        rate: Hz, as the decoder gave it.
    """

    samples: np.ndarray
    rate: int


class DecodeError(Exception):
    """DALI refused a batch; ``str()`` is its reason in one line. The decoder stays usable."""


@pipeline_def
def decode_pipeline(source: Callable[[], list[np.ndarray]]):
    """``source()`` gives a batch of files, ``(num_bytes,)`` uint8 each; out come mono samples and rates in Hz."""
    encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
    return tuple(fn.decoders.audio(encoded, downmix=True, dtype=types.FLOAT))


class Decoder:
    """The running pipeline.

    Args:
        source: called for the next batch of files, in the thread that calls :meth:`run` and ahead of it by ``depth``
            batches; raises StopIteration at the end.
        max_batch: most files in a batch.
        num_threads: DALI's decoding threads.
    """

    def __init__(self, source: Callable[[], list[np.ndarray]], *, max_batch: int, num_threads: int, depth: int = 2):
        self._pipeline = _build(source, max_batch, num_threads, depth)
        self._rescue: Pipeline | None = None
        self._rescue_file: list[np.ndarray] = []

    def run(self) -> list[Decoded]:
        """The next batch.

        Raises:
            DecodeError: a file of this batch cannot be decoded; the next call gives the next batch.
            StopIteration: the source has ended and every batch was given.
        """
        return _outputs(self._pipeline)

    def run_one(self, file: np.ndarray) -> Decoded:
        """Decode one file apart from the stream, to find out which one of a refused batch is bad.

        Raises:
            DecodeError: this one.
        """
        if self._rescue is None:
            self._rescue = _build(lambda: self._rescue_file, max_batch=1, num_threads=1, depth=1)
        self._rescue_file = [file]
        (decoded,) = _outputs(self._rescue)
        return Decoded(decoded.samples.copy(), decoded.rate)


def _build(source: Callable[[], list[np.ndarray]], max_batch: int, num_threads: int, depth: int) -> Pipeline:
    pipeline = decode_pipeline(
        source, batch_size=max_batch, num_threads=num_threads, device_id=None, prefetch_queue_depth=depth
    )
    pipeline.build()
    return pipeline


def _outputs(pipeline: Pipeline) -> list[Decoded]:
    try:
        samples, rates = pipeline.run()
    except RuntimeError as error:
        raise DecodeError(_reason(str(error))) from None
    rates = np.asarray(rates.as_array()).reshape(-1)
    return [Decoded(np.asarray(samples[i]), int(rates[i])) for i in range(len(samples))]


def _reason(message: str) -> str:
    """DALI's message in one line: the line that says what is wrong, without the pipeline's traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for marker in ("Error when decoding", "Unsupported", "Failed", "Assert on", "Error"):
        for line in lines:
            if marker in line and "Critical error" not in line and "Error in CPU operator" not in line:
                return line.split("] ", 1)[-1][:200]
    return (lines[-1] if lines else "cannot be decoded")[:200]
