"""`fastsskd pack`: any audio of a manifest -> 16 kHz mono in tar shards, and the manifest of what is in them."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile

from fastsskd import __version__
from fastsskd.audio import ffmpeg as audio_ffmpeg
from fastsskd.audio.info import SAMPLE_RATE
from fastsskd.clip_columns import from_columns
from fastsskd.clip_table import PACKED, PACKED_MANIFEST, Manifest, one_chunk
from fastsskd.distributed import cores_per_rank
from fastsskd.errors import InputError
from fastsskd.pack.folder import (
    REJECTED,
    digest,
    has_result,
    open_folder,
    write_about,
    write_rejected,
    write_result,
)
from fastsskd.pack.job import Job
from fastsskd.pack.report import top_reasons
from fastsskd.pack.shards import remove_shards, shard_name

LAYOUT_VERSION = 1
READ_BY_LIBSNDFILE = ("wav", "wave", "flac", "ogg", "oga", "opus", "aif", "aiff", "aifc", "mp3")


@dataclass(frozen=True)
class Packed:
    """What has become of the clips.

    Attributes:
        out: the folder.
        manifest: the packed clips, in the input's order.
        rejected: reason by key of the others.
        num_shards, num_bytes: of the shards.
        hours: of sound in them.
        num_float32: clips stored as float32, asked for or because 16 bits would change them.
        was_complete: there was nothing left to do.
    """

    out: Path
    manifest: Manifest
    rejected: dict[str, str]
    num_shards: int
    num_bytes: int
    hours: float
    num_float32: int
    was_complete: bool

    def __str__(self) -> str:
        state = "was complete already" if self.was_complete else "is complete"
        lines = [
            f"{self.out} {state}: {len(self.manifest)} clips, {self.hours:.2f} hours, {self.num_bytes / 1e6:.0f} MB, "
            f"{self.num_shards} shards; open {self.out / PACKED_MANIFEST}"
        ]
        if self.num_float32:
            lines.append(f"{self.num_float32} clips are stored as float32")
        if self.rejected:
            lines.append(f"{len(self.rejected)} clips were rejected, see {self.out / REJECTED}:")
            lines += top_reasons(self.rejected.values())
        return "\n".join(lines)


def pack(
    manifest: Manifest,
    out: str | Path,
    *,
    encoding: str = "pcm16",
    shard_size: float = 1000.0,
    shuffle: int | None = None,
    workers: int = 0,
    max_bad_share: float | None = None,
    quiet: bool = False,
) -> Packed:
    """Pack all clips of a manifest, or go on where a killed job has stopped.

    Args:
        manifest: the clips; those marked bad are rejected with that reason.
        out: folder for the shards, see `pack_folder`.
        encoding: see `clip_encoding.encode`.
        shard_size: MB; a shard ends with the clip that brings it to this size.
        shuffle: seed of the order of the clips in the shards; None = the manifest's order.
        workers: threads, 0 = all cores.
        max_bad_share: stop when a larger share of the clips is bad; None = never.
        quiet: no progress on stderr.

    Raises:
        InputError: no clip or too few can be packed, the disk is full, the job was interrupted, or the folder belongs
            to another one. What is finished stays.
    """
    out, count = Path(out), len(manifest)
    order = np.arange(count) if shuffle is None else np.random.default_rng(shuffle).permutation(count)
    identity = {"version": LAYOUT_VERSION, "encoding": encoding, "shard_size": shard_size, "shuffle": shuffle}
    identity["input"] = digest(manifest, order)
    with open_folder(out, identity):
        job = Job(manifest, order, out, encoding=encoding, shard_size=shard_size, max_bad_share=max_bad_share)
        try:
            was_complete = not job.run(workers or cores_per_rank(), quiet) and has_result(out)
            packed = _result(job, manifest, out, was_complete)
            if not was_complete:
                remove_shards(out, job.number)  # of a time when the same clips gave more of them
                _write(out, identity, manifest, packed)
        except KeyboardInterrupt:
            raise InputError(f"{out}: interrupted: {job.how_to_go_on()}") from None
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error}): {job.how_to_go_on()}") from None
    return packed


def num_unreadable(manifest: Manifest) -> int:
    """Clips whose name tells that FFmpeg is needed, where it is not installed."""
    if audio_ffmpeg.is_installed():
        return 0
    directly = pc.match_substring_regex(manifest.materialise()["path"], rf"(?i)\.(?:{'|'.join(READ_BY_LIBSNDFILE)})$")
    return len(manifest) - pc.sum(directly).as_py()


def _result(job: Job, manifest: Manifest, out: Path, was_complete: bool) -> Packed:
    rows = np.flatnonzero(job.shard >= 0)
    rejected = {manifest.key(row): job.rejected[row] for row in sorted(job.rejected)}
    if not len(rows):
        write_rejected(out, rejected)
        remove_shards(out, 0)  # so that the same command tries again
        (reason, *_) = top_reasons(rejected.values())
        raise InputError(
            f"{out}: none of {len(manifest)} clips can be packed, most often because: {reason.split(maxsplit=1)[1]}; "
            f"see {out / REJECTED}"
        )
    table = manifest.select(rows).materialise()
    names = pa.array([shard_name(number) for number in range(job.num_shards)])
    packed = from_columns(
        names.take(pa.array(job.shard[rows])),
        root=out,
        keys=table["key"],
        labels=one_chunk(table["labels"]),
        classes=manifest.classes,
        multi_label=manifest.multi_label,
        folds=table["fold"],
        splits=table["split"],
        offsets=job.offset[rows],
        sizes=job.size[rows],
        source=PACKED,
        absent=manifest.absent,
    )
    return Packed(
        out,
        packed.replace(num_absent=manifest.num_absent),
        rejected,
        job.num_shards,
        job.num_bytes,
        job.num_samples / SAMPLE_RATE / 3600,
        job.num_float32,
        was_complete,
    )


def _write(out: Path, identity: dict, manifest: Manifest, packed: Packed) -> None:
    versions = {"fastsskd": __version__, "numpy": np.__version__, "libsndfile": soundfile.__libsndfile_version__}
    versions["av"] = importlib.metadata.version("av") if audio_ffmpeg.is_installed() else None
    facts = {
        "status": "complete",
        "fingerprint": manifest.fingerprint(),
        "num_clips": len(packed.manifest),
        "num_rejected": len(packed.rejected),
        "num_float32": packed.num_float32,
        "num_shards": packed.num_shards,
        "num_bytes": packed.num_bytes,
        "hours": packed.hours,
        "versions": versions,
    }
    write_rejected(out, packed.rejected)
    write_about(out, identity, facts)
    write_result(out, packed.manifest)
