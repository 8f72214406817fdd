"""The data set that comes with the trainer: generated sound events, written as real audio files.

    python -m fastsskd.sound_events --out DIR [--clips-per-class 40] [--seed 0]

Members of a class differ in pitch, timing, repeats, level (-30 to -3 dBFS), room, background noise and its strength,
and length (0.5 to 15 s); files differ in format, sampling rate and channels, independently of the class. A clip depends
on the seed, its class and its number only: a larger set contains the smaller one.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from fastsskd.errors import InputError, UsageError
from fastsskd.sound_synthesis import CLASSES

VERSION = 1
MARKER = "sound_events.json"
"""Written last: its presence says that the folder is whole, its content which set it is."""
SHORTEST, LONGEST = 0.5, 15.0
"""Seconds."""
RATES = (8_000, 16_000, 22_050, 32_000, 44_100, 48_000)
# File suffix, and soundfile's names of the format and of its samples.
FORMATS = (
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "FLOAT"),
    ("flac", "FLAC", "PCM_16"),
    ("ogg", "OGG", "VORBIS"),
    ("aiff", "AIFF", "PCM_16"),
)
NOISE_TILTS = {"white": 0.0, "pink": -0.5, "brown": -1.0, "blue": 0.5}
"""Background noises, as the power of frequency that their amplitude follows; "hum" comes on top."""


def generate(
    out_dir: str | Path,
    *,
    clips_per_class: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set under `out_dir/class_name/`, or reuse it when it is there.

    Args:
        out_dir: folder to make; it appears whole or not at all.
        clips_per_class: clips of each class.
        seed: another seed gives other clips.
        progress: called with clips done and clips in all.

    Returns:
        `out_dir`.

    Raises:
        UsageError: `clips_per_class` or `seed` out of range.
        InputError: the folder holds something else, or cannot be written.
    """
    if clips_per_class < 1 or seed < 0:
        raise UsageError(f"clips_per_class = {clips_per_class}, seed = {seed}: at least 1 clip, and a seed from 0")
    out_dir = Path(out_dir)
    about = {"version": VERSION, "clips_per_class": clips_per_class, "seed": seed, "classes": list(CLASSES)}
    if _is_complete(out_dir, about):
        return out_dir
    temporary = out_dir.absolute().with_name(f".{out_dir.absolute().name}.{os.getpid()}.partial")
    try:
        _remove_leftovers(out_dir.absolute())
        _write_clips(temporary, clips_per_class, seed, progress)
        (temporary / MARKER).write_text(json.dumps(about))
        temporary.rename(out_dir)  # replaces an empty folder, refuses any other
    except OSError as error:
        if not _is_complete(out_dir, about):  # another process may have been faster
            raise InputError(f"{out_dir}: cannot be written ({error.strerror}): choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def make_clip(class_name: str, number: int, seed: int) -> tuple[np.ndarray, int]:
    """One clip as it is written.

    Returns:
        (S, channels) float32 within -1..1, and its sampling rate in Hz.
    """
    rng = np.random.default_rng([seed, list(CLASSES).index(class_name), number])
    rate = int(rng.choice(RATES))
    num_samples = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST))) * rate)
    event = CLASSES[class_name](rng, num_samples, rate)
    if rng.random() < 0.5:
        event = _in_a_room(rng, event, rate)
    noisy = event + _background(rng, num_samples, rate) * _loudness(event, rate) * 10 ** (-rng.uniform(6, 40) / 20)
    clip = _stereo(rng, noisy, rate) if rng.random() < 0.4 else noisy[:, None]
    peak = 10 ** (rng.uniform(-30, -3) / 20)
    return (clip * (peak / max(np.abs(clip).max(), 1e-9))).astype(np.float32), rate


def _in_a_room(rng: np.random.Generator, wave: np.ndarray, rate: int) -> np.ndarray:
    """Add a decaying noise tail after everything that sounds."""
    decay = rng.uniform(0.03, 0.25)  # seconds to fall by 8.7 dB
    seconds = np.arange(int(4 * decay * rate), dtype=np.float32) / rate
    echo = rng.standard_normal(len(seconds), np.float32) * np.exp(-seconds / np.float32(decay))
    echo *= rng.uniform(0.1, 0.5) / np.sqrt(np.sum(echo**2))
    echo[0] += 1
    size = -(-(len(wave) + len(echo)) // 4096) * 4096
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(echo, size), size)[: len(wave)].astype(np.float32)


def _background(rng: np.random.Generator, num_samples: int, rate: int) -> np.ndarray:
    """(num_samples,) noise of RMS 1: one of five colours."""
    kind = rng.choice([*NOISE_TILTS, "hum"])
    size = -(-num_samples // 4096) * 4096
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / rate), 20.0)
    noise = np.fft.irfft(spectrum * frequency ** NOISE_TILTS.get(str(kind), -1.0), size)[:num_samples]
    noise = noise / max(np.sqrt(np.mean(noise**2)), 1e-9)
    if kind == "hum":
        seconds = np.arange(num_samples) / rate
        mains = rng.choice([50.0, 60.0])
        noise = noise + sum(1.5 / k * np.sin(2 * np.pi * mains * k * seconds) for k in (1, 2, 3, 5))
        noise /= np.sqrt(np.mean(noise**2))
    return noise.astype(np.float32)


def _loudness(wave: np.ndarray, rate: int) -> float:
    """RMS of the loud parts: a single click in 15 s must not drown in noise."""
    frame = max(1, rate // 50)
    frames = wave[: len(wave) // frame * frame].reshape(-1, frame)
    return float(np.quantile(np.sqrt(np.mean(frames**2, axis=1)), 0.95, method="higher"))


def _stereo(rng: np.random.Generator, wave: np.ndarray, rate: int) -> np.ndarray:
    """(S, 2): the same sound nearer to one ear."""
    delay, far = int(rng.uniform(0, 0.0007) * rate), rng.uniform(0.4, 1.0)
    other = np.concatenate([np.zeros(delay, np.float32), wave])[: len(wave)] * np.float32(far)
    return np.stack([wave, other] if rng.random() < 0.5 else [other, wave], axis=1)


def _write_clips(folder: Path, clips_per_class: int, seed: int, progress: Callable[[int, int], None] | None) -> None:
    done = 0
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(clips_per_class):
            clip, rate = make_clip(name, number, seed)
            # Formats take turns so that small sets have all of them; classes start at different ones.
            suffix, kind, subtype = FORMATS[(number + list(CLASSES).index(name)) % len(FORMATS)]
            soundfile.write(folder / name / f"{number:04d}.{suffix}", clip, rate, format=kind, subtype=subtype)
            done += 1
            if progress:
                progress(done, clips_per_class * len(CLASSES))


def _is_complete(folder: Path, about: dict) -> bool:
    """Whether the folder holds this very set.

    Raises:
        InputError: it holds another set, a set with files missing, or something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder}: is not empty and no generated set: choose another folder") from None
    if found != about:
        raise InputError(
            f"{folder}: holds a set made with other settings ({found}): choose another folder or remove it"
        )
    expected = about["clips_per_class"] * len(about["classes"])
    there = sum(1 for name in about["classes"] for _ in (folder / name).glob("*.*"))
    if there != expected:
        raise InputError(f"{folder}: {there} of {expected} clips are there: remove the folder, it will be made again")
    return True


def _remove_leftovers(out_dir: Path) -> None:
    """Remove what killed generations left beside `out_dir`; make the folder above it."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.parent.glob(f".{out_dir.name}.*.partial"):
        pid = leftover.name.split(".")[-2]
        if not Path(f"/proc/{pid}").exists() or pid == str(os.getpid()):
            shutil.rmtree(leftover, ignore_errors=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastsskd.sound_events", description="Generate sound events.")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--clips-per-class", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; prints the folder. 0 done, 1 the folder cannot be used, 2 wrong usage."""
    options = parse(arguments)
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            left = (time.monotonic() - began) / done * (total - done)
            print(f"\rsound events: {done}/{total} clips, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    try:
        folder = generate(options.out, clips_per_class=options.clips_per_class, seed=options.seed, progress=show)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("", file=sys.stderr)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
