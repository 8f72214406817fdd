"""What people see of `fastsskd pack`: a line while it runs, and what became of the clips."""

from __future__ import annotations

import datetime
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable

EVERY = 2.0
"""Seconds between two lines."""
MOST_REASONS = 5
VARIES = re.compile(r"\b[0-9a-f]{2}(?: [0-9a-f]{2})+\b|(?<!\w)-?\d[\d.]*")
"""What differs between two clips that are bad for the same reason: bytes in hex, numbers."""


class Progress:
    """Prints how far it is, at most every `EVERY` seconds; on a terminal the line is rewritten in place.

    Args:
        num_clips: of the whole job. done: of these, in shards that were finished before.
        what: they are called.
        quiet: print nothing.
    """

    def __init__(self, num_clips: int, done: int = 0, what: str = "clips", quiet: bool = False):
        self._num_clips, self._done_before, self._done, self._rejected, self._bytes = num_clips, done, done, 0, 0
        self._what, self._quiet = what, quiet
        self._begin = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._open_line = False

    def clip(self, size: int | None) -> None:
        """One more clip is done, with `size` bytes; None = rejected."""
        self._done += 1
        self._bytes += size or 0
        self._rejected += size is None
        now = time.monotonic()
        if self._quiet or now - self._last < EVERY:
            return
        self._last = now
        rate = (self._done - self._done_before) / (now - self._begin)
        left = datetime.timedelta(seconds=round((self._num_clips - self._done) / rate))
        line = (
            f"{self._done}/{self._num_clips} {self._what}, {rate:.1f} {self._what}/s, {self._bytes / 1e6:.0f} MB, "
            f"{self._rejected} rejected, {left} left"
        )
        print(("\r" if self._terminal else "") + line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._open_line = self._terminal

    def end(self) -> None:
        if self._open_line:
            print(file=sys.stderr)
        self._open_line = False


def top_reasons(reasons: Iterable[str]) -> list[str]:
    """The most frequent reasons with their numbers of clips, a line each; numbers inside of them do not count."""
    kinds = Counter(VARIES.sub("...", reason) for reason in reasons)
    lines = [f"{count:>8}  {kind}" for kind, count in kinds.most_common(MOST_REASONS)]
    if len(kinds) > MOST_REASONS:
        lines.append(f"{sum(kinds.values()) - sum(n for _, n in kinds.most_common(MOST_REASONS)):>8}  other reasons")
    return lines
