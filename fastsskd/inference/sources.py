"""What a user names to be heard -> recordings: files, folders, manifests, stdin; or samples in memory.

a.wav                   one recording, in any format that `fastsskd pack` reads
folder                  every audio file below it; of a packed folder or one of tar shards, its clips
clips.manifest, .csv, .json, .tar    the clips of a list, with their segments
-                       stdin: audio, or a list of paths, one a line; told by its first bytes
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

import fastsskd_kernels as kernels
from fastsskd import manifest
from fastsskd.audio.any_format import AnyAudio, resampled
from fastsskd.audio.info import MAX_CHANNELS, MAX_RATE, MIN_RATE, BadClip
from fastsskd.clip_table import ALL_BYTES, PACKED_MANIFEST, WHOLE_FILE, Manifest
from fastsskd.errors import InputError
from fastsskd.layouts import index as layouts
from fastsskd.layouts.files_present import scan_audio
from fastsskd.pack.clip import MARKED_FOR_PACK

LISTS = (".csv", ".json", ".tar", ".manifest")
"""Suffixes of lists of clips; a manifest is known by its first bytes too."""
STDIN = "-"
HEAD = 64
"""Bytes that tell audio on stdin from text."""


class Source(Protocol):
    """A recording that can be heard."""

    @property
    def name(self) -> str:
        """What answers call it: the path as the user gave it, or a clip's key."""

    def open(self) -> Iterator[np.ndarray]:
        """The samples at 16 kHz, mono, ``(S,)`` float32, block by block.

        Raises:
            BadClip: it cannot be used. OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Recording:
    """A recording in a file.

    Attributes:
        name: see :class:`Source`.
        path: the file.
        extent: of the recording's own file in it, see ``Manifest.extent``.
        segment: start and end in seconds, see ``Manifest.segment``.
        bad: why it must not be used; "" = it may.
        keep: what must live as long as the file is needed.
    """

    name: str
    path: Path
    extent: tuple[int, int] = ALL_BYTES
    segment: tuple[float, float] = WHOLE_FILE
    bad: str = ""
    keep: Any = None

    def open(self) -> Iterator[np.ndarray]:
        """See :class:`Source`."""
        if self.bad:
            raise BadClip(self.bad)
        audio = AnyAudio(self.path, *self.extent)
        yield from resampled(audio.blocks(*self.segment), audio.rate)


@dataclass(frozen=True)
class Samples:
    """A recording in memory.

    Attributes:
        name: see :class:`Source`.
        samples: ``(S,)`` or ``(S, channels)``: float in [-1, 1), or int16.
        rate: Hz.
    """

    name: str
    samples: np.ndarray
    rate: int

    def open(self) -> Iterator[np.ndarray]:
        """See :class:`Source`."""
        values = np.asarray(self.samples)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or not 1 <= values.shape[1] <= MAX_CHANNELS or not len(values):
            raise BadClip(f"samples of shape {np.shape(self.samples)}; give (S,) or (S, channels)")
        if values.dtype != np.int16 and values.dtype.kind != "f":
            raise BadClip(f"samples of type {values.dtype}; give floats in [-1, 1), or int16")
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise BadClip(f"sampling rate {self.rate} Hz, outside {MIN_RATE}..{MAX_RATE}")
        if not np.isfinite(values).all():
            raise BadClip("NaN or infinite samples")
        mono = kernels.downmix(values if values.dtype == np.int16 else values.astype(np.float32, copy=False))
        yield from resampled(iter([mono]), self.rate)


def find(arguments: Iterable[str | Path]) -> Iterator[Recording]:
    """The recordings that the arguments name, in their order.

    What cannot be read as a folder or list comes as one recording that is ``bad``, so that the others are still heard.
    """
    for argument in arguments:
        if str(argument) == STDIN:
            yield from _from_stdin(sys.stdin.buffer)
        else:
            yield from _from_path(str(argument))


def _from_path(name: str) -> Iterator[Recording]:
    path = Path(name)
    try:
        if not name:
            yield Recording(name, path, bad="an empty name; give a file, a folder, a manifest, or - for stdin")
        elif path.is_dir():
            yield from _from_folder(name, path)
        elif path.is_file() and _is_list(path):
            yield from _clips(layouts.build(path))
        else:
            yield Recording(name, path)
    except InputError as error:
        yield Recording(name, path, bad=str(error).removeprefix(f"{name}: "))
    except OSError as error:
        yield Recording(name, path, bad=f"cannot be read: {error.strerror or error}")


def _from_folder(name: str, path: Path) -> Iterator[Recording]:
    files = [] if (path / PACKED_MANIFEST).exists() else scan_audio(path)
    if not files:
        yield from _clips(layouts.build(path))  # packed, tar shards; or it says what is there instead of audio
    for file in files:
        yield Recording(os.path.join(name, file), path / file)


def _clips(table: Manifest) -> Iterator[Recording]:
    """A manifest's clips, named by their keys."""
    for i in range(len(table)):
        bad = "" if MARKED_FOR_PACK in table.bad(i) else table.bad(i)
        yield Recording(table.key(i), table.path(i), table.extent(i), table.segment(i), bad)


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix.lower() in LISTS or file.read(len(manifest.ARROW_MAGIC)) == manifest.ARROW_MAGIC


def _from_stdin(stream: BinaryIO) -> Iterator[Recording]:
    head = stream.read(HEAD)
    if not head:
        yield Recording(STDIN, Path(STDIN), bad="nothing came on stdin; pipe in audio, or paths, one a line")
    elif all(byte >= 32 or byte in b"\t\r\n" for byte in head):  # no audio file begins so
        lines = head.split(b"\n")
        lines[-1] += stream.readline()
        for line in itertools.chain(lines, stream):
            if name := line.strip(b"\r\n"):
                yield from _from_path(os.fsdecode(name))
    else:
        # Gone from the disk when nobody refers to it any more.
        file = tempfile.NamedTemporaryFile(prefix="fastsskd-")  # noqa: SIM115
        file.write(head)
        shutil.copyfileobj(stream, file)
        file.flush()
        yield Recording(STDIN, Path(file.name), keep=file)
