"""A recording of any length -> windows of the length that a model hears, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastsskd.audio.info import SAMPLE_RATE

SMALLEST_REST = 0.1
"""What is left after the last whole window is heard if it is at least this share of one."""


@dataclass(frozen=True)
class Cut:
    """Where windows begin and how long they are, in samples at ``SAMPLE_RATE``.

    Attributes:
        length: of a window.
        hop: from one window's start to the next's; 0 = the first window only, and a block more is read, which tells
            whether the recording goes on.
    """

    length: int
    hop: int

    def windows(self, blocks: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Start and samples, ``(length,)`` float32, of each window.

        What is left at the end gets a last window, which ends with the recording, unless it is very short
        (``SMALLEST_REST``). A recording shorter than a window is one window of its own length.

        Args:
            blocks: the recording's samples, in order.
        """
        held, begin, start = np.empty(0, np.float32), 0, 0  # held[0] is sample `begin`; the next window's start
        heard = 0  # end of the last window
        for block in blocks:
            held = np.concatenate([held, block])
            while start + self.length <= begin + len(held):
                yield start, held[start - begin : start - begin + self.length].copy()
                heard = start + self.length
                if not self.hop:
                    next(blocks, None)
                    return
                start += self.hop
            drop = max(0, min(start - begin, len(held) - self.length))  # the last window may need these
            held, begin = held[drop:], begin + drop
        end = begin + len(held)
        if not heard:
            yield 0, held
        elif end - max(heard, start) >= SMALLEST_REST * self.length:
            yield end - self.length, held[-self.length :].copy()


def seconds(samples: int) -> float:
    """Of a number of samples at ``SAMPLE_RATE``."""
    return samples / SAMPLE_RATE
