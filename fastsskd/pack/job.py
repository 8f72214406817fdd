"""The work of `fastsskd pack`: threads that pack clips some way ahead, and one writer that puts them into shards.

A shard ends with the clip that fills it, and the next goes on with the clip after that one. So what is in which shard
follows from the manifest and the options, whatever the number of threads, and however often the job was killed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastsskd.audio.info import SAMPLE_RATE, BadClip
from fastsskd.clip_table import SPLIT_EVAL, SPLIT_TRAIN, WHOLE_FILE, Manifest, one_chunk
from fastsskd.errors import InputError
from fastsskd.pack.clip import ClipPacker, PackedClip
from fastsskd.pack.folder import remove_result
from fastsskd.pack.report import Progress
from fastsskd.pack.shards import WORK, ShardIndex, ShardWriter, member_stems, read_index

AHEAD = 8
"""Clips for each thread that may wait for the writer: one long recording must not make the others wait."""
FEW_CLIPS = 100
"""The share of bad clips means nothing before this many."""
SPLIT_NAMES = {SPLIT_TRAIN: "train", SPLIT_EVAL: "eval"}


class Job:
    """One run of the command.

    Args:
        manifest: the clips.
        order: (n,) rows of the manifest, in the shards' order.
        out: folder of the shards.
        encoding: see `clip_encoding.encode`.
        shard_size: MB, see `pack.pack`.
        max_bad_share: see `pack.pack`.

    Attributes:
        done: clips of the order that finished shards account for.
        number: of the next shard.
        num_shards, num_bytes, num_samples, num_float32: of the finished shards; one without a clip does not count.
        shard, offset, size: (n,) for each row of the manifest: its shard (-1 = in none), its place in there (bytes).
        rejected: reason by row.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: np.ndarray,
        out: Path,
        *,
        encoding: str,
        shard_size: float,
        max_bad_share: float | None,
    ):
        self._manifest, self._order, self._out = manifest, order, out
        self._shard_bytes, self._max_bad_share = shard_size * 1e6, max_bad_share
        self._packer = ClipPacker(manifest, encoding, out / WORK)
        table = manifest.materialise()
        self._stems, self._paths = member_stems(one_chunk(table["key"])), one_chunk(table["path"])
        self.done = self.number = self.num_shards = self.num_bytes = self.num_samples = self.num_float32 = 0
        self.shard = np.full(len(manifest), -1)
        self.offset, self.size = np.zeros((2, len(manifest)), np.int64)
        self.rejected: dict[int, str] = {}

    def run(self, workers: int, quiet: bool = False) -> bool:
        """Make the shards that are not there; returns whether there were any.

        Raises:
            InputError: too many clips are bad, or the data set is gone. OSError: the disk is full.
        """
        made, clips, progress = False, None, None
        pool = ThreadPoolExecutor(workers, thread_name_prefix="fastsskd-pack")
        try:
            while self.done < len(self._order):
                index = read_index(self._out, self.number)
                if index is None or index.begin != self.done:
                    if not made:
                        remove_result(self._out)
                        made, progress = True, Progress(len(self._order), self.done, quiet=quiet)
                    clips = clips or self._packed_clips(pool, AHEAD * workers)
                    index = self._write_shard(clips, progress)
                elif clips is not None:  # someone has removed a shard in the middle, and this one is still there
                    clips.close()
                    clips = None
                self._add(index)
        finally:
            self._packer.stop.set()
            pool.shutdown(cancel_futures=True)
            if progress is not None:
                progress.end()
        return made

    def how_to_go_on(self) -> str:
        """For an error that is not the end."""
        return f"{self.done} of {len(self._order)} clips are in finished shards; run the same command again to go on"

    def _add(self, index: ShardIndex) -> None:
        self.shard[index.rows] = self.number
        self.offset[index.rows], self.size[index.rows] = index.offsets, index.sizes
        self.rejected |= index.rejected
        self.done, self.number = index.end, self.number + 1
        self.num_shards += bool(index.tar_size)
        self.num_bytes += index.tar_size
        self.num_samples += index.num_samples
        self.num_float32 += index.num_float32

    def _packed_clips(self, pool: ThreadPoolExecutor, ahead: int) -> Generator[tuple[int, PackedClip | BadClip]]:
        """Row and result of each clip to come, in order; `ahead` of them are at work or wait."""
        waiting: deque = deque()
        try:
            for row in self._order[self.done :].tolist():
                waiting.append((row, pool.submit(self._packer.pack, row)))
                if len(waiting) > ahead:
                    row, job = waiting.popleft()
                    yield row, job.result()
            while waiting:
                row, job = waiting.popleft()
                yield row, job.result()
        finally:
            for _, job in waiting:
                job.cancel()

    def _write_shard(self, clips: Generator[tuple[int, PackedClip | BadClip]], progress: Progress) -> ShardIndex:
        """The next shard, from the clips to come."""
        index, writer = ShardIndex(self.done), ShardWriter(self._out, self.number)
        try:
            for row, clip in clips:
                if isinstance(clip, BadClip):
                    index.rejected[row] = str(clip)
                    progress.clip(None)
                    self._refuse_too_many(index)
                    continue
                index.rows.append(row)
                index.offsets.append(self._write_sample(writer, row, clip))
                index.sizes.append(clip.encoded.size)
                index.num_samples += clip.encoded.num_samples
                index.num_float32 += clip.encoded.is_float
                progress.clip(clip.encoded.size)
                if writer.size >= self._shard_bytes:
                    break
            writer.commit(index)
        except BaseException:
            writer.discard()
            raise
        return index

    def _write_sample(self, writer: ShardWriter, row: int, clip: PackedClip) -> int:
        """Write a clip's members; returns where its audio lies."""
        manifest, stem, encoded = self._manifest, self._stems[row].as_py(), clip.encoded
        labels = manifest.labels(row)
        about = {
            "key": manifest.key(row),
            "labels": [manifest.classes[label] for label in labels],
            "seconds": encoded.num_samples / SAMPLE_RATE,
            "source": self._paths[row].as_py(),
            "format": clip.source.format,
            "sample_rate": clip.source.sample_rate,
            "channels": clip.source.channels,
        }
        start, end = manifest.segment(row)
        about |= {"start": start, "end": end} if (start, end) != WHOLE_FILE else {}
        about |= {"fold": int(manifest.folds[row])} if manifest.folds[row] else {}
        about |= {"split": SPLIT_NAMES[manifest.splits[row]]} if manifest.splits[row] else {}
        with encoded.file as file:
            offset = writer.add(f"{stem}.{encoded.suffix}", encoded.size, file.chunks())
        text = json.dumps(about, ensure_ascii=False).encode()
        writer.add(f"{stem}.json", len(text), [text])
        if len(labels) and not manifest.multi_label:
            text = b"%d" % labels[0]
            writer.add(f"{stem}.cls", len(text), [text])
        return offset

    def _refuse_too_many(self, index: ShardIndex) -> None:
        seen, bad = index.end, len(self.rejected) + len(index.rejected)
        if self._max_bad_share is None or seen < min(FEW_CLIPS, len(self._order)) or bad <= self._max_bad_share * seen:
            return
        row, reason = next(iter((self.rejected | index.rejected).items()))
        raise InputError(
            f"{bad} of {seen} clips are bad, more than --max_bad_share {self._max_bad_share:g} (first: "
            f"{self._manifest.key(row)}: {reason}): see to them, or run the same command with a larger share"
        )
