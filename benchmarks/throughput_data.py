"""The files that every loader of ``throughput.py`` reads, made from real clips in a temporary folder.

ESC's clips are padded with digital silence, which FLAC packs into nothing and decodes unusually fast; recordings from
the web have none. So runs of it are removed and clips of a class are joined into full 10 s.
"""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch
from scipy.signal import resample_poly
from throughput_peers import loop_to_length, normalise, torchaudio_fbank

import fastsskd_kernels as kernels
from fastsskd import manifest
from fastsskd.clip_columns import from_columns
from fastsskd.layouts import index as layouts
from fastsskd.sound_synthesis import CLASSES

RATE, SAMPLES = 16_000, 160_000
OGG_RATE, OGG_SECONDS = 44_100, 5
SILENCE_S = 0.05
EPOCH = 50_000  # rows of each list: files repeat, so that no loader is timed at an epoch's end
TAR_SHARDS = 8
REFERENCES = 24  # clips of each source that outputs are compared on


def build(folder: Path, audio: Path | None, count: int) -> dict:
    """Write everything below ``folder``; returns what there is.

    Args:
        audio: folder of 44.1 kHz clips in any layout that ``fastsskd index`` knows; None generates some.
        count: 16 kHz clips to make.
    """
    listed = layouts.build(audio or _generate(folder / "audio", count))
    ogg = [listed.path(i) for i in range(len(listed))]
    distinct = _ten_second_clips(ogg, listed.first_labels())
    clips = [_variation(distinct, number) for number in range(count)]
    names = [f"{number:04d}" for number in range(count)]
    for suffix in ("flac", "wav"):
        (folder / suffix).mkdir()
        for name, clip in zip(names, clips, strict=True):
            soundfile.write(folder / suffix / f"{name}.{suffix}", clip, RATE, subtype="PCM_16")
    sources = {suffix: _files(folder, suffix, sorted((folder / suffix).iterdir())) for suffix in ("flac", "wav")}
    sources["ogg"] = _files(folder, "ogg", ogg) | {"seconds": soundfile.info(ogg[0]).duration}
    for suffix in ("flac", "wav"):
        sources[f"{suffix} shards"] = {"shards": _webdataset_shards(folder, suffix), "clips": count}
    sources["packed"] = _pack(folder, sources["flac"]["files"])
    sources["memory"] = {"files": sources["wav"]["files"], "clips": count}
    np.savez(folder / "reference.npz", **_references(clips, ogg))
    about = _describe(audio, sources, len(distinct))
    return {"sources": sources, "about": about, "reference": str(folder / "reference.npz")}


def _generate(folder: Path, count: int) -> Path:
    """Tones and noise of the trainer's generated classes as 44.1 kHz Ogg Vorbis files, enough for some real 10 s."""
    for number in range(max(2 * len(CLASSES), min(count, 128))):
        name = list(CLASSES)[number % len(CLASSES)]
        rng = np.random.default_rng([17, number])
        clip = CLASSES[name](rng, OGG_SECONDS * OGG_RATE, OGG_RATE)
        clip = 0.5 * clip / max(np.abs(clip).max(), 1e-9) + 0.02 * rng.standard_normal(len(clip))
        (folder / name).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name / f"{number:04d}.ogg", clip, OGG_RATE, format="OGG", subtype="VORBIS")
    return folder


def _ten_second_clips(paths: list[Path], labels: np.ndarray) -> list[np.ndarray]:
    """(160000,) int16 each: the clips of a class one after the other without digital silence, at 16 kHz."""
    clips = []
    for label in np.unique(labels):
        parts = []
        for path in np.array(paths)[labels == label]:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            part = without_silence(samples.mean(1), round(SILENCE_S * rate))
            parts.append(resample_poly(part, RATE, rate) if len(part) else part)
        joined = np.concatenate(parts)
        joined = joined[: len(joined) // SAMPLES * SAMPLES].reshape(-1, SAMPLES)
        clips.extend(np.clip(np.round(joined * 32767), -32768, 32767).astype(np.int16))
    if not clips:
        raise SystemExit("no class of these clips has 10 s of sound: give a larger folder with --audio")
    return clips


def without_silence(samples: np.ndarray, longest: int) -> np.ndarray:
    """Remove runs of at least ``longest`` samples below half a step of 16 bits, which is what silence decodes to."""
    quiet = np.concatenate([[False], np.abs(samples) < 0.5 / 32768, [False]])
    begins, ends = np.flatnonzero(np.diff(quiet.astype(np.int8))).reshape(-1, 2).T
    keep = np.ones(len(samples), bool)
    for begin, end in zip(begins, ends, strict=True):
        keep[begin:end] = end - begin < longest
    return samples[keep]


def _variation(distinct: list[np.ndarray], number: int) -> np.ndarray:
    """The clips themselves first; then the same again, started elsewhere and softer."""
    clip = distinct[number % len(distinct)]
    return clip if number < len(distinct) else shifted(clip, number)


def shifted(clip: np.ndarray, seed: int) -> np.ndarray:
    """Another int16 clip of the same kind: rotated by a random time and multiplied by 0.5 to 1."""
    rng = np.random.default_rng([23, seed])
    return (np.roll(clip, rng.integers(len(clip))) * np.float32(rng.uniform(0.5, 1.0))).astype(np.int16)


def _files(folder: Path, name: str, paths: list[Path]) -> dict:
    """A folder of files: their list for the peers, a manifest for us; row i of either is file i % clips."""
    repeats = -(-EPOCH // len(paths))
    rows = [str(path) for path in paths] * repeats
    target = folder / f"{name}.manifest"
    manifest.save(from_columns(rows, root="/", keys=[f"{row:06d}" for row in range(len(rows))]), target)
    return {
        "files": [str(path) for path in paths],
        "repeats": repeats,
        "manifest": str(target),
        "ids": list(range(len(paths))),
        "clips": len(paths),
    }


def _webdataset_shards(folder: Path, suffix: str) -> list[str]:
    """Tar shards as ``webdataset`` likes them: key.flac or key.wav beside key.cls, which holds the clip's number."""
    paths = sorted((folder / suffix).iterdir())
    shards = [folder / f"{suffix}-{number:02d}.tar" for number in range(min(TAR_SHARDS, len(paths)))]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for path in paths[number :: len(shards)]:
                tar.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                text = str(int(path.stem)).encode()
                label.size = len(text)
                tar.addfile(label, io.BytesIO(text))
    return [str(shard) for shard in shards]


def _pack(folder: Path, files: list[str]) -> dict:
    """Our own shards, made by the command that users call."""
    listed = folder / "listed.manifest"
    manifest.save(from_columns(files, root="/", keys=[Path(file).stem for file in files]), listed)
    command = [sys.executable, "-m", "fastsskd.cli", "pack", str(listed), "--out", str(folder / "packed")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fastsskd pack failed: {done.stderr.strip()}")
    packed = manifest.load(folder / "packed/packed.manifest")
    target = folder / "packed/repeated.manifest"
    repeat(packed, -(-EPOCH // len(packed)), target)
    shards = sorted({str(packed.path(i)) for i in range(len(packed))})
    ids = [int(packed.key(i)) for i in range(len(packed))]
    once = str(packed.root / "packed.manifest")
    return {"manifest": str(target), "once": once, "ids": ids, "shards": shards, "clips": len(packed)}


def repeat(
    clips: manifest.Manifest, times: int, target: Path, *, rows: int | None = None, paths: list[str] | None = None
) -> None:
    """Save a manifest with the same rows again and again, keys made unique.

    Args:
        rows: of them in all; default: ``times`` as many as ``clips`` has.
        paths: other paths for the rows, relative to the manifest.
    """
    table = pa.concat_tables([clips.materialise()] * times)[:rows].combine_chunks()
    columns = {"key": [f"{row:08d}" for row in range(len(table))]} | ({"path": paths} if paths else {})
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, pa.string()))
    root = target.parent if paths else clips.root
    manifest.save(clips.replace(table=table, rows=None, root=root), target)


def _references(clips: list[np.ndarray], ogg: list[Path]) -> dict[str, np.ndarray]:
    """Normalised fbank (N, 1024, 128) by torchaudio's formula and HOG (N, 512), of the first clips of each kind."""
    waves = {"clips": [clip.astype(np.float32) / 32768 for clip in clips[:REFERENCES]], "ogg": []}
    for path in ogg[:REFERENCES]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waves["ogg"].append(resample_poly(samples.mean(1), RATE, rate).astype(np.float32))
    found = {}
    for kind, some in waves.items():
        fbanks = [torchaudio_fbank(loop_to_length(torch.from_numpy(wave))) for wave in some]
        found[f"{kind} fbank"] = torch.stack([normalise(fbank) for fbank in fbanks]).numpy()
        edges = kernels.pad_frames(torch.stack(fbanks), 1024, "repeat")
        found[f"{kind} hog"] = kernels.hog_patch_mean(edges, backend="torch").numpy()
    return found


def _describe(audio: Path | None, sources: dict, distinct: int) -> dict:
    def mean_bytes(name: str) -> int:
        return round(float(np.mean([Path(file).stat().st_size for file in sources[name]["files"]])))

    return {
        "origin": "real recordings" if audio else "generated tones and noise",
        "clips": sources["flac"]["clips"],
        "distinct": min(distinct, sources["flac"]["clips"]),
        "flac_bytes": mean_bytes("flac"),
        "ogg_clips": sources["ogg"]["clips"],
        "ogg_bytes": mean_bytes("ogg"),
        "ogg_seconds": round(sources["ogg"]["seconds"], 2),
    }
