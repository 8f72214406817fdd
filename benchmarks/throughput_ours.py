"""Our loader, DALI's own features, and the baselines: how fast the stages of a loader are on their own.

Generators of batches as in ``throughput_peers.py``. A baseline gives no features, only which clips were done.
"""

import os
import threading
from collections.abc import Iterator

import numpy as np
import soundfile
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from throughput_peers import BINS, FRAMES, MEAN, PART, RATE, SAMPLES, STD, WINDOW, Job, Made, threaded

import fastsskd_kernels as kernels
from fastsskd import manifest
from fastsskd.clip_bytes import ShardFiles
from fastsskd.clip_reader import ClipReader, Crop, Window
from fastsskd.loader import Loader

OWN = threading.local()  # each thread's reader and memory


def ours(job: Job) -> Iterator[Made]:
    """``fastsskd.loader.Loader``: fbank and HOG."""
    ids = job.source["ids"]
    loader = Loader(
        job.source["manifest"], batch_size=job.batch, seconds=10.0, train=not job.fixed, seed=0, workers=job.workers
    )
    while True:
        for batch in loader:
            yield Made(batch.fbank, [ids[row % len(ids)] for row in batch.index.tolist()], batch.hog)
        if loader.skipped:
            raise SystemExit(f"the loader left clips out: {loader.skipped}")


def dali(job: Job) -> Iterator[Made]:
    """DALI's own pipeline and features, which are not Kaldi's: no DC removal, other mel filters."""

    @pipeline_def(batch_size=job.batch, num_threads=job.workers, device_id=None)
    def pipeline():
        audio, clip = dali_decoded(job, sample_rate=RATE)
        short = job.source.get("seconds", 10) < 10
        audio = fn.slice(fn.cat(audio, audio) if short else audio, 0, SAMPLES, axes=[0], out_of_bounds_policy="pad")
        audio = fn.preemphasis_filter(audio, preemph_coeff=0.97)
        power = fn.spectrogram(
            audio, nfft=512, window_length=400, window_step=160, center_windows=False, window_fn=WINDOW.tolist()
        )
        mel = fn.mel_filter_bank(
            power, sample_rate=RATE, nfilter=BINS, freq_low=20.0, normalize=False, mel_formula="htk"
        )
        fbank = fn.to_decibels(mel, multiplier=np.log(10), reference=1.0, cutoff_db=-15.942385)  # natural logarithm
        fbank = fn.pad(fn.transpose(fbank, perm=[1, 0]), axes=[0], shape=[FRAMES], fill_value=0)
        return (fbank - MEAN) / (2 * STD), clip

    for (batch,) in DALIGenericIterator([pipeline()], ["fbank", "clip"]):
        yield Made(batch["fbank"], batch["clip"][:, 0].tolist())


def decode_dali(job: Job) -> Iterator[Made]:
    """DALI's reader and audio decoder, nothing else."""

    @pipeline_def(batch_size=job.batch, num_threads=job.workers, device_id=None)
    def pipeline():
        return dali_decoded(job)

    pipe = pipeline()
    pipe.build()
    while True:
        _, clips = pipe.run()
        yield Made(None, clips.as_array()[:, 0].tolist())


def dali_decoded(job: Job, **options):
    """Mono samples and numbers of the clips, in random order."""
    files = job.source["files"]
    encoded, clip = fn.readers.file(files=files, labels=list(range(len(files))), random_shuffle=True, name="clips")
    audio, _ = fn.decoders.audio(encoded, downmix=True, dtype=types.FLOAT, **options)
    return audio, clip


def decode_ours(job: Job) -> Iterator[Made]:
    """What our loader reads and decodes with: a kernel for FLAC, DALI for the rest, one a thread."""
    clips = manifest.load(job.source["manifest"])
    yield from threaded(lambda part: [None for _ in decode(part, clips)], job)


def decode_resample(job: Job) -> Iterator[Made]:
    """The same, then our resampler and loop."""
    clips = manifest.load(job.source["manifest"])

    def work(part: list[int]) -> list[None]:
        for done in decode(part, clips):
            kernels.resample_crop_or_loop(done.samples, done.rate, SAMPLES)
        return [None] * len(part)

    yield from threaded(work, job)


def decode(part: list[int], clips: manifest.Manifest) -> Iterator[Window]:
    """Whole clips, decoded by this thread's own reader."""
    if not hasattr(OWN, "reader"):
        OWN.reader = ClipReader(clips, ShardFiles(clips.root), PART)
    for _, clip in OWN.reader.read(part, [Crop(None)] * len(part)):
        if not isinstance(clip, Window):
            raise SystemExit(f"cannot be decoded: {clip}")
        yield clip


def decode_soundfile(job: Job) -> Iterator[Made]:
    """libsndfile in threads."""
    yield from each(lambda clip: soundfile.read(job.source["files"][clip], dtype="float32"), job)


def read_files(job: Job) -> Iterator[Made]:
    """Bytes of the files, in random order."""
    yield from each(lambda clip: np.fromfile(job.source["files"][clip], np.uint8), job)


def read_shards(job: Job) -> Iterator[Made]:
    """Bytes of the clips in our shards, in random order: plain ``pread`` into memory used again."""
    clips = manifest.load(job.source["once"])
    descriptors = {path: os.open(path, os.O_RDONLY) for path in job.source["shards"]}
    extents = [(descriptors[str(clips.path(i))], *clips.extent(i)) for i in range(len(clips))]

    def read(clip: int) -> None:
        descriptor, offset, size = extents[clip]
        if len(getattr(OWN, "memory", b"")) < size:
            OWN.memory = bytearray(size)
        os.preadv(descriptor, [memoryview(OWN.memory)[:size]], offset)

    yield from each(read, job)


def fbank_only(job: Job) -> Iterator[Made]:
    """Our fbank of waveforms that lie in memory."""
    waves = waveforms(job)
    yield from each(lambda clip: kernels.fbank(waves[clip : clip + 1]), job)


def features_only(job: Job) -> Iterator[Made]:
    """Our fbank, padded and normalised, and HOG, of waveforms that lie in memory, into memory used again."""
    waves = waveforms(job)

    def features(clip: int) -> None:
        if not hasattr(OWN, "out"):
            OWN.out = kernels.features(waves[clip : clip + 1])
        kernels.features(waves[clip : clip + 1], out=OWN.out)

    yield from each(features, job)


def waveforms(job: Job) -> torch.Tensor:
    """(clips, 160000) float32."""
    return torch.from_numpy(np.stack([soundfile.read(file, dtype="float32")[0] for file in job.source["files"]]))


def each(work, job: Job) -> Iterator[Made]:
    """Do something to each clip, in threads; give numbers of clips, batch by batch."""

    def part(clips: list[int]) -> list[None]:
        for clip in clips:
            work(clip)
        return [None] * len(clips)

    yield from threaded(part, job)
