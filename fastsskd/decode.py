"""Encoded audio -> mono waveforms at the file's own rate, in DALI. The only file that imports ``nvidia.dali``.

The pipeline decodes and downmixes. It is the same with and without a GPU: DALI's audio decoder runs on the CPU only.
The rest is not left to DALI: features would not be those the teachers were trained on: its resampler (2.4.0) folds
everything above the new Nyquist frequency back into the clip, its mel filters are not Kaldi's, and it has no per-frame
DC removal. ``fastsskd_kernels`` does these (see ``stream.py``).
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
        samples: ``(S,)`` float32, mono; a view that the decoder's next call overwrites.
        rate: Hz, as the decoder gave it.
    """

    samples: np.ndarray
    rate: int


class DecodeError(Exception):
    """DALI refused a file among those it was given; ``str()`` is its reason in one line."""


@pipeline_def
def decode_pipeline(source: Callable[[], list[np.ndarray]]):
    """``source()`` gives a batch of files, ``(num_bytes,)`` uint8 each; out come mono samples and rates in Hz."""
    encoded = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1)
    return tuple(fn.decoders.audio(encoded, downmix=True, dtype=types.FLOAT))


class Decoder:
    """The pipeline, run by its caller: one a thread, each with a decoding thread of its own.

    Several small pipelines, each called by the thread that goes on with what it gives, decode faster than one of as
    many threads that works ahead: a clip is still in that core's cache, and no thread waits for the slowest of a batch.

    Args:
        max_clips: most files in a call.
    """

    def __init__(self, max_clips: int):
        files = self._files = []  # not self: the pipeline would keep its owner alive, and this one the pipeline
        self._pipeline: Pipeline = decode_pipeline(
            lambda: files,
            batch_size=max_clips,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,  # one call, one run; with exec_async=False a refused file would end the pipeline
        )
        self._pipeline.build()

    def decode(self, files: list[np.ndarray]) -> list[Decoded]:
        """Decode files, ``(num_bytes,)`` uint8 each.

        Raises:
            DecodeError: one of them cannot be decoded; none is returned, and the decoder stays usable.
        """
        self._files[:] = files
        try:
            samples, rates = self._pipeline.run()
        except RuntimeError as error:
            raise DecodeError(_reason(str(error))) from None
        finally:
            self._files.clear()
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
