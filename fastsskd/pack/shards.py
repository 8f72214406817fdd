"""Tar shards as the WebDataset package reads them, written so that no half of one is ever seen.

A sample is two or three members that follow each other: `<stem>.wav` (or `.flac`), `<stem>.json` and, where a clip has
one class, `<stem>.cls`. Beside the shards, in `.pack/`, lies an index of each: what is in it and where. The index is
written first and the shard renamed into place last, so a shard is finished if and only if both are there and agree.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastsskd import durable
from fastsskd.layouts.files_present import AUDIO_SUFFIXES

WORK = ".pack"
"""Folder beside the shards for indexes and what is not finished."""
BUFFER = 1 << 20


@dataclass
class ShardIndex:
    """What is in a shard.

    Attributes:
        begin: place in the job's order of the first clip that was looked at for this shard.
        rows: of the manifest, in the shard's order.
        offsets, sizes: bytes: where in the shard each row's audio file lies.
        rejected: reason by row of the clips that were looked at and are not in.
        num_samples: of all its clips. num_float32: clips stored as float32.
        tar_size: bytes of the shard; 0 = none of its clips was good, and there is no shard.
    """

    begin: int
    rows: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    num_samples: int = 0
    num_float32: int = 0
    tar_size: int = 0

    @property
    def end(self) -> int:
        """Place in the order of the next shard's first clip."""
        return self.begin + len(self.rows) + len(self.rejected)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def member_stems(keys: pa.Array) -> pa.Array:
    """Names in the tar, without suffix: unique, and such that a reader finds the suffix behind their only dot.

    The key without an audio file's suffix and without `/` at its ends; dots and control characters become `_`; where
    two would be equal, `-` and the clip's row are added.

    Args:
        keys: (n,) unique strings.

    Returns:
        (n,) strings.
    """
    suffixes = "|".join(sorted(suffix[1:] for suffix in AUDIO_SUFFIXES))
    stems = pc.replace_substring_regex(keys, rf"(?i)\.(?:{suffixes})$", "")
    stems = pc.utf8_trim(pc.replace_substring_regex(stems, r"[\x00-\x1f\x7f.]", "_"), "/")
    # Readers pass over folders that are called __so__.
    stems = pc.replace_substring_regex(stems, r"^__+([^/]*__/)", r"_\1")
    stems = pc.if_else(pc.equal(stems, ""), "clip", stems)
    rows = pa.array(np.arange(len(stems))).cast(pa.string())
    while True:
        codes = stems.dictionary_encode().indices.to_numpy()
        twice = np.bincount(codes)[codes] > 1
        if not twice.any():
            return stems
        stems = pc.if_else(pa.array(twice), pc.binary_join_element_wise(stems, rows, "-"), stems)


class ShardWriter:
    """One shard being written.

    Args:
        out: folder of the shards.
        number: of this shard.

    Attributes:
        size: bytes of the shard so far.
    """

    def __init__(self, out: Path, number: int):
        self._out, self._number = out, number
        self._temporary = out / WORK / f"{shard_name(number)}.tmp"
        self._file = open(self._temporary, "wb", buffering=BUFFER)  # noqa: SIM115
        self.size = 0

    def add(self, name: str, size: int, chunks: Iterable[bytes]) -> int:
        """Append a member of `size` bytes; returns its first byte's place in the shard."""
        member = tarfile.TarInfo(name)  # owner, group and time are 0: equal clips make equal shards
        member.size = size
        header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        self._file.write(header)
        for chunk in chunks:
            self._file.write(chunk)
        self._file.write(bytes(-size % tarfile.BLOCKSIZE))
        start = self.size + len(header)
        self.size = start + size + -size % tarfile.BLOCKSIZE
        return start

    def commit(self, index: ShardIndex) -> None:
        """Finish the shard and say how large it is in `index`; one without a member leaves an index alone."""
        is_empty = not self.size
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        index.tar_size = 0 if is_empty else self._file.tell()
        self._file.close()
        write_whole(self._out, _index_path(self._out, self._number), json.dumps(asdict(index)))
        if is_empty:
            self._temporary.unlink()
        else:
            os.replace(self._temporary, self._out / shard_name(self._number))
        durable.sync(self._out)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the disk is full: what is still buffered is not wanted any more
            self._file.close()


def read_index(out: Path, number: int) -> ShardIndex | None:
    """The index of a finished shard; None if it is not finished or was touched."""
    try:
        fields = json.loads(_index_path(out, number).read_text(encoding="utf-8"))
        rejected = {int(row): reason for row, reason in fields.pop("rejected").items()}
        index = ShardIndex(rejected=rejected, **fields)
        there = os.path.getsize(out / shard_name(number)) if index.tar_size else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if there == index.tar_size else None


def remove_shards(out: Path, first: int) -> None:
    """Remove the shards from number `first` on, and that they were finished."""
    for number in itertools.count(first):
        paths = _index_path(out, number), out / shard_name(number)
        if not any(path.exists() for path in paths):
            return
        for path in paths:
            path.unlink(missing_ok=True)


def write_whole(out: Path, path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; `path` lies on the disk of `out`."""
    durable.write_text(path, text, out / WORK / f"{path.name}.tmp")


def _index_path(out: Path, number: int) -> Path:
    return out / WORK / f"{shard_name(number)}.json"
