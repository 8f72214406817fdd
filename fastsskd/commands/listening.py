"""What `fastsskd predict` and `fastsskd embed` have in common: checkpoints, recordings, windows, speed."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsskd.commands.arguments import device, positive
from fastsskd.errors import UsageError

if TYPE_CHECKING:
    from fastsskd.audio.info import BadClip
    from fastsskd.inference.listen import Heard, Listener
    from fastsskd.inference.loaded import Loaded
    from fastsskd.inference.sources import Source

MODEL_FILE = "model.safetensors"  # fastsskd.weights has it too, but brings torch with it
EVERY = 2.0
"""Seconds between two lines of progress."""
MOST_COUNTED = 100_000
"""Recordings that are listed before the first is heard, so that the time left is known."""


def add_arguments(parser: argparse.ArgumentParser, several: str) -> None:
    """Arguments of both commands; ``several`` says what several checkpoints mean."""
    parser.add_argument("--checkpoint", nargs="+", action="extend", required=True, metavar="C", help=several)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="audio in any format, a folder, a manifest, or - for stdin: audio, or paths, one a line",
    )
    parser.add_argument(
        "--window", type=float, default=None, metavar="S", help="seconds heard at a time; default: as in training"
    )
    parser.add_argument(
        "--hop",
        type=float,
        default=None,
        metavar="S",
        help="hear long recordings whole, in windows this many seconds apart (with --window alone: a window); "
        "otherwise their first window is heard, as in evaluation",
    )
    parser.add_argument("--batch_size", "--batch-size", type=positive, default=32, help="windows (default %(default)s)")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--workers", type=positive, default=None, help="threads that read; default: all cores")
    parser.add_argument("--quiet", action="store_true", help="no progress and no speed; bad files are still named")


def sort_out(args: argparse.Namespace) -> None:
    """Tell checkpoints from recordings: ``--checkpoint A B x.wav`` gives the option all three.

    The first is a checkpoint, and so is what looks like one after it.

    Raises:
        UsageError: nothing is left to hear.
    """
    count = 1
    while count < len(args.checkpoint) and _is_checkpoint(args.checkpoint[count]):
        count += 1
    args.files = args.checkpoint[count:] + args.files
    args.checkpoint = args.checkpoint[:count]
    if not args.files:
        raise UsageError(
            f"fastsskd {args.name}: give both a checkpoint and what to hear: --checkpoint C FILE ..., or - for stdin"
        )


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".safetensors") or (Path(name) / MODEL_FILE).is_file()


def make_listener(args: argparse.Namespace, loaded: Loaded, answer: Any, whole: bool) -> Listener:
    """The listener that the arguments describe, with the answers of ``answer``; ``whole``: of all of a recording."""
    from fastsskd.distributed import cores_per_rank
    from fastsskd.inference.listen import Listener

    return Listener(
        loaded.ears,
        answer,
        loaded.cut(args.window, args.hop, whole),
        device=loaded.device,
        batch_size=args.batch_size,
        workers=args.workers or cores_per_rank(),
    )


def load(args: argparse.Namespace) -> Loaded:
    """The checkpoints, on their device."""
    from fastsskd.inference.loaded import Loaded

    sort_out(args)
    return Loaded(args.checkpoint, device(args.device))


def sources(args: argparse.Namespace) -> tuple[Iterable[Source], int | None]:
    """The recordings, and how many; None where stdin will tell, or where they are too many to be held as a list."""
    from fastsskd.inference.sources import STDIN, find

    found = find(args.files)
    if STDIN in args.files:
        return found, None
    first = list(itertools.islice(found, MOST_COUNTED))
    return itertools.chain(first, found), len(first) if len(first) < MOST_COUNTED else None


class Account:
    """Counts what was heard; says how fast, and what is bad, on stderr.

    Args:
        num_files: to hear; None = not known.
        quiet: only what is bad.

    Attributes:
        bad: recordings that could not be used.
    """

    def __init__(self, num_files: int | None, quiet: bool):
        self._num_files, self._quiet = num_files, quiet
        self._done, self._seconds, self._in_part, self.bad = 0, 0.0, 0, 0
        self._begin = self._last = time.monotonic()
        self._current = 0.0  # seconds heard of the recording that is being heard
        self._first = 0.0  # when the first answer came: what is slow once is not slow for each

    def watch(self, answers: Iterable[Heard]) -> Iterator[Heard]:
        """The same answers; meanwhile says how far it is, within long recordings too."""
        for heard in answers:
            self._first = self._first or time.monotonic()
            self._current = 0.0 if heard.ends else heard.end
            now = time.monotonic()
            if now - self._last >= EVERY and not self._quiet:
                self._last = now
                print(self._line(now), file=sys.stderr, flush=True)
            yield heard

    def good(self, answers: Iterable[tuple[Source, Any | BadClip]]) -> Iterator[tuple[Source, Any]]:
        """The answers of the recordings that could be used; the others are named with their reason."""
        from fastsskd.audio.info import BadClip

        for source, answer in answers:
            self._done += 1
            if isinstance(answer, BadClip):
                self.bad += 1
                sys.stdout.flush()
                print(f"{source.name}: {answer}", file=sys.stderr, flush=True)
            else:
                yield source, answer

    def heard(self, seconds: float, goes_on: bool) -> None:
        """So many seconds of a recording were heard; whether it goes on after them."""
        self._seconds += seconds
        self._in_part += goes_on

    def finish(self) -> int:
        """Say how fast it was; the command's exit code."""
        sys.stdout.flush()
        if not self._quiet:
            took = max(time.monotonic() - self._begin, 1e-9)
            bad = f", {self.bad} could not be used" if self.bad else ""
            print(
                f"{self._done - self.bad} files, {self._seconds:.1f} s of audio in {took:.1f} s "
                f"({(self._done - self.bad) / took:.1f} files/s, {self._seconds / took:.0f} x real time){bad}",
                file=sys.stderr,
            )
            if self._in_part:
                print(
                    f"longer than a window: {self._in_part} of them, whose beginning was heard, as in evaluation; "
                    "--hop S hears them whole",
                    file=sys.stderr,
                )
        return 1 if self.bad else 0

    def _line(self, now: float) -> str:
        of, left = "", ""
        if self._num_files is not None:
            of = f"/{self._num_files}"
            each = (now - self._first) / max(self._done - 1, 1)
            left = f", {each * (self._num_files - self._done):.0f} s left" if self._done > 1 else ""
        seconds = self._seconds + self._current
        speed = seconds / (now - self._begin)
        return f"{self._done}{of} files, {seconds:.0f} s of audio ({speed:.0f} x real time), {self.bad} bad{left}"
