"""The loaders people use today, each the way its own documentation has it: (job) -> endless stream of batches.

This module runs in an environment of its own (``peers.txt``) and imports nothing of ours. Each function is a generator
of :class:`Made`: 32 clips' Kaldi fbank, 10 s, 128 bins, padded to 1024 frames, normalised as AST does.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from torchaudio.compliance import kaldi

RATE, SAMPLES, FRAMES, BINS = 16_000, 160_000, 1024, 128
PART = 4  # clips that a thread takes at a time
MEAN, STD = -4.2677393, 4.5689974
WINDOW = torch.hann_window(400, periodic=False)
BANKS = torch.nn.functional.pad(kaldi.get_mel_banks(BINS, 512, RATE, 20.0, 0.0, 100.0, -500.0, 1.0)[0], (0, 1)).T


class Made(NamedTuple):
    """A batch: features, whose clips they are, and HOG where the loader makes that too."""

    fbank: torch.Tensor | None
    ids: list[int]
    hog: torch.Tensor | None = None


class Job(NamedTuple):
    """What to load and how."""

    source: dict
    workers: int
    batch: int
    fixed: bool = False  # crops and loops begin at the start of the file, for comparing outputs


def loop_to_length(waveform: torch.Tensor) -> torch.Tensor:
    """(S,) at 16 kHz -> (160000,): the first 10 s, a shorter clip again and again."""
    return waveform.repeat(-(-SAMPLES // len(waveform)))[:SAMPLES]


def torchaudio_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """(S,) -> (T, 128), as in AST's dataloader."""
    return kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=BINS,
        dither=0.0,
        frame_shift=10,
    )


def kaldi_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """The same numbers from fewer operations, (S,) -> (T, 128): the best plain torch we found.

    A clip at a time: a whole batch at once, which looks like the thing to do, leaves the cache and takes up to four
    times as long.
    """
    frames = waveform.unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = torch.cat([frames[:, :1] * 0.03, frames[:, 1:] - 0.97 * frames[:, :-1]], 1) * WINDOW
    power = torch.fft.rfft(frames, 512).abs().square()
    return (power @ BANKS).clamp_min(torch.finfo(torch.float32).eps).log()


def normalise(fbank: torch.Tensor) -> torch.Tensor:
    """(T, 128) -> (1024, 128), zero-padded before normalisation."""
    return (torch.nn.functional.pad(fbank, (0, 0, 0, FRAMES - len(fbank))) - MEAN) / (2 * STD)


def read_soundfile(path: str) -> torch.Tensor:
    """libsndfile, mean of the channels, torchaudio's resampler."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torchaudio.functional.resample(torch.from_numpy(samples.mean(1)), rate, RATE)


def read_soundfile_soxr(path: str) -> torch.Tensor:
    """libsndfile, mean of the channels, soxr's resampler, which is quicker than torchaudio's."""
    import soxr

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(soxr.resample(samples.mean(1), rate, RATE))


def read_torchcodec(path: str) -> torch.Tensor:
    """FFmpeg, resampler included."""
    from torchcodec.decoders import AudioDecoder

    return AudioDecoder(path, sample_rate=RATE, num_channels=1).get_all_samples().data[0]


class Clips(torch.utils.data.Dataset):
    """AST's dataset: read, fbank, pad, normalise, clip by clip."""

    def __init__(self, source: dict, read):
        self.files, self.repeats, self.read = source["files"], source["repeats"], read

    def __len__(self) -> int:
        return len(self.files) * self.repeats

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        clip = row % len(self.files)
        return normalise(torchaudio_fbank(loop_to_length(self.read(self.files[clip])))), clip


def torch_loader(dataset, job: Job, **options) -> Iterator[Made]:
    """PyTorch's DataLoader, workers kept from epoch to epoch."""
    options = {"batch_size": job.batch, "shuffle": True, "drop_last": True} | options
    loader = torch.utils.data.DataLoader(dataset, num_workers=job.workers, persistent_workers=True, **options)
    while True:
        for fbank, clips in loader:
            yield Made(fbank, clips.tolist())


def ast(job: Job) -> Iterator[Made]:
    """soundfile and torchaudio's fbank in a DataLoader: the recipe of AST and of most that came after it."""
    yield from torch_loader(Clips(job.source, read_soundfile), job)


def torchcodec(job: Job) -> Iterator[Made]:
    """The same with torchcodec, which torchaudio's own ``load`` calls by now."""
    import torchcodec.decoders  # noqa: F401  says at once whether it is there

    yield from torch_loader(Clips(job.source, read_torchcodec), job)


def huggingface(job: Job) -> Iterator[Made]:
    """``datasets``: an Audio column, features made on access."""
    import datasets

    clips = list(range(len(job.source["files"]))) * job.source["repeats"]
    table = datasets.Dataset.from_dict({"audio": job.source["files"] * job.source["repeats"], "clip": clips})
    table = table.cast_column("audio", datasets.Audio(sampling_rate=RATE, num_channels=1))

    def features(rows: dict) -> dict:
        waves = [audio.get_all_samples().data[0] for audio in rows["audio"]]
        return {"fbank": [normalise(torchaudio_fbank(loop_to_length(w))) for w in waves], "clip": rows["clip"]}

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([row["fbank"] for row in rows]), torch.tensor([row["clip"] for row in rows])

    yield from torch_loader(table.with_transform(features), job, collate_fn=collate)


def webdataset(job: Job) -> Iterator[Made]:
    """Tar shards drawn at random, shuffled in a buffer, decoded by webdataset's own ``torch_audio`` handler."""
    import torchcodec.decoders  # noqa: F401  what torchaudio, which the handler calls, decodes with
    import webdataset as wds

    yield from webdataset_decoded_by(wds.torch_audio, job)


def webdataset_soundfile(job: Job) -> Iterator[Made]:
    """The same, but libsndfile decodes, from memory: its own handler writes a temporary file for each clip."""

    def handler(key: str, data: bytes) -> tuple[torch.Tensor, int] | None:
        if not key.endswith((".flac", ".wav")):
            return None
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T), rate

    yield from webdataset_decoded_by(handler, job)


def webdataset_decoded_by(handler, job: Job) -> Iterator[Made]:
    import webdataset as wds

    def features(sample: tuple) -> tuple[torch.Tensor, int]:
        (waveform, rate), clip = sample
        waveform = torchaudio.functional.resample(waveform.mean(0), rate, RATE)
        return normalise(torchaudio_fbank(loop_to_length(waveform))), clip

    samples = wds.WebDataset(job.source["shards"], resampled=True, shardshuffle=False).shuffle(200).decode(handler)
    batches = samples.to_tuple("flac;wav", "cls").map(features).batched(job.batch)
    for fbank, clips in wds.WebLoader(batches, batch_size=None, num_workers=job.workers):
        yield Made(fbank, clips.tolist())


def lhotse(job: Job) -> Iterator[Made]:
    """Cuts, a sampler that makes batches, lhotse's own Kaldi fbank on the fly.

    Clip by clip: ``OnTheFlyFeatures`` by default computes a batch at once, which leaves the cache and takes three times
    as long.
    """
    from lhotse import CutSet, Fbank, FbankConfig, Recording
    from lhotse.dataset import DynamicCutSampler, OnTheFlyFeatures

    settings = FbankConfig(window_type="hanning", snip_edges=True, num_filters=BINS, high_freq=0.0)
    make = OnTheFlyFeatures(Fbank(settings), wave_transforms=[loop_to_length], use_batch_extract=False)

    class Tagging(torch.utils.data.Dataset):
        def __getitem__(self, cuts) -> tuple[torch.Tensor, torch.Tensor]:
            fbanks, _ = make(cuts)
            clips = [int(cut.recording_id) for cut in cuts]
            return torch.stack([normalise(fbank) for fbank in fbanks]), torch.tensor(clips)

    recordings = [Recording.from_file(file, recording_id=str(clip)) for clip, file in enumerate(job.source["files"])]
    cuts = CutSet.from_cuts(recording.to_cut().resample(RATE) for recording in recordings)
    sampler = DynamicCutSampler(cuts.repeat(), max_cuts=job.batch, shuffle=True)
    options = {"batch_size": None, "sampler": sampler, "shuffle": None, "drop_last": False}
    yield from torch_loader(Tagging(), job, **options)


def spdl(job: Job) -> Iterator[Made]:
    """A pipeline of threads; FFmpeg decodes and resamples, outside the GIL."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    to_mono = spdl.io.get_audio_filter_desc(sample_rate=RATE, num_channels=1, sample_fmt="fltp")

    def features(clip: int) -> tuple[torch.Tensor, int]:
        audio = spdl.io.to_torch(spdl.io.load_audio(job.source["files"][clip], filter_desc=to_mono))[0]
        return normalise(kaldi_fbank(loop_to_length(audio))), clip

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled(len(job.source["files"])))
        .pipe(features, concurrency=job.workers)
        .aggregate(job.batch)
        .pipe(collate)
        .add_sink(4)
        .build(num_threads=job.workers)
    )
    with pipeline.auto_stop():
        yield from pipeline


def threads(job: Job) -> Iterator[Made]:
    """Nobody's loader: what one could write in an afternoon. soundfile and soxr in threads, the quicker torch fbank."""

    def features(clip: int) -> torch.Tensor:
        return normalise(kaldi_fbank(loop_to_length(read_soundfile_soxr(job.source["files"][clip]))))

    yield from threaded(lambda clips: [features(clip) for clip in clips], job)


def threaded(work, job: Job) -> Iterator[Made]:
    """Batches of what threads make of the clips, a few batches ahead; ``work`` takes a few clips at a time."""
    clips = shuffled(job.source["clips"])
    with ThreadPoolExecutor(job.workers) as pool:
        ahead = []
        while True:
            while len(ahead) < 4:
                batch = [next(clips) for _ in range(job.batch)]
                parts = [batch[start : start + PART] for start in range(0, job.batch, PART)]
                ahead.append((batch, [pool.submit(work, part) for part in parts]))
            batch, parts = ahead.pop(0)
            fbanks = [fbank for part in parts for fbank in part.result()]
            yield Made(torch.stack(fbanks) if fbanks[0] is not None else None, batch)


def collate(rows: list[tuple[torch.Tensor, int]]) -> Made:
    fbanks, clips = zip(*rows, strict=True)
    return Made(torch.stack(fbanks), list(clips))


def shuffled(count: int) -> Iterator[int]:
    """Clips in random order, without end."""
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(count).tolist()
